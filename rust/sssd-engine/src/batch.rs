//! One engine step for many requests: append what the target produced, draft, and share the budget out.
//!
//! A [`Step`] is a set of buffers that is filled, run and read again and again; nothing is allocated once they have
//! grown. The threads that run it take its items as they come, so the order of work is free and its result is not:
//! each request depends on itself alone, and the budget is shared out when all are there.

use std::ops::Range;

use sssd_core::{DraftTree, Limits, Lookahead, Outcome, Outside, Sequence, Token, TopK, make_room};

use crate::guide::{Guide, Place};
use crate::metrics::Undrafted;
use crate::request::{Peek, Request, RequestError};
use crate::share::{Items, Share};
use crate::sizing::{Allocation, Pace, Sizing};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLockWriteGuard};
use crate::thread_pool::{Shared, ThreadPool};

/// Fewer items than this for each thread are not worth waking one up.
const ITEMS_PER_THREAD: usize = 4;
/// Items that a thread takes at a time, at most.
const GROUP: usize = 8;

/// What is asked of a step.
#[derive(Default)]
pub struct Work {
    /// The requests, none twice.
    pub requests: Vec<Arc<Request>>,
    /// Whether tokens are appended: those of request `i` are `tokens[offsets[i]..offsets[i + 1]]`.
    pub extend: bool,
    /// Tokens that the target has produced.
    pub tokens: Vec<Token>,
    /// One more than there are requests.
    pub offsets: Vec<usize>,
    /// Of rows that are followed: how many of its first tokens each request keeps before its own are appended, none of
    /// them where it begins anew. Empty where tokens are appended to all.
    pub keeps: Vec<usize>,
    /// Whether requests that begin anew are learned from.
    pub learn: bool,
    /// The target's most probable tokens at each of `tokens`: ids and probabilities, `k` each; or `k` is 0.
    pub k: usize,
    /// `k` ids for each token.
    pub top_ids: Vec<Token>,
    /// `k` probabilities for each token.
    pub top_probs: Vec<f32>,
    /// The target's distributions after the root and every node of each request's last draft, before tokens are
    /// appended: so many rows a request, of which the first `1 + nodes` count, or 0 for none.
    pub feedback_rows: usize,
    /// Tokens of each row.
    pub feedback_k: usize,
    /// Their ids.
    pub feedback_ids: Vec<Token>,
    /// Their probabilities.
    pub feedback_probs: Vec<f32>,
    /// Whether trees are drafted.
    pub draft: bool,
    /// What each request may have; a budget of 0 nodes turns a request off.
    pub plans: Vec<Plan>,
    /// Nodes of all trees together.
    pub total_nodes: Option<usize>,
    /// Then trees are as large as pays.
    pub sizing: Option<Sizing>,
    /// What is said of each request's draft, if `guided`: as many as requests, or more.
    pub guides: Vec<Guide>,
    /// Whether anything is said of any draft.
    pub guided: bool,
    /// Where drafts lack rules.
    places: Vec<Place>,
    /// Once set, what is not done yet is left.
    pub cancelled: Arc<AtomicBool>,
    /// Where results come to stand, one for each request or more.
    slots: Vec<Mutex<Slot>>,
    stage: Stage,
    /// The requests of this stage, and how many threads may share them.
    todo: Vec<u32>,
    threads: usize,
    keys: Vec<u64>,
    allocation: Allocation,
    paces: Vec<Option<Pace>>,
    /// Bytes of the trees in `slots`.
    tree_bytes: usize,
}

/// What one request may have of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Nodes that it gets whatever others could do with them, as far as it can draft so many.
    pub min_nodes: usize,
    /// The rest.
    pub limits: Limits,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Stage {
    #[default]
    First,
    /// Drafts again, and more, for those that could do with it.
    More,
}

#[derive(Default)]
struct Slot {
    tree: DraftTree,
    /// Bytes of it that are counted.
    tree_bytes: usize,
    /// The draft that `tree` is a copy of.
    draft: u64,
    /// Nodes that the caller allowed.
    allowed: usize,
    /// Nodes that it was to grow to.
    target: usize,
    /// Nodes that it was given.
    nodes: usize,
    /// Nodes that were drafted, and the length of the request, if it was ready.
    drafted: Option<(usize, usize)>,
    outcome: Option<Outcome>,
    failure: Option<RequestError>,
    /// Where the draft lacks rules.
    unruled: Vec<Place>,
}

