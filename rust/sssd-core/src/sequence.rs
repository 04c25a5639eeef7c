//! One request: its tokens, their index, and what drafting for it has learned.

use std::sync::Arc;
use std::time::Instant;

use crate::index::{Index, Lookahead, grown};
use crate::memory::{MemoryFull, Reservation, try_clone, try_reserve};
use crate::namespace::{Namespace, Shared};
use crate::predictor::Predictor;
use crate::predictor::correct::Calibration;
use crate::predictor::guest::Trust;
use crate::predictor::inputs::{Inputs, Limits, Outside};
use crate::predictor::overlay::Overlay;
use crate::predictor::weights::{Model, Weights};
use crate::ranking::network::Ranking;
use crate::ranking::record::RankingRecord;
use crate::sources::aligned::Aligned;
use crate::sources::corpus::StoreSlot;
use crate::sources::feedback::{FEEDBACK_ORDERS, Recent, TopK};
use crate::stats::{Outcome, Stats};
use crate::sync::lock;
use crate::{Allowed, DraftTree, MAX_TOKEN, Token};

/// Drafts after which their counts are handed on.
const COUNTED: u64 = 64;

/// Tokens that are indexed before memory is asked for again.
const CHUNK: usize = 256;

/// The state of one request.
pub struct Sequence {
    shared: Arc<Shared>,
    /// The datastore that it matches.
    store: Arc<StoreSlot>,
    /// The predicted output, then the sequence itself.
    index: Index,
    predicted: usize,
    aligned: Aligned,
    recent: Recent,
    /// What `aligned` was before each token of the output, to go back to.
    past: Vec<Aligned>,
    /// The weights that it started with, but for what it has changed.
    model: Overlay,
    calibration: Calibration,
    /// How far drafts from outside were trusted when it started, and are now if there were any.
    trusted: Arc<Trust>,
    trust: Option<Box<Trust>>,
    predictor: Predictor,
    stats: Stats,
    /// Tokens that the live store has been given.
    committed: usize,
    /// The sequence will not become longer than this.
    max_length: usize,
    /// What ends it, where that is not what ends the others.
    end_tokens: Option<Arc<[Token]>>,
    reservation: Reservation,
    drafts: u64,
    /// Tokens that there were at the last draft.
    drafted_at: usize,
}

impl Sequence {
    /// Starts with the tokens of a prompt and, if there is one, of a predicted output.
    pub fn begin(
        namespace: &Namespace,
        prompt: &[Token],
        prediction: &[Token],
        reservation: Reservation,
    ) -> Result<Self, MemoryFull> {
        let mut sequence = Self::new(namespace, reservation)?;
        sequence.predict(prediction)?;
        sequence.prefill(prompt)?;
        Ok(sequence)
    }

    /// Starts without tokens.
    pub fn new(namespace: &Namespace, reservation: Reservation) -> Result<Self, MemoryFull> {
        let shared = Arc::clone(&namespace.shared);
        let base = shared.knowledge.model();
        Self::with_weights(shared, base, reservation)
    }

    fn with_weights(
        shared: Arc<Shared>,
        base: Arc<Weights>,
        reservation: Reservation,
    ) -> Result<Self, MemoryFull> {
        let trusted = shared.knowledge.trust();
        let mut sequence = Self {
            store: Arc::clone(shared.common.store()),
            shared,
            trusted,
            trust: None,
            index: Index::default(),
            predicted: 0,
            aligned: Aligned::default(),
            recent: Recent::default(),
            past: Vec::new(),
            model: Overlay::new(base, reservation.new_empty()),
            calibration: Calibration::default(),
            predictor: Predictor::default(),
            stats: Stats::default(),
            committed: 0,
            max_length: usize::MAX,
            end_tokens: None,
            reservation,
            drafts: 0,
            drafted_at: 0,
        };
        sequence.reserve()?;
        Ok(sequence)
    }

    /// Adds to the predicted output, before there is a prompt.
    pub fn predict(&mut self, prediction: &[Token]) -> Result<(), MemoryFull> {
        self.prefill(prediction)?;
        self.predicted += prediction.len();
        self.aligned = Aligned::new(self.predicted as u32);
        Ok(())
    }

