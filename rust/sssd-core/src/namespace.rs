//! What sequences share: the datastore, the end tokens, and what requests learn from one another: the live store, the
//! target's distributions, the predictor's weights, and how the sources fared.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use crate::memory::{MemoryFull, MemoryPool, Reservation};
use crate::predictor::arena::Scratch;
use crate::predictor::guest::Trust;
use crate::predictor::overlay::Overlay;
use crate::predictor::weights::{Model, Weights, WeightsError};
use crate::ranking::network::Network;
use crate::sources::corpus::StoreSlot;
use crate::sources::feedback::FeedbackTable;
use crate::sources::live::LiveStore;
use crate::sources::seqlock::WORDS as FEEDBACK_WORDS;
use crate::stats::Stats;
use crate::sync::lock;
use crate::{Corpus, MAX_TOKEN, Token};

/// What all namespaces of a drafter have in common.
pub struct Common {
    end_tokens: Vec<Token>,
    /// What sequences match that do not choose.
    store: Arc<StoreSlot>,
    /// Whether the store was readable when it was last looked at.
    readable: AtomicBool,
    /// What ranks candidates, where the store has tables for it.
    network: Option<Arc<Network>>,
    pool: Arc<MemoryPool>,
    /// For those who draft at the same time, each with what pays for it.
    scratch: Mutex<Vec<(Box<Scratch>, Reservation)>>,
}

impl Common {
    /// For drafters that draft nothing after an end token and match `store`. What they hold is charged to `pool`.
    pub fn new(end_tokens: Vec<Token>, store: Option<Arc<dyn Corpus>>, pool: &Arc<MemoryPool>) -> Self {
        let readable = AtomicBool::new(true);
        let store = Arc::new(StoreSlot::new(store));
        let (network, pool) = (Network::shipped(), Arc::clone(pool));
        Self { end_tokens, store, readable, network, pool, scratch: Mutex::default() }
    }

    /// The same, with another network for ranking candidates, or none.
    pub fn with_network(self, network: Option<Arc<Network>>) -> Self {
        Self { network, ..self }
    }

    pub(crate) fn network(&self) -> Option<&Network> {
        self.network.as_deref()
    }

    /// Looks whether the store can be read, as is to be done before every draft or step: until the next time drafts go
    /// with it or without.
    pub fn look_at_store(&self) {
        let readable = self.store.corpus().is_none_or(|store| store.is_readable());
        self.readable.store(readable, Ordering::Relaxed);
    }

    /// What sequences match that do not choose: all that others can choose from.
    pub fn store(&self) -> &Arc<StoreSlot> {
        &self.store
    }

    /// What is in a slot, if it can be read.
    pub(crate) fn readable(&self, slot: &Arc<StoreSlot>) -> Option<Arc<dyn Corpus>> {
        let store = slot.corpus()?;
        let whole = self.readable.load(Ordering::Relaxed);
        (whole || !Arc::ptr_eq(slot, &self.store) && store.is_readable()).then_some(store)
    }

    /// Runs `work` with memory that drafts use one after the other.
    pub(crate) fn with_scratch(&self, work: impl FnOnce(&mut Scratch)) {
        let kept = lock(&self.scratch).pop();
        let (mut scratch, mut paid) =
            kept.unwrap_or_else(|| (Box::default(), Reservation::shared(&self.pool)));
        work(&mut scratch);
        if paid.try_resize(scratch.memory_bytes()).is_ok() {
            lock(&self.scratch).push((scratch, paid));
        }
    }
}

/// What the sequences of one tenant share: nothing goes from one namespace to another but the datastore.
pub struct Namespace {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub name: Arc<str>,
    pub common: Arc<Common>,
    pub knowledge: Knowledge,
    /// When the last sequence of it ended, or it was made.
    pub last_end: Mutex<Instant>,
    /// Pays for the rest.
    _paid: Reservation,
}

impl Shared {
    pub fn end_tokens(&self) -> &[Token] {
        &self.common.end_tokens
    }
}

impl Namespace {
    /// A namespace that knows nothing but the weights that ship. `live_bytes` and `soft_bytes` limit what it can come to
    /// know, which is charged as it grows; `bytes` are charged from the start beside its own.
    pub fn new(
        name: &Arc<str>,
        common: &Arc<Common>,
        live_bytes: usize,
        soft_bytes: usize,
        bytes: usize,
    ) -> Result<Self, MemoryFull> {
        let mut paid = Reservation::shared(&common.pool);
        paid.try_resize(size_of::<Shared>() + size_of::<Trust>() + bytes)?;
        Ok(Self {
            shared: Arc::new(Shared {
                name: Arc::clone(name),
                common: Arc::clone(common),
                knowledge: Knowledge::new(live_bytes, soft_bytes, &paid),
                last_end: Mutex::new(Instant::now()),
                _paid: paid,
            }),
        })
    }

    /// Calls `act` with the documents of the live store, oldest first, and how often each was of use lately.
    pub fn for_each_document<E: From<MemoryFull>>(
        &self,
        act: impl FnMut(&[Token], u32) -> Result<(), E>,
    ) -> Result<(), E> {
        self.shared.knowledge.live.for_each_document(act)
    }