/// What a step has drafted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Drafted {
    /// Requests that drafts were made for.
    pub requests: usize,
    /// Nodes of these drafts.
    pub nodes: usize,
    /// Mean length of the requests that are ready, in tokens.
    pub context: f64,
}

/// What went wrong with one request of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// Its place in the batch.
    pub index: usize,
    /// What it was.
    pub error: RequestError,
}

/// A step and its buffers.
#[derive(Default)]
pub struct Step {
    share: Share<Work>,
}

static BATCHES: AtomicU64 = AtomicU64::new(1);

impl Work {
    /// Forgets what the last step was about and keeps the memory.
    pub fn clear(&mut self) {
        let used = self.requests.len().min(self.slots.len());
        for slot in &mut self.slots[..used] {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            let before = std::mem::replace(&mut slot.tree_bytes, slot.tree.memory_bytes());
            self.tree_bytes = self.tree_bytes + slot.tree_bytes - before;
        }
        self.cancelled.store(false, Ordering::Relaxed);
        self.requests.clear();
        self.tokens.clear();
        self.offsets.clear();
        self.keeps.clear();
        self.top_ids.clear();
        self.top_probs.clear();
        self.plans.clear();
        self.feedback_ids.clear();
        self.feedback_probs.clear();
        (self.total_nodes, self.sizing, self.guided) = (None, None, false);
        self.guides.iter_mut().for_each(Guide::clear);
        (self.extend, self.draft, self.learn, self.k) = (false, false, false, 0);
        (self.feedback_rows, self.feedback_k) = (0, 0);
    }

    /// The place of a request that is there twice.
    pub fn repeated(&self) -> Option<usize> {
        let batch = BATCHES.fetch_add(1, Ordering::Relaxed);
        self.requests.iter().position(|request| !request.join(batch))
    }

    /// What went wrong, in order.
    pub fn failures(&self) -> impl Iterator<Item = Failure> {
        self.slots().enumerate().filter_map(|(index, slot)| {
            let error = lock(slot).failure.clone()?;
            Some(Failure { index, error })
        })
    }

    /// Calls `act` with each tree, empty where there is none.
    pub fn trees(&self, mut act: impl FnMut(usize, &DraftTree)) {
        self.slots().enumerate().for_each(|(index, slot)| act(index, &lock(slot).tree));
    }

    /// Calls `act` with how many nodes of each request's last draft its new tokens have accepted.
    pub fn accepted(&self, mut act: impl FnMut(usize)) {
        self.slots().for_each(|slot| act(lock(slot).outcome.map_or(0, |outcome| outcome.accepted)));
    }

    /// What was drafted, before any draft was cut.
    pub fn drafted(&self) -> Drafted {
        let (mut drafted, mut ready, mut lengths) = (Drafted::default(), 0, 0);
        for (slot, plan) in self.slots().zip(&self.plans) {
            let Some((nodes, length)) = lock(slot).drafted else { continue };
            (ready, lengths) = (ready + 1, lengths + length);
            drafted.requests += usize::from(plan.limits.max_nodes > 0);
            drafted.nodes += nodes;
        }
        drafted.context = lengths as f64 / f64::from(ready.max(1));
        drafted
    }

    /// What has become known of earlier drafts.
    pub(crate) fn outcomes(&self) -> impl Iterator<Item = Outcome> {
        self.slots().filter_map(|slot| lock(slot).outcome)
    }

    /// Why the requests without a draft have none, if drafts were asked for.
    pub(crate) fn undrafted(&self) -> impl Iterator<Item = Undrafted> {
        let slots = self.slots().zip(&self.plans).filter(|_| self.draft);
        slots.filter_map(|(slot, plan)| {
            let slot = lock(slot);
            let found = slot.drafted.map(|(nodes, _)| nodes);
            (slot.tree.is_empty() && slot.failure.is_none())
                .then(|| Undrafted::why((slot.allowed, plan.limits.max_nodes), found, self.sizing.is_some()))
        })
    }