    /// It has begun: from now on its memory comes first.
    pub fn admit(&mut self) {
        self.reservation.admit();
    }

    /// Limits the number of tokens: nothing is drafted that would go beyond.
    pub fn set_max_length(&mut self, max_length: usize) {
        self.max_length = max_length;
    }

    /// Matches another datastore from now on.
    pub fn set_store(&mut self, store: &Arc<StoreSlot>) {
        self.store = Arc::clone(store);
    }

    /// Sets the tokens after which nothing is drafted, in place of those that end all others.
    pub fn set_end_tokens(&mut self, end_tokens: &[Token]) -> Result<(), MemoryFull> {
        let before = self.end_tokens.replace(end_tokens.into());
        self.reserve().inspect_err(|_| self.end_tokens = before)
    }

    /// Another sequence with the same limits and no tokens, as if it had just begun: nothing that this one has learned,
    /// and no predicted output.
    pub fn renewed(&self) -> Result<Self, MemoryFull> {
        let (shared, base) = (Arc::clone(&self.shared), self.shared.knowledge.model());
        let mut renewed = Self::with_weights(shared, base, self.reservation.new_empty())?;
        renewed.max_length = self.max_length;
        renewed.store = Arc::clone(&self.store);
        renewed.end_tokens.clone_from(&self.end_tokens);
        renewed.reserve()?;
        renewed.admit();
        Ok(renewed)
    }

    /// Takes over what its namespace has learned by now, in place of what it started with and has learned itself.
    pub fn relearn(&mut self) {
        self.model = Overlay::new(self.shared.knowledge.model(), self.reservation.new_empty());
        (self.trusted, self.trust) = (self.shared.knowledge.trust(), None);
    }

    /// All tokens so far.
    pub fn tokens(&self) -> &[Token] {
        &self.index.tokens()[self.predicted..]
    }

    /// Appends tokens that the target has not produced: the prompt, or a part of it. After an error nothing has
    /// been appended.
    pub fn prefill(&mut self, tokens: &[Token]) -> Result<(), MemoryFull> {
        let output = !self.past.is_empty();
        self.forget_draft();
        self.append(tokens, |sequence, _, token| {
            if output {
                sequence.past.push(sequence.aligned);
            }
            sequence.index.push(token);
        })
    }

    /// Lets `push` append the tokens one by one, within the limits of memory.
    fn append(
        &mut self,
        tokens: &[Token],
        mut push: impl FnMut(&mut Self, usize, Token),
    ) -> Result<(), MemoryFull> {
        let before = self.tokens().len();
        self.index.reclaim(&mut self.reservation);
        if tokens.is_empty() {
            // taking the base back may have changed what is held
            return self.reserve();
        }
        for (chunk, tokens) in tokens.chunks(CHUNK).enumerate() {
            let past = grown(self.past.capacity(), self.past.len(), tokens.len());
            let bytes =
                self.index.bytes_with(tokens.len()) + past * size_of::<Aligned>() + self.other_bytes();
            if let Err(full) = self.take(bytes, tokens.len(), past) {
                self.forget(before);
                return Err(full);
            }
            for (at, &token) in tokens.iter().enumerate() {
                push(self, chunk * CHUNK + at, token);
            }
        }
        Ok(())
    }

    /// Charges `bytes` and takes the memory for `tokens` more tokens and `past` states.
    fn take(&mut self, bytes: usize, tokens: usize, past: usize) -> Result<(), MemoryFull> {
        self.reservation.try_resize(bytes)?;
        self.index.reserve(tokens)?;
        let more = past - self.past.len();
        try_reserve(&mut self.past, more)
    }

    /// Takes tokens back, down to `len` of them, as if they had never come; what was learned from them stays
    /// learned. The outcome of the last draft is not awaited any more.
    pub fn truncate(&mut self, len: usize) -> Result<(), MemoryFull> {
        while !self.truncate_part(len, usize::MAX)? {}
        Ok(())
    }

