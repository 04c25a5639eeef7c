//! What requests learn from one another: the live store, the target's distributions, the predictor's weights,
//! and how the sources fared.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::live::LiveStore;
use crate::model::{Model, source};
use crate::soft::SoftTable;

/// Shared by the requests that may know of one another.
pub struct Knowledge {
    pub(crate) live: LiveStore,
    pub(crate) soft: SoftTable,
    model: Mutex<Arc<Model>>,
    stats: Mutex<Stats>,
}

/// How drafts fared, by source.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Drafts whose outcome is known.
    pub drafts: u64,
    /// In the order of [`crate::SOURCES`].
    pub sources: [SourceStats; source::COUNT],
}

/// How the nodes fared to whose probability one source contributed most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SourceStats {
    /// Nodes drafted.
    pub drafted: u64,
    /// Nodes accepted.
    pub accepted: u64,
    /// Sum of their probabilities: how many were expected to be accepted.
    pub predicted: f64,
}

impl Stats {
    /// Adds the counts of others.
    pub fn add(&mut self, other: &Self) {
        self.drafts += other.drafts;
        for (own, other) in self.sources.iter_mut().zip(&other.sources) {
            own.drafted += other.drafted;
            own.accepted += other.accepted;
            own.predicted += other.predicted;
        }
    }
}

impl Knowledge {
    /// Knows nothing but the weights; `live_bytes` and `soft_bytes` limit what it can come to know.
    pub fn new(model: Model, live_bytes: usize, soft_bytes: usize) -> Self {
        Self {
            live: LiveStore::new(live_bytes),
            soft: SoftTable::new(soft_bytes),
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
        self.live.most_bytes() + self.soft.most_bytes() + lock(&self.model).memory_bytes()
    }

    /// Bytes of memory held.
    pub fn memory_bytes(&self) -> usize {
        self.live.memory_bytes() + self.soft.memory_bytes() + lock(&self.model).memory_bytes()
    }
}

/// What is behind these locks is whole after every statement, whoever panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