    /// Bytes of its buffers.
    pub(crate) fn memory_bytes(&self) -> usize {
        fn bytes<T>(items: &Vec<T>) -> usize {
            items.capacity() * size_of::<T>()
        }
        let asked = bytes(&self.requests) + bytes(&self.tokens) + bytes(&self.offsets) + bytes(&self.plans);
        let asked = asked + bytes(&self.keeps);
        let top = bytes(&self.top_ids) + bytes(&self.top_probs);
        let feedback = bytes(&self.feedback_ids) + bytes(&self.feedback_probs);
        let guides = bytes(&self.guides) + self.guides.iter().map(Guide::memory_bytes).sum::<usize>();
        let asked = asked + guides + bytes(&self.places);
        let own = bytes(&self.slots) + bytes(&self.todo) + bytes(&self.keys) + bytes(&self.paces);
        size_of::<Self>() + asked + top + feedback + own + self.tree_bytes
    }

    fn slots(&self) -> impl Iterator<Item = &Mutex<Slot>> {
        self.slots[..self.requests.len()].iter()
    }

    /// Where drafts lack rules: the request's place, and the tokens that lead there; and the guides to put them into.
    pub fn places(&mut self) -> (&[Place], &mut [Guide]) {
        (&self.places, &mut self.guides)
    }

    pub(crate) fn prepare(&mut self) {
        let (count, held) = (self.requests.len(), self.slots.len());
        make_room(&mut self.slots, count.saturating_sub(held));
        while self.slots.len() < self.requests.len() {
            self.slots.push(Mutex::default());
        }
        for (item, slot) in self.slots[..self.requests.len()].iter_mut().enumerate() {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            slot.tree.clear();
            (slot.failure, slot.outcome, slot.nodes, slot.drafted) = (None, None, 0, None);
            slot.allowed = self.plans.get(item).map_or(0, |plan| plan.limits.max_nodes);
            slot.unruled.clear();
        }
        self.stage = Stage::First;
        self.todo.clear();
        make_room(&mut self.todo, count);
        self.todo.extend(0..self.requests.len() as u32);
        self.begin_step();
        if let ([plan], Some(total)) = (&mut self.plans[..], self.total_nodes) {
            plan.limits.max_nodes = plan.limits.max_nodes.min(total);
            self.total_nodes = None;
        }
        if let (true, Some(total)) = (self.draft, self.total_nodes) {
            // a little more than an equal share: few requests have to come again
            let share = total.div_ceil(self.requests.len().max(1));
            let share = share + share / 2 + 1;
            for (slot, plan) in self.slots.iter_mut().zip(&self.plans) {
                let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
                slot.target = share.max(plan.min_nodes).min(plan.limits.max_nodes);
            }
        } else {
            for (slot, plan) in self.slots.iter_mut().zip(&self.plans) {
                slot.get_mut().unwrap_or_else(PoisonError::into_inner).target = plan.limits.max_nodes;
            }
        }
    }

    /// Has the rule say what each request may draft.
    fn begin_step(&mut self) {
        let Self { sizing: Some(sizing @ Sizing::Rule(_)), draft: true, plans, requests, paces, .. } = self
        else {
            return;
        };
        paces.clear();
        paces.extend(requests.iter().map(|request| *request.pace()));
        sizing.begin_step(plans.iter_mut().map(|plan| &mut plan.limits).zip(&mut *paces));
    }

    /// Has the processor fetch what the requests of a group will read. A request by itself spends half of its time
    /// waiting for memory, one read after the other; those of several can wait together.
    fn prefetch(&self, group: &[u32]) {
        let mut peeks: [Option<Peek>; GROUP] = [const { None }; GROUP];
        for (peek, &item) in peeks.iter_mut().zip(group) {
            *peek = self.requests[item as usize].peek();
        }
        let mut lookaheads: [Option<(&Sequence, Lookahead)>; GROUP] = [None; GROUP];
        for ((lookahead, peek), &item) in lookaheads.iter_mut().zip(&peeks).zip(group) {
            let tokens = self.news(item as usize).unwrap_or_default();
            let sequence = peek.as_ref().and_then(Peek::sequence);
            *lookahead = sequence.map(|sequence| (sequence, sequence.look_ahead(tokens)));
        }
        let mut more = true;
        while more {
            more = false;
            for (sequence, lookahead) in lookaheads.iter_mut().flatten() {
                more |= sequence.advance(lookahead);
            }
        }
        lookaheads.iter().flatten().for_each(|(_, lookahead)| _ = std::hint::black_box(lookahead));
    }

    /// The tokens that this stage appends to a request, if it appends any to any.
    fn news(&self, item: usize) -> Option<&[Token]> {
        let appends = self.extend && self.stage == Stage::First;
        appends.then(|| &self.tokens[self.offsets[item]..self.offsets[item + 1]])
    }