    /// The same for at most `most` of these tokens; true once all are gone. Only the first part may fail.
    pub fn truncate_part(&mut self, len: usize, most: usize) -> Result<bool, MemoryFull> {
        let held = self.tokens().len();
        let cut = held.saturating_sub(len);
        self.index.reclaim(&mut self.reservation);
        let past = self.past.capacity() * size_of::<Aligned>();
        self.reservation.try_resize(self.index.bytes_after_pops(cut) + past + self.other_bytes())?;
        if let Err(full) = self.index.reserve_pops(cut) {
            self.reserve()?;
            return Err(full);
        }
        self.forget_draft();
        self.forget(held - cut.min(most));
        Ok(cut <= most)
    }

    /// The last draft is of no place that will be again.
    fn forget_draft(&mut self) {
        self.predictor.forget();
        self.drafted_at = usize::MAX;
    }

    fn forget(&mut self, len: usize) {
        for _ in len..self.tokens().len() {
            if let Some(aligned) = self.past.pop() {
                self.aligned = aligned;
            }
        }
        self.index.truncate(self.predicted + len);
        self.committed = self.committed.min(len);
        // less than what was charged for the way
        let _ = self.reserve();
    }

    /// Another sequence with the same tokens and weights, which goes its own way. It shares this one's index; the
    /// time is proportional to what has changed since the last fork, and four bytes per token are copied. The
    /// outcome of the last draft is awaited by this sequence alone.
    pub fn fork(&mut self) -> Result<Self, MemoryFull> {
        let fork = self.try_fork();
        // what has come to be shared is charged apart, whatever became of the fork
        self.reserve()?;
        fork
    }

    fn try_fork(&mut self) -> Result<Self, MemoryFull> {
        let mut reservation = self.reservation.new_empty();
        let past = self.past.len() * size_of::<Aligned>();
        reservation.try_resize(self.index.fork_bytes() + past + self.other_bytes())?;
        let mut fork = Self {
            shared: Arc::clone(&self.shared),
            store: Arc::clone(&self.store),
            index: self.index.fork(&mut self.reservation)?,
            predicted: self.predicted,
            aligned: self.aligned,
            past: try_clone(&self.past)?,
            recent: self.recent.clone(),
            // what was learned up to here is merged once, by this sequence
            model: self.model.fork(self.reservation.new_empty())?,
            calibration: self.calibration.clone(),
            trusted: self.trust.as_deref().map_or_else(|| Arc::clone(&self.trusted), |own| Arc::new(*own)),
            trust: None,
            predictor: Predictor::default(),
            stats: Stats::default(),
            committed: self.committed,
            max_length: self.max_length,
            end_tokens: self.end_tokens.clone(),
            reservation,
            drafts: 0,
            drafted_at: 0,
        };
        fork.reserve()?;
        fork.admit();
        Ok(fork)
    }

    /// Appends tokens that the target has produced, and learns from how the last draft fared. Row `i` of `top`
    /// is the distribution that token `i` came from. After an error nothing has been appended. Returns what the
    /// tokens have told of the draft, if its outcome was awaited.
    pub fn extend(&mut self, tokens: &[Token], top: Option<TopK>) -> Result<Option<Outcome>, MemoryFull> {
        self.extend_part(tokens, top)?;
        Ok(self.learn(tokens))
    }

    /// Appends some of the tokens that the target has produced; [`Sequence::learn`] is to follow the last of them.
    pub fn extend_part(&mut self, tokens: &[Token], top: Option<TopK>) -> Result<(), MemoryFull> {
        self.append(tokens, |sequence, row, token| sequence.push(row, token, top))
    }

    /// Learns from how the last draft fared, now that `tokens` have come after it.
    pub fn learn(&mut self, tokens: &[Token]) -> Option<Outcome> {
        let mut outcome = None;
        if self.predictor.awaits_outcome() {
            let live = &self.shared.knowledge.live;
            let placeholder = tokens.iter().position(|&token| token > MAX_TOKEN);
            outcome = self.predictor.learn(
                &mut self.model,
                &mut self.calibration,
                self.trust.as_deref_mut(),
                &tokens[..placeholder.unwrap_or(tokens.len())],
                &mut self.stats,
                live,
            );
            if placeholder.is_some() {
                // what comes after it does not tell how the draft fared
                self.predictor.forget();
            }
            if self.stats.drafts >= COUNTED {
                self.count();
            }
        }
        outcome
    }

