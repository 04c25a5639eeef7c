//! Grows a draft tree inside samples of earlier occurrences, most probable node first, and learns from its outcome.
//! `docs/predictor.md` says what it does and what each part is worth.

pub mod arena;
mod blend;
pub mod correct;
pub mod domains;
mod frontier;
pub mod gather;
pub mod guest;
pub mod inputs;
mod learn;
mod mix;
mod outside;
pub mod overlay;
pub mod refine;
mod support;
mod vote;
pub mod weights;

use crate::Token;
use crate::allowed::Allowed;
use crate::index::NONE;
use crate::memory::{make_room, push};
use crate::ranking::record::RankingRecord;
use crate::ranking::stage::{self, Room};
use crate::sources::live::LiveStore;
use crate::sources::{FEEDBACK, GIVEN, LIVE, NO_CLASS, SUCCESSORS};
use crate::stats::{Outcome, Stats};
use crate::tree::DraftTree;
use arena::{Arena, Candidate, Expansion, Scratch, Tally};
use correct::Calibration;
use guest::Trust;
use inputs::{Inputs, Limits};
use mix::Children;
use overlay::Overlay;

/// Contexts to have room for at a node, so that few drafts need more.
const CONTEXTS: usize = 24;
/// What domains say after less probable nodes is not noted: few of these come.
const WORTH_VOICES: f32 = 0.04;

/// The drafts of a sequence: memory that is used again from draft to draft, and the last one's reasons until its outcome
/// is known.
#[derive(Clone, Default)]
pub struct Predictor {
    arena: Arena,
    tree: DraftTree,
    /// What ranking keeps from draft to draft.
    ranking: Room,
    /// Nodes that the live store speaks for, and a position in the document.
    credits: Vec<(u32, u64)>,
    /// The newest node, until it is expanded: there may be no room for its children.
    newest: Option<u32>,
    /// What the tree and its learning are to come to: those of a draft of so many nodes.
    max_nodes: usize,
    /// Tokens of output before the draft.
    age: usize,
    /// The candidate that the target's output has followed so far.
    followed: Option<u32>,
}

impl Predictor {
    /// Drafts a tree, or a chain, of at most `nodes` nodes, the best of those that `inputs` allow.
    pub fn draft(&mut self, nodes: usize, inputs: &Inputs, scratch: &mut Scratch) {
        self.start(inputs, scratch);
        while self.tree.len() < nodes.min(inputs.limits.max_nodes) {
            if let Some(node) = self.newest.take() {
                if inputs.limits.chain {
                    // what does not follow the newest node is no part of the chain
                    scratch.frontier.reset(1, inputs.limits.min_prob);
                }
                self.expand(node, inputs, scratch);
            }
            let Some(best) = scratch.frontier.pop() else { return };
            self.add_node(best, scratch);
        }
    }

    /// Begins with the root: the last token, which is no node of the tree.
    fn start(&mut self, inputs: &Inputs, scratch: &mut Scratch) {
        let Limits { max_nodes, max_depth, min_prob, .. } = inputs.limits;
        stage::start(&mut self.ranking, inputs);
        self.arena.clear();
        make_room(&mut self.arena.contexts, CONTEXTS * max_nodes);
        self.tree.clear();
        self.credits.clear();
        scratch.start();
        scratch.frontier.reset(max_nodes, min_prob);
        (self.newest, self.followed) = (None, None);
        (self.max_nodes, self.age) = (max_nodes, inputs.age);
        if let Some(&last) = inputs.index.tokens().last()
            && max_nodes > 0
            && max_depth > 0
            && !inputs.end_tokens.contains(&last)
        {
            push(&mut self.arena.candidates, Candidate::new(last, NONE, 0));
            (self.newest, self.followed) = (Some(0), Some(0));
        }
    }