    /// Does one request's part of the stage.
    fn serve(&self, item: usize) {
        let mut slot = lock(&self.slots[item]);
        let slot = &mut *slot;
        let request = &self.requests[item];
        if let Err(failure) = self.try_serve(request, item, slot) {
            slot.tree.clear();
            slot.failure = Some(failure);
        }
    }

    fn try_serve(&self, request: &Request, item: usize, slot: &mut Slot) -> Result<(), RequestError> {
        if let Some(tokens) = self.news(item) {
            if self.feedback_rows > 0 {
                let (rows, k) = (self.feedback_rows, self.feedback_k);
                let block = item * rows * k..(item + 1) * rows * k;
                let (ids, probs) = (&self.feedback_ids[block.clone()], &self.feedback_probs[block]);
                request.with(|sequence| sequence.feedback_to_draft(TopK { k, ids, probs }))?;
            }
            let rows = self.offsets[item] * self.k..self.offsets[item + 1] * self.k;
            let top = (self.k > 0).then(|| TopK {
                k: self.k,
                ids: &self.top_ids[rows.clone()],
                probs: &self.top_probs[rows],
            });
            let cancelled = || self.cancelled.load(Ordering::Relaxed);
            slot.outcome = match self.keeps.get(item) {
                None => request.extend(tokens, top, &cancelled)?,
                Some(&keep) => request.follow(keep, tokens, self.learn, &cancelled)?,
            };
        }
        if self.draft {
            let limits = self.plans[item].limits;
            request.with_ready(|sequence| {
                let guide = self.guides.get(item).filter(|_| self.guided);
                let outside = guide.map_or_else(Outside::default, Guide::outside);
                slot.draft = sequence.start_draft_with(limits, slot.target, outside);
                if let Some(guide) = guide {
                    guide.find_unruled(sequence, item, &mut slot.unruled);
                }
                let shared = self.total_nodes.is_some() || self.sizing.is_some();
                let tree = if shared { sequence.tree() } else { sequence.end_draft(limits.max_nodes) };
                slot.tree.copy_from(tree);
                slot.drafted = Some((slot.tree.len(), sequence.tokens().len()));
            })?;
        }
        Ok(())
    }

    /// Lists the requests whose drafts lack rules, to be drafted anew. False if there are none.
    fn find_unruled(&mut self) -> bool {
        let Self { slots, places, todo, requests, .. } = self;
        places.clear();
        if !self.guided {
            return false;
        }
        for (item, slot) in slots[..requests.len()].iter_mut().enumerate() {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            if places.is_empty() && !slot.unruled.is_empty() {
                todo.clear();
            }
            if !slot.unruled.is_empty() {
                places.append(&mut slot.unruled);
                todo.push(item as u32);
            }
        }
        self.stage = Stage::More;
        !places.is_empty()
    }

    /// Leaves no draft.
    pub(crate) fn drop_drafts(&mut self) {
        for slot in &mut self.slots[..self.requests.len()] {
            slot.get_mut().unwrap_or_else(PoisonError::into_inner).nodes = 0;
        }
        self.cut();
    }

    /// Gives the most probable nodes to their requests, and lists the requests that might do with more than they
    /// have drafted.
    fn share(&mut self, total: usize) {
        let Self { slots, plans, keys, todo, .. } = self;
        let mut left = total;
        keys.clear();
        for (item, (slot, plan)) in slots.iter_mut().zip(&*plans).enumerate() {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            slot.nodes = plan.min_nodes.min(slot.tree.len());
            left = left.saturating_sub(slot.nodes);
            // most probable first, then in the order of requests and nodes: a tree's start comes before its rest; 11
            // bits hold a tree of MAX_NODES nodes, the others more requests than a batch has
            let rest = slot.tree.probs.iter().skip(slot.nodes).enumerate();
            make_room(keys, slot.tree.len().saturating_sub(slot.nodes));
            keys.extend(rest.map(|(node, prob)| {
                u64::from(prob.to_bits()) << 32 | u64::from(!((item as u32) << 11 | node as u32))
            }));
        }
        if left < keys.len() {
            if left > 0 {
                keys.select_nth_unstable_by(left - 1, |a, b| b.cmp(a));
            }
            keys.truncate(left);
        }
        for key in &*keys {
            let item = (!(*key as u32) >> 11) as usize;
            slots[item].get_mut().unwrap_or_else(PoisonError::into_inner).nodes += 1;
        }
        todo.clear();
        for (item, (slot, plan)) in slots.iter_mut().zip(&*plans).enumerate() {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            let stopped = slot.tree.len() == slot.target && slot.target < plan.limits.max_nodes;
            if stopped && slot.nodes == slot.tree.len() && slot.nodes > 0 {
                slot.target = (2 * slot.target).min(plan.limits.max_nodes);
                todo.push(item as u32);
            }
        }
    }