    /// Begins to read what appending `tokens` and drafting after them will read.
    pub fn look_ahead(&self, tokens: &[Token]) -> Lookahead {
        self.index.look_ahead(tokens)
    }

    /// Reads on; false if there is nothing more to read.
    pub fn advance(&self, lookahead: &mut Lookahead) -> bool {
        self.index.advance(lookahead)
    }

    fn push(&mut self, row: usize, token: Token, top: Option<TopK>) {
        let table = &self.shared.knowledge.feedback;
        if let Some(top) = top {
            let best = top.best(row);
            table.insert(self.newest_first(), &best);
            self.recent.update(best.tokens().iter().copied(), token);
        } else if !table.is_empty() {
            // what `feedback` has just told
            let mut found = [None; FEEDBACK_ORDERS.len()];
            table.find(self.newest_first(), &mut found);
            if let Some(known) = found[FEEDBACK_ORDERS.len() - 1] {
                self.recent.update(known.tokens(), token);
            }
        }
        self.past.push(self.aligned);
        self.index.push(token);
        self.aligned.follow(&self.index);
    }

    /// Remembers the target's distributions after the root (row 0) and after each node of a tree that continues
    /// the sequence, whether the node was accepted or not.
    pub fn feedback(&self, tree: &DraftTree, top: TopK) {
        for row in 0..top.rows() {
            let mut node = row as i32 - 1;
            let path = std::iter::from_fn(|| {
                let at = usize::try_from(node).ok()?;
                node = tree.parents[at];
                Some(tree.token_ids[at])
            });
            self.shared.knowledge.feedback.insert(path.chain(self.newest_first()), &top.best(row));
        }
    }

    /// The same for the last draft, or for the root alone if that draft is not of this place; what is left of `top` is
    /// not looked at.
    pub fn feedback_to_draft(&self, top: TopK) {
        let root = DraftTree::default();
        let tree = if self.drafted_at == self.tokens().len() { self.predictor.tree() } else { &root };
        let most = top.ids.len().min(top.k * (1 + tree.len()));
        self.feedback(tree, TopK { k: top.k, ids: &top.ids[..most], probs: &top.probs[..most] });
    }