    /// Predicts what follows `node` and puts the predicted tokens on the frontier.
    fn expand(&mut self, node: u32, inputs: &Inputs, scratch: &mut Scratch) {
        let Arena { candidates, expansions, contexts, said, heard, voices } = &mut self.arena;
        let Candidate { token, depth, path, .. } = candidates[node as usize];
        if usize::from(depth) >= inputs.limits.max_depth || inputs.end_tokens.contains(&token) {
            return;
        }
        let (start, model) = (candidates.len(), inputs.model);
        let mut expansion = Expansion::default();
        scratch.table.clear();
        outside::find_place(node, candidates, expansions, inputs, &mut expansion);
        let astray = inputs.outside.given.is_some() && expansion.guest != NONE;
        gather::samples(node, candidates, astray, inputs, scratch);
        let mut tally = Tally::default();
        vote::vote(node, candidates, inputs, scratch, &mut tally);
        let first_voice = voices.len() as u32;
        let told_apart = inputs.store.is_some_and(|store| store.domains() > 1) && path >= WORTH_VOICES;
        let voices_of = told_apart.then_some(&mut *voices);
        blend::blend(&scratch.votes, &tally, model, candidates, contexts, voices_of, &mut expansion);
        expansion.voices = (first_voice, voices.len() as u32);
        if !inputs.feedback.is_empty() {
            let found = gather::feedback(node, candidates, inputs);
            blend::blend_feedback(&found, &inputs.recent.tokens, model, said, contexts, &mut expansion);
        }
        let Scratch { successors, origins, table, frontier, .. } = scratch;
        let ranking = &mut self.ranking;
        gather::successors(token, inputs, successors);
        expansion.gates[SUCCESSORS] = mix::list_gate(SUCCESSORS, successors);
        mix::weigh(model, &mut expansion);
        let mut children = Children { node, candidates, origins, table };
        let said = said[expansion.said.0 as usize..expansion.said.1 as usize].iter().copied();
        mix::offer(FEEDBACK, expansion.weights[FEEDBACK], said, &mut children);
        let listed = successors.iter().map(|&(token, share)| (token, share, 0));
        mix::offer(SUCCESSORS, expansion.weights[SUCCESSORS], listed, &mut children);
        outside::offer(inputs, &expansion, &mut children);
        let ranks = stage::ranks(path, inputs);
        let mut total = refine::refine(&mut candidates[start..], &expansion, inputs, !ranks);
        if ranks {
            let made_of = (&expansion, &tally);
            total = stage::rank(node, start, candidates, made_of, successors, inputs, ranking);
        }
        refine::scale(&mut candidates[start..], path, total);
        outside::weigh(inputs, (start, path), candidates, table, heard, &mut expansion);
        let mut seen = 0;
        for (child, candidate) in (start as u32..).zip(&candidates[start..]) {
            frontier.push(child, candidate.path);
            let newest = gather::newest_lower(candidate, token, inputs.index);
            origins[child as usize].lower = newest;
            // reads what is there, so that the processor fetches it before it is needed
            seen ^= if newest == NONE { 0 } else { inputs.index.token(newest) };
        }
        std::hint::black_box(seen);
        expansion.children = (start as u32, candidates.len() as u32);
        candidates[node as usize].expansion = expansions.len() as u32;
        push(expansions, expansion);
    }

    /// Makes a candidate the next node of the tree.
    fn add_node(&mut self, best: u32, scratch: &Scratch) {
        let node = self.tree.len();
        self.arena.candidates[best as usize].node = node as i16;
        let candidate = &self.arena.candidates[best as usize];
        let parent = &self.arena.candidates[candidate.parent as usize];
        let expansion = &self.arena.expansions[parent.expansion as usize];
        let heard = &self.arena.heard[expansion.heard.0 as usize..expansion.heard.1 as usize];
        let source = match heard.iter().find(|heard| heard.candidate == best) {
            Some(heard) if heard.carries() => GIVEN as u8,
            _ => mix::carrier(candidate, &expansion.weights),
        };
        if candidate.classes[LIVE] != NO_CLASS
            && let Some(position) = scratch.live_position(best)
        {
            push(&mut self.credits, (node as u32, position));
        }
        self.tree.push(candidate.token, i32::from(parent.node), candidate.path, source);
        self.newest = Some(best);
    }

    /// If there are more than `nodes` nodes, goes back to what a draft of so many is, and what is learned from it.
    pub fn cut(&mut self, nodes: usize) {
        if nodes >= self.tree.len() {
            return;
        }
        self.max_nodes = nodes;
        self.tree.truncate(nodes);
        if nodes == 0 {
            self.followed = None;
        }
    }