    /// Gives each request as many nodes as pay, of all requests together the most probable first.
    fn price(&mut self) {
        let context = self.drafted().context;
        let Self { slots, plans, sizing: Some(sizing), allocation, paces, requests, .. } = self else {
            return;
        };
        paces.resize(requests.len(), None);
        allocation.clear();
        for (((slot, plan), request), pace) in slots.iter_mut().zip(&*plans).zip(&*requests).zip(&mut *paces)
        {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            allocation.push(&slot.tree.probs);
            if plan.limits.max_nodes == 0 || slot.drafted.is_none() {
                keep(request, pace.take());
            }
        }
        let counts = sizing.allocate(context, allocation, paces);
        for ((slot, plan), &count) in slots.iter_mut().zip(&*plans).zip(counts) {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            slot.nodes = count.max(plan.min_nodes.min(slot.tree.len()));
        }
        requests.iter().zip(paces).for_each(|(request, pace)| keep(request, pace.take()));
    }

    /// Cuts the drafts to what they were given.
    fn cut(&mut self) {
        for (item, request) in self.requests.iter().enumerate() {
            let slot = self.slots[item].get_mut().unwrap_or_else(PoisonError::into_inner);
            slot.tree.truncate(slot.nodes);
            let cut = request.with_ready(|sequence| {
                if sequence.drafts() == slot.draft {
                    // there may not have been memory for so many
                    slot.tree.truncate(sequence.end_draft(slot.nodes).len());
                }
            });
            if let Err(failure) = cut
                && slot.failure.is_none()
            {
                slot.tree.clear();
                slot.failure = Some(failure);
            }
        }
    }
}

impl Items for Work {
    fn items(&self) -> usize {
        self.todo.len()
    }

    /// Fewer towards the end, for all threads to end together.
    fn group(&self, left: usize) -> usize {
        (left / (2 * self.threads)).clamp(1, GROUP)
    }

    fn run(&self, items: Range<usize>) {
        let group = &self.todo[items];
        if group.len() > 1 {
            self.prefetch(group);
        }
        group.iter().for_each(|&item| self.serve(item as usize));
    }
}

impl Shared for Step {
    fn help(&self) {
        self.share.help();
    }
}

impl Step {
    /// The buffers, to fill or read them. Waits for helpers that come late.
    pub fn lock(&self) -> RwLockWriteGuard<'_, Work> {
        self.share.lock()
    }

    /// Does what was asked for, or goes on with it. False if drafts lack rules. No helper sees what `begin` lists before
    /// it is counted anew.
    pub(crate) fn run(self: &Arc<Self>, pool: &ThreadPool<Self>, begin: impl FnOnce(&mut Work)) -> bool {
        let mut work = self.lock();
        begin(&mut work);
        loop {
            if work.requests.len() == 1 {
                work.serve(0);
            } else {
                work = self.stage(work, pool);
            }
            if work.find_unruled() {
                return false;
            }
            if work.draft && work.sizing.is_some() {
                work.price();
                work.cut();
                return true;
            }
            let Some(total) = work.total_nodes.filter(|_| work.draft) else { return true };
            work.share(total);
            if work.todo.is_empty() {
                work.cut();
                return true;
            }
            work.stage = Stage::More;
        }
    }

    /// Has the items done.
    fn stage<'a>(
        self: &'a Arc<Self>,
        mut work: RwLockWriteGuard<'a, Work>,
        pool: &ThreadPool<Self>,
    ) -> RwLockWriteGuard<'a, Work> {
        let items = work.todo.len();
        work.threads = pool.threads();
        let helpers = (items / ITEMS_PER_THREAD).saturating_sub(1);
        self.share.run(work, || pool.help(self, helpers))
    }
}

/// Has a request keep what the rule remembers of it, if that was known.
fn keep(request: &Request, pace: Option<Pace>) {
    if pace.is_some() {
        *request.pace() = pace;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