    fn newest_first(&self) -> impl Iterator<Item = Token> + '_ {
        self.tokens().iter().rev().copied()
    }

    /// Drafts continuations.
    pub fn draft(&mut self, limits: Limits) -> &DraftTree {
        self.start_draft(limits, limits.max_nodes);
        self.end_draft(limits.max_nodes)
    }

    /// Drafts at most `nodes` of the nodes that `limits` allow, and returns the draft's number.
    pub fn start_draft(&mut self, limits: Limits, nodes: usize) -> u64 {
        self.start_draft_with(limits, nodes, Outside::default())
    }

    /// The same with another drafter's draft as one more source, or within what is allowed.
    pub fn start_draft_with(&mut self, limits: Limits, nodes: usize, outside: Outside) -> u64 {
        if outside.given.is_some() && self.trust.is_none() {
            self.trust = Some(Box::new(*self.trusted));
        }
        self.drafts += 1;
        self.drafted_at = self.tokens().len();
        self.calibration.start(&self.model.ages(self.past.len()));
        let shared = Arc::clone(&self.shared);
        shared.common.with_scratch(|scratch| {
            self.with_inputs(limits, outside, |predictor, inputs| predictor.draft(nodes, inputs, scratch));
        });
        self.drafts
    }

    /// Calls `act` with the paths of the first `most` places of the last draft whose rules it lacked. Until there are none
    /// the draft is to be made again.
    pub fn unruled(&self, allowed: &Allowed, most: usize, act: impl FnMut(&[Token])) {
        self.predictor.unruled(allowed, most, act);
    }

    /// What the ranking stage has seen since the last call; it notes that from the first one on, for who learns a
    /// network. The memory that takes is not charged.
    pub fn record_ranking(&mut self) -> RankingRecord {
        self.predictor.record_ranking()
    }

    /// How many drafts were started.
    pub fn drafts(&self) -> u64 {
        self.drafts
    }

    /// The last draft.
    pub fn tree(&self) -> &DraftTree {
        self.predictor.tree()
    }

    /// Leaves the first `nodes` nodes of the last draft, if it has more: tree, learning and counts are those of a
    /// draft of so many.
    pub fn cut_draft(&mut self, nodes: usize) {
        self.predictor.cut(nodes);
    }

    /// Ends the draft with at most `nodes` nodes.
    pub fn end_draft(&mut self, nodes: usize) -> &DraftTree {
        self.cut_draft(nodes);
        // what does not fit into memory is given back at once, and the draft is not learned from
        if self.reserve().is_err() {
            self.predictor.shrink();
            if self.reserve().is_err() {
                self.predictor = Predictor::default();
                let _ = self.reserve();
            }
        }
        self.predictor.tree()
    }

    fn with_inputs(&mut self, limits: Limits, outside: Outside, work: impl FnOnce(&mut Predictor, &Inputs)) {
        let knowledge = &self.shared.knowledge;
        let store = self.shared.common.readable(&self.store);
        let live = knowledge.live.read();
        // the last token to come needs no draft
        let left = self.max_length.saturating_sub(self.index.tokens().len() - self.predicted + 1);
        let tables = store.as_deref().and_then(|store| if limits.ranking { store.tables() } else { None });
        let ranking = self.shared.common.network().zip(tables);
        let inputs = Inputs {
            index: &self.index,
            predicted: self.predicted,
            aligned: &self.aligned,
            store: store.as_deref(),
            live: Some(&*live),
            feedback: &knowledge.feedback,
            recent: &self.recent,
            model: &self.model,
            calibration: &self.calibration,
            ranking: ranking.map(|(network, tables)| Ranking { network, tables }),
            end_tokens: self.end_tokens.as_deref().unwrap_or(self.shared.end_tokens()),
            age: self.past.len(),
            limits: Limits { max_depth: limits.max_depth.min(left), ..limits },
            outside,
            trust: self.trust.as_deref().unwrap_or(&self.trusted),
        };
        work(&mut self.predictor, &inputs);
    }

    /// Gives what is new since the last commit to the live store. Between parts of it `interrupted` is asked whether to
    /// leave it at that; false if it was.
    pub fn commit(&mut self, interrupted: &mut dyn FnMut() -> bool) -> bool {
        let tokens = &self.index.tokens()[self.predicted..];
        if self.committed == tokens.len() {
            return true;
        }
        // enough of the old to find the new by
        let new = &tokens[self.committed.saturating_sub(8)..];
        self.committed = tokens.len();
        self.shared.knowledge.learn_text(new, interrupted)
    }

    /// The name of its namespace.
    pub fn namespace(&self) -> &Arc<str> {
        &self.shared.name
    }

    /// Ends the request: later ones learn from it. False if it was interrupted, and part of its text is not learned.
    pub fn finish(mut self, interrupted: &mut dyn FnMut() -> bool) -> bool {
        let committed = self.commit(interrupted);
        self.shared.knowledge.learn(&self.model);
        if let Some(learned) = &self.trust {
            self.shared.knowledge.learn_trust(&self.trusted, learned);
        }
        committed
    }

    fn count(&mut self) {
        self.shared.knowledge.count(&std::mem::take(&mut self.stats));
    }

    /// A copy of the predictor's tables with what has been learned so far.
    pub fn model(&self) -> Result<Model, MemoryFull> {
        self.model.to_model()
    }

    /// Bytes of memory that the sequence holds, what it shares with forks included.
    pub fn memory_bytes(&self) -> usize {
        let (own, shared) = self.index.memory_bytes();
        self.model.memory_bytes()
            + own
            + shared
            + self.past.capacity() * size_of::<Aligned>()
            + self.other_bytes()
    }

    /// Bytes of the last draft, and of what does not grow. Weights are charged by themselves.
    fn other_bytes(&self) -> usize {
        let end_tokens = self.end_tokens.as_deref().map_or(0, size_of_val);
        let trust = self.trust.as_ref().map_or(0, |_| size_of::<Trust>());
        size_of::<Self>() + end_tokens + trust + Recent::MOST_BYTES + self.predictor.memory_bytes()
    }

    /// Charges what is held alone.
    fn reserve(&mut self) -> Result<(), MemoryFull> {
        self.reservation.try_resize(self.own_bytes())
    }

    fn own_bytes(&self) -> usize {
        let past = self.past.capacity() * size_of::<Aligned>();
        self.index.memory_bytes().0 + past + self.other_bytes()
    }

    /// Bytes charged to the sequence alone.
    pub fn charged_bytes(&self) -> usize {
        self.reservation.bytes()
    }

    /// Compares what is held with what it should be, in time proportional to the square of the length or more.
    pub fn check(&self) -> Result<(), String> {
        self.index.check()?;
        let bytes = self.own_bytes();
        if self.reservation.bytes() != bytes {
            return Err(format!("{} bytes are charged for {bytes}", self.reservation.bytes()));
        }
        if self.committed > self.tokens().len() || self.past.len() > self.tokens().len() {
            return Err("more tokens are committed or followed than there are".into());
        }
        Ok(())
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.count();
        *lock(&self.shared.last_end) = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryPool;
    use crate::ranking::bilinear::LogBilinear;
    use crate::ranking::bilinear::tests::Noise;
    use crate::ranking::network::Network;
    use crate::ranking::stage::tests::network;
    use crate::{Common, Corpus, Match};
    use proptest::prelude::*;

    /// A corpus in which much follows everything: few samples, long lists, sums above 1 now and then, and tables for
    /// ranking that look random, if it has some.
    #[derive(Default)]
    struct Plenty(Option<Noise>);

    impl Corpus for Plenty {
        fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
            let last = context.last().map_or(0, |&token| u64::from(token));
            let length = (last as usize % 3 + 1).min(context.len()).min(max_length) as u32;
            let samples = (last as usize + 1).min(max_samples) as u64;
            out.extend((0..samples).map(|n| Match {
                position: last * 5 + n * n,
                length,
                weight: 1.5,
                domain: 0,
            }));
        }

        fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
            out.iter_mut().zip(position..).for_each(|(token, at)| *token = (at * at / 3 % 6) as Token);
            out.len()
        }

        fn successors(&self, token: Token, out: &mut Vec<(Token, f32)>) {
            let shares = [0.4, 0.2, 0.1, 0.08, 0.05, 0.04];
            out.extend((0..6).zip(shares).map(|(n, share)| ((token * 2 + n) % 6, share)));
            out.extend((6..32).map(|n| (token + 10 * n, 0.003)));
        }

        fn tables(&self) -> Option<&dyn LogBilinear> {
            self.0.as_ref().map(|tables| tables as &dyn LogBilinear)
        }
    }

    /// Of a drafter with this store and a network that looks random.
    fn common(store: Option<Plenty>, pool: &Arc<MemoryPool>) -> Arc<Common> {
        let store = store.map(|store| Arc::new(store) as Arc<dyn Corpus>);
        Arc::new(Common::new(vec![7], store, pool).with_network(Some(Arc::new(network(1)))))
    }

    fn namespace() -> Namespace {
        let pool = Arc::new(MemoryPool::new(usize::MAX));
        Namespace::new(&"".into(), &Arc::new(Common::new(vec![7], None, &pool)), 0, 0, 0).unwrap()
    }

    fn begin(namespace: &Namespace, pool: &Arc<MemoryPool>, prompt: &[Token]) -> Sequence {
        Sequence::begin(namespace, prompt, &[], Reservation::new(pool, usize::MAX)).unwrap()
    }

    proptest! {
        /// What was taken back leaves no trace, and forks draft what their history says.
        #[test]
        fn truncated_and_forked_sequences_draft_like_new_ones(
            prompt in prop::collection::vec(0u32..8, 0..150),
            operations in prop::collection::vec((0usize..4, 0usize..4, prop::collection::vec(0u32..8, 0..100)), 0..12),
        ) {
            let pool = Arc::new(MemoryPool::new(usize::MAX));
            let common = common(Some(Plenty(Some(Noise::new(60)))), &pool);
            let namespace = Namespace::new(&"".into(), &common, 0, 0, 0).unwrap();
            let mut family = vec![(begin(&namespace, &pool, &prompt), prompt.len(), prompt)];
            for (member, kind, tokens) in operations {
                let at = member % family.len();
                let (sequence, prompt, history) = &mut family[at];
                match kind {
                    0 | 1 => {
                        sequence.extend(&tokens, None).unwrap();
                        history.extend(tokens);
                    }
                    2 => {
                        history.truncate(history.len().saturating_sub(tokens.len()));
                        *prompt = history.len().min(*prompt);
                        sequence.truncate(history.len()).unwrap();
                    }
                    _ => {
                        let fork = (sequence.fork().unwrap(), *prompt, history.clone());
                        family.push(fork);
                    }
                }
                for (sequence, prompt, history) in &mut family {
                    prop_assert_eq!(sequence.check(), Ok(()));
                    let mut twin = begin(&namespace, &pool, &history[..*prompt]);
                    twin.extend(&history[*prompt..], None).unwrap();
                    let limits = Limits { max_nodes: 20, max_depth: 3, ..Limits::DEFAULT };
                    prop_assert_eq!(sequence.draft(limits), twin.draft(limits));
                    sequence.predictor.forget();
                }
            }
            drop((family, namespace, common));
            prop_assert_eq!(pool.used(), 0);
        }

        /// Whatever speaks for its nodes, a draft that is cut is the draft of that size, and teaches the same.
        #[test]
        fn a_cut_draft_is_a_smaller_one(
            tokens in prop::collection::vec(0u32..6, 1..200), most in 0usize..80, cut in 0usize..40, store: bool, feedback: bool,
            live: bool, later: bool, ranking: bool, predicted in 0usize..20,
        ) {
            let pool = Arc::new(MemoryPool::new(usize::MAX));
            let (prompt, output) = tokens.split_at(tokens.len() / 2);
            let [mut one, mut two] = [(); 2].map(|()| {
                let store = store.then(|| Plenty(ranking.then(|| Noise::new(60))));
                let common = common(store, &pool);
                let namespace = Namespace::new(&"".into(), &common, if live { 1 << 16 } else { 0 }, 1 << 16, 0).unwrap();
                assert!(begin(&namespace, &pool, &tokens).finish(&mut || false));
                Sequence::begin(&namespace, prompt, &output[..predicted.min(output.len())], Reservation::new(&pool, usize::MAX)).unwrap()
            });
            for output in output.chunks(4) {
                one.start_draft(Limits::nodes(most), most);
                let grown = one.predictor.tree().len();
                let cut = cut.min(most);
                if later {
                    one.end_draft(most);
                    one.cut_draft(cut);
                } else {
                    one.end_draft(cut);
                }
                // all there is: nothing was left unexpanded for want of nodes
                let size = if grown < most && cut >= grown { 80 } else { cut };
                prop_assert_eq!(one.tree(), two.draft(Limits::nodes(size)));
                let ids: Vec<_> = output.iter().flat_map(|&token| (0..8).map(move |n| (token + n * n) % 6)).collect();
                let probs: Vec<_> = output.iter().flat_map(|_| [0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01]).collect();
                let top = feedback.then_some(TopK { k: 8, ids: &ids, probs: &probs });
                let outcome = one.extend(output, top).unwrap();
                prop_assert_eq!(outcome, two.extend(output, top).unwrap());
                prop_assert!(one.model().unwrap() == two.model().unwrap());
                if let Some(Outcome { drafted, accepted }) = outcome {
                    prop_assert!(drafted.is_some_and(|nodes| accepted <= nodes && nodes <= cut));
                }
            }
        }
    }

    #[test]
    fn ranking_changes_nothing_where_it_is_off_or_has_no_tables() {
        let text: Vec<Token> = (0..120).map(|at| at * at % 6).collect();
        let trees = |tables: bool, network: Option<Network>, ranking: bool| {
            let pool = Arc::new(MemoryPool::new(usize::MAX));
            let store: Arc<dyn Corpus> = Arc::new(Plenty(tables.then(|| Noise::new(60))));
            let common = Common::new(vec![7], Some(store), &pool).with_network(network.map(Arc::new));
            let namespace = Namespace::new(&"".into(), &Arc::new(common), 0, 0, 0).unwrap();
            let mut sequence = begin(&namespace, &pool, &text[..20]);
            let mut trees = Vec::new();
            for part in text[20..].chunks(3) {
                trees.push(sequence.draft(Limits { ranking, ..Limits::nodes(24) }).clone());
                sequence.extend(part, None).unwrap();
            }
            trees
        };
        let without = trees(false, None, false);
        assert_eq!(trees(true, Some(network(1)), false), without);
        assert_eq!(trees(true, None, true), without);
        assert_eq!(trees(false, Some(network(1)), true), without);
        let ranked = trees(true, Some(network(1)), true);
        assert!(ranked != without && ranked != trees(true, Some(network(2)), true));
        assert_eq!(ranked, trees(true, Some(network(1)), true));
    }

    #[test]
    fn the_topic_is_that_of_the_text_as_it_is() {
        let pool = Arc::new(MemoryPool::new(usize::MAX));
        let common = common(Some(Plenty(Some(Noise::new(60)))), &pool);
        let namespace = Namespace::new(&"".into(), &common, 0, 0, 0).unwrap();
        let [one, other]: [Vec<Token>; 2] = [3, 5].map(|step| (0..64).map(|at| at * step % 6).collect());
        let mut sequence = begin(&namespace, &pool, &one);
        sequence.draft(Limits::nodes(24));
        sequence.truncate(0).unwrap();
        sequence.prefill(&other).unwrap();
        assert_eq!(
            sequence.draft(Limits::nodes(24)),
            begin(&namespace, &pool, &other).draft(Limits::nodes(24))
        );
    }

    #[test]
    fn a_full_memory_refuses_and_changes_nothing() {
        let (namespace, tokens) =
            (namespace(), (0..5000).map(|token| token * token % 4999).collect::<Vec<_>>());
        let pool = Arc::new(MemoryPool::new(400_000));
        let reservation = || Reservation::new(&pool, usize::MAX);
        assert!(Sequence::begin(&namespace, &vec![3; 100_000], &[], reservation()).is_err());
        assert_eq!(pool.used(), 0);
        let mut sequence = Sequence::begin(&namespace, &tokens[..1000], &[], reservation()).unwrap();
        let mut forks = Vec::new();
        while let Ok(fork) = sequence.fork() {
            forks.push(fork);
        }
        assert!(!forks.is_empty() && pool.used() <= pool.limit());
        assert_eq!(sequence.check(), Ok(()));
        sequence.draft(Limits::nodes(1024));
        assert_eq!(sequence.check(), Ok(()));
        drop(forks);
        assert!(sequence.extend(&tokens, None).is_err());
        assert_eq!(sequence.tokens(), &tokens[..1000]);
        assert_eq!(sequence.check(), Ok(()));
        assert!(pool.peak() <= pool.limit() && pool.refused() >= 3);
        drop(sequence);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn nothing_is_drafted_beyond_the_longest_length() {
        let (namespace, pool) = (namespace(), Arc::new(MemoryPool::new(usize::MAX)));
        let mut sequence = begin(&namespace, &pool, &[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1]);
        for (max_length, depth) in [(16, 4), (14, 2), (13, 1), (12, 0), (11, 0), (5, 0)] {
            sequence.set_max_length(max_length);
            let tree = sequence.draft(Limits::nodes(32));
            assert_eq!(tree.depths.iter().max().copied().unwrap_or(0), depth);
        }
    }
}
