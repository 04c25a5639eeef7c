//! What sequences share: the datastore, the end tokens, and what requests learn from one another: the live store, the
//! target's distributions, the predictor's weights, and how the sources fared.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::memory::{MemoryFull, Reservation};
use crate::predictor::arena::Scratch;
use crate::predictor::weights::Model;
use crate::sources::feedback::FeedbackTable;
use crate::sources::live::LiveStore;
use crate::sources::seqlock::WORDS as FEEDBACK_WORDS;
use crate::stats::Stats;
use crate::{Corpus, Token};

/// What the sequences of one tenant share: nothing goes from one namespace to another but the datastore.
pub struct Namespace {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub end_tokens: Vec<Token>,
    pub store: Option<Arc<dyn Corpus>>,
    pub knowledge: Knowledge,
    /// For those who draft at the same time.
    pub scratch: Mutex<Vec<Scratch>>,
    /// When the last sequence of it ended, or it was made.
    pub last_end: Mutex<Instant>,
    /// Pays for the knowledge.
    _reservation: Reservation,
}

impl Namespace {
    /// A namespace that drafts nothing after an end token. `reservation` pays for the knowledge.
    pub fn new(
        end_tokens: Vec<Token>,
        store: Option<Arc<dyn Corpus>>,
        knowledge: Knowledge,
        mut reservation: Reservation,
    ) -> Result<Self, MemoryFull> {
        reservation.try_resize(knowledge.most_bytes())?;
        Ok(Self {
            shared: Arc::new(Shared {
                end_tokens,
                store,
                knowledge,
                scratch: Mutex::default(),
                last_end: Mutex::new(Instant::now()),
                _reservation: reservation,
            }),
        })
    }

    /// Bytes that what its sequences share may come to.
    pub fn most_bytes(&self) -> usize {
        self.shared.knowledge.most_bytes()
    }

    /// The documents of the live store, oldest first, and how often each was of use lately.
    pub fn documents(&self) -> Vec<(Vec<Token>, u32)> {
        self.shared.knowledge.live.documents()
    }

    /// What the target held probable, as entries of a table, with their places.
    pub fn feedback_entries(&self) -> Vec<(u64, [u64; FEEDBACK_WORDS])> {
        self.shared.knowledge.feedback.entries()
    }

    /// Takes over what another namespace has learned. Entries from a table of another size are of no use, and those with
    /// tokens from `limit` on are left out.
    pub fn restore(
        &self,
        model: Model,
        documents: &[(Vec<Token>, u32)],
        feedback: &[(u64, [u64; FEEDBACK_WORDS])],
        limit: Token,
    ) {
        self.set_model(model);
        self.shared.knowledge.live.restore(documents);
        self.shared.knowledge.feedback.restore(feedback, limit);
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        Arc::strong_count(&self.shared) - 1
    }

    /// When the last sequence ended, or the namespace was made.
    pub fn last_end(&self) -> Instant {
        *lock(&self.shared.last_end)
    }

    /// Tokens after which nothing is drafted.
    pub fn end_tokens(&self) -> &[Token] {
        &self.shared.end_tokens
    }

    /// The weights that the next sequence starts with.
    pub fn model(&self) -> Arc<Model> {
        self.shared.knowledge.model()
    }

    /// Replaces the weights that sequences start with.
    pub fn set_model(&self, model: Model) {
        self.shared.knowledge.set_model(model);
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

/// Shared by the requests that may know of one another.
pub struct Knowledge {
    pub(crate) live: LiveStore,
    pub(crate) feedback: FeedbackTable,
    model: Mutex<Arc<Model>>,
    stats: Mutex<Stats>,
}

impl Knowledge {
    /// Knows nothing but the weights; `live_bytes` and `soft_bytes` limit what it can come to know.
    pub fn new(model: Model, live_bytes: usize, soft_bytes: usize) -> Self {
        Self {
            live: LiveStore::new(live_bytes),
            feedback: FeedbackTable::new(soft_bytes),
            model: Mutex::new(Arc::new(model)),
            stats: Mutex::default(),
        }
    }

    /// The weights that the next sequence starts with.
    pub fn model(&self) -> Arc<Model> {
        Arc::clone(&lock(&self.model))
    }

    /// Replaces the weights that sequences start with.
    pub fn set_model(&self, model: Model) {
        *lock(&self.model) = Arc::new(model);
    }

    /// Takes over what a request has learned since it started from `base`.
    pub(crate) fn learn(&self, base: &Arc<Model>, learned: &Arc<Model>) {
        if !Arc::ptr_eq(base, learned) {
            Arc::make_mut(&mut lock(&self.model)).merge(base, learned);
        }
    }

    /// How the drafts of finished and running requests fared; those of running ones are counted with a delay.
    pub fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    pub(crate) fn count(&self, stats: &Stats) {
        lock(&self.stats).add(stats);
    }

    /// Bytes of memory that it may come to hold.
    pub fn most_bytes(&self) -> usize {
        self.live.most_bytes() + self.feedback.most_bytes() + lock(&self.model).memory_bytes()
    }

    /// Bytes of memory held.
    pub fn memory_bytes(&self) -> usize {
        self.live.memory_bytes() + self.feedback.memory_bytes() + lock(&self.model).memory_bytes()
    }
}

/// What is behind these locks is whole after every statement, whoever panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