    /// The tree, until the next draft.
    pub fn tree(&self) -> &DraftTree {
        &self.tree
    }

    /// Calls `act` with the paths of the first `most` places whose rules the draft would have needed.
    pub fn unruled(&self, allowed: &Allowed, most: usize, mut act: impl FnMut(&[Token])) {
        let Arena { candidates, expansions, .. } = &self.arena;
        let (mut unruled, mut path) = (Vec::new(), Vec::new());
        for candidate in candidates {
            if let Some(expansion) = expansions.get(candidate.expansion as usize)
                && allowed.is_unknown(expansion.allowed)
            {
                push(&mut unruled, candidate);
            }
        }
        unruled.sort_unstable_by_key(|candidate| candidate.node);
        for mut candidate in unruled.into_iter().take(most) {
            path.clear();
            // the root is the sequence's last token
            while candidate.depth > 0 {
                push(&mut path, candidate.token);
                candidate = &candidates[candidate.parent as usize];
            }
            path.reverse();
            act(&path);
        }
    }

    /// Forgets the last draft. The text may be another one from now on.
    pub fn forget(&mut self) {
        self.followed = None;
        self.ranking.topic.forget();
    }

    /// What ranking sees is noted from now on; what it has seen since the last call.
    pub fn record_ranking(&mut self) -> RankingRecord {
        std::mem::take(self.ranking.record.get_or_insert_default())
    }

    /// Frees everything but the tree.
    pub fn shrink(&mut self) {
        let mut tree = std::mem::take(&mut self.tree);
        tree.shrink();
        *self = Self { tree, ..Self::default() };
    }

    /// Whether the outcome of the last draft is not known yet.
    pub fn awaits_outcome(&self) -> bool {
        self.followed.is_some()
    }

    /// Learns from the tokens that the target has produced after the last draft. Tells nothing without tokens.
    pub fn learn(
        &mut self,
        model: &mut Overlay,
        calibration: &mut Calibration,
        mut trust: Option<&mut Trust>,
        tokens: &[Token],
        stats: &mut Stats,
        live: &LiveStore,
    ) -> Option<Outcome> {
        if tokens.is_empty() {
            return None;
        }
        let drafted = (self.followed? == 0).then(|| self.tree.len());
        if drafted.is_some() {
            stats.count_draft(&self.tree);
        }
        let mut accepted = 0;
        for &token in tokens {
            self.followed = self.follow(token, model, calibration, trust.as_deref_mut());
            let Some(truth) = self.followed else { break };
            if let Ok(node) = usize::try_from(self.arena.candidates[truth as usize].node)
                && node < self.tree.len()
            {
                accepted += 1;
                stats.sources[usize::from(self.tree.sources[node])].accepted += 1;
                let credits = self.credits.iter().filter(|credit| credit.0 == node as u32);
                credits.for_each(|credit| live.credit(credit.1));
            }
        }
        Some(Outcome { drafted, accepted })
    }

    /// Learns from one token, and returns the candidate for it.
    fn follow(
        &self,
        token: Token,
        model: &mut Overlay,
        calibration: &mut Calibration,
        trust: Option<&mut Trust>,
    ) -> Option<u32> {
        let expanded = &self.arena.candidates[self.followed? as usize];
        // a draft of this size does not expand its last node; a larger one that was cut did, and must not learn more
        if i32::from(expanded.node) >= self.max_nodes as i32 - 1 {
            return None;
        }
        let expansion = self.arena.expansions.get(expanded.expansion as usize)?;
        if let Some(trust) = trust {
            for heard in &self.arena.heard[expansion.heard.0 as usize..expansion.heard.1 as usize] {
                trust.learn(heard, self.arena.candidates[heard.candidate as usize].token == token);
            }
        }
        learn::learn(token, expansion, &self.arena, self.age, model, calibration)
    }

    pub fn memory_bytes(&self) -> usize {
        let credits = self.credits.capacity() * size_of::<(u32, u64)>();
        self.arena.memory_bytes() + credits + self.tree.memory_bytes() + self.ranking.memory_bytes()
    }
}