    /// Calls `act` with what the target held probable, as entries of a table.
    pub fn for_each_feedback<E>(
        &self,
        act: impl FnMut(&[u64; FEEDBACK_WORDS]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.shared.knowledge.feedback.for_each_entry(act)
    }

    /// Learns a text that was decoded elsewhere, as from a request that finished here. Between parts of it `interrupted`
    /// is asked whether to leave it at that; false if it was.
    pub fn learn(&self, tokens: &[Token], interrupted: &mut dyn FnMut() -> bool) -> bool {
        self.shared.knowledge.learn_text(tokens, interrupted)
    }

    /// Takes over a document of another live store.
    pub fn restore_document(&self, tokens: &[Token], used: u32) {
        self.shared.knowledge.live.restore(tokens, used);
    }

    /// How many entries what the target held probable has.
    pub fn feedback_len(&self) -> usize {
        self.shared.knowledge.feedback.len()
    }

    /// Makes room for so many entries, before the first of them is taken over.
    pub fn expect_feedback(&self, entries: usize) {
        self.shared.knowledge.feedback.expect(entries);
    }

    /// Takes over what another target held probable, unless there are tokens from `limit` on.
    pub fn restore_feedback(&self, words: &[u64; FEEDBACK_WORDS], limit: Token) {
        self.shared.knowledge.feedback.restore(words, limit);
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        Arc::strong_count(&self.shared) - 1
    }

    /// Whether no sequence uses it and none has taught it anything.
    pub fn is_empty(&self) -> bool {
        let Knowledge { live, feedback, model, trust, .. } = &self.shared.knowledge;
        let unlearned = live.len().1 == 0 && feedback.is_empty() && lock(model).charged_bytes() == 0;
        let unlearned = unlearned && Arc::ptr_eq(&lock(trust), initial_trust());
        self.sequences() == 0 && unlearned
    }

    /// When the last sequence ended, or the namespace was made.
    pub fn last_end(&self) -> Instant {
        *lock(&self.shared.last_end)
    }

    /// Tokens after which nothing is drafted.
    pub fn end_tokens(&self) -> &[Token] {
        self.shared.end_tokens()
    }

    /// Calls `act` with the weights that the next sequence starts with.
    pub fn with_model<T>(&self, act: impl FnOnce(&Model) -> T) -> T {
        act(&self.shared.knowledge.model())
    }

    /// Replaces the weights that sequences start with by those of [`Model::to_bytes`].
    pub fn set_weights(&self, bytes: &[u8]) -> Result<(), WeightsError> {
        if Model::is_shipped(bytes) {
            self.reset_model();
            return Ok(());
        }
        Ok(self.shared.knowledge.set_model(Model::from_bytes(bytes)?)?)
    }

    /// Goes back to the weights that ship.
    pub fn reset_model(&self) {
        *lock(&self.shared.knowledge.model) = Weights::shipped();
    }

    /// How drafts fared, by source.
    pub fn stats(&self) -> Stats {
        self.shared.knowledge.stats()
    }

    /// Tokens and documents in the live store.
    pub fn live_len(&self) -> (usize, usize) {
        self.shared.knowledge.live.len()
    }

    /// Bytes of memory that requests share, the datastore not counted.
    pub fn memory_bytes(&self) -> usize {
        self.shared.knowledge.memory_bytes()
    }
}

/// The trust in drafts from outside before there were any.
fn initial_trust() -> &'static Arc<Trust> {
    static INITIAL: OnceLock<Arc<Trust>> = OnceLock::new();
    INITIAL.get_or_init(Arc::default)
}

/// Shared by the requests that may know of one another.
pub(crate) struct Knowledge {
    pub live: LiveStore,
    pub feedback: FeedbackTable,
    model: Mutex<Arc<Weights>>,
    trust: Mutex<Arc<Trust>>,
    stats: Mutex<Stats>,
    /// Where what is learned is charged.
    paid: Reservation,
}

impl Knowledge {
    fn new(live_bytes: usize, soft_bytes: usize, paid: &Reservation) -> Self {
        Self {
            live: LiveStore::new(live_bytes, paid.new_empty()),
            feedback: FeedbackTable::new(soft_bytes, paid.new_empty()),
            model: Mutex::new(Weights::shipped()),
            trust: Mutex::new(Arc::clone(initial_trust())),
            stats: Mutex::default(),
            paid: paid.new_empty(),
        }
    }

    /// The weights that the next sequence starts with.
    pub fn model(&self) -> Arc<Weights> {
        Arc::clone(&lock(&self.model))
    }

    fn set_model(&self, model: Model) -> Result<(), MemoryFull> {
        let weights = Weights::new(model, self.paid.new_empty())?;
        *lock(&self.model) = weights;
        Ok(())
    }

    /// Takes over what a request has learned, if there is memory for it.
    pub fn learn(&self, learned: &Overlay) {
        if learned.has_learned()
            && let Ok(model) = Weights::own(&mut lock(&self.model), self.paid.new_empty())
        {
            learned.merge_into(model);
        }
    }

    /// How far the next sequence trusts drafts from outside.
    pub fn trust(&self) -> Arc<Trust> {
        Arc::clone(&lock(&self.trust))
    }

    /// Takes over what a request has learned of drafts from outside since it started from `base`.
    pub fn learn_trust(&self, base: &Trust, learned: &Trust) {
        let mut shared = lock(&self.trust);
        let mut trust = **shared;
        trust.merge(base, learned);
        *shared = Arc::new(trust);
    }

    /// Gives a text to the live store. False if it was interrupted.
    pub fn learn_text(&self, tokens: &[Token], interrupted: &mut dyn FnMut() -> bool) -> bool {
        // no document crosses a placeholder
        let mut parts = tokens.split(|&token| token > MAX_TOKEN);
        parts.all(|part| self.live.commit(part, interrupted))
    }

    /// How the drafts of finished and running requests fared; those of running ones are counted with a delay.
    pub fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    pub fn count(&self, stats: &Stats) {
        lock(&self.stats).add(stats);
    }

    /// Bytes of memory held.
    pub fn memory_bytes(&self) -> usize {
        self.live.memory_bytes() + self.feedback.memory_bytes() + lock(&self.model).charged_bytes()
    }
}
