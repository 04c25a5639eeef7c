//! Counters and histograms: a handful of relaxed additions per call.

use std::time::Duration;

use sssd_core::Outcome;

use crate::sync::atomic::{AtomicU64, Ordering};

/// Counts by powers of two: bucket `i` holds values below `2^i` that no earlier bucket holds.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; Histogram::BUCKETS],
    sum: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; Self::BUCKETS], sum: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Number of buckets; the last one takes everything else.
    pub const BUCKETS: usize = 32;

    /// Adds one value.
    pub fn add(&self, value: u64) {
        self.buckets[Self::bucket(value)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    fn bucket(value: u64) -> usize {
        ((u64::BITS - value.leading_zeros()) as usize).min(Self::BUCKETS - 1)
    }

    /// Counts by bucket, and the sum of all values.
    pub fn read(&self) -> ([u64; Self::BUCKETS], u64) {
        let counts = std::array::from_fn(|at| self.buckets[at].load(Ordering::Relaxed));
        (counts, self.sum.load(Ordering::Relaxed))
    }
}

/// Why a request that was asked for a draft got an empty one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Undrafted {
    /// The caller allowed no node, or all went to other requests.
    Budget,
    /// By the rule or the costs no node pays.
    Unprofitable,
    /// Its prompt is still being read in the background.
    Indexing,
    /// No source knew a continuation, or the text is over.
    NoMatch,
}

impl Undrafted {
    /// All of them, in the order of [`Metrics::undrafted`].
    pub const ALL: [Self; 4] = [Self::Budget, Self::Unprofitable, Self::Indexing, Self::NoMatch];

    /// Its name for those who read counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Budget => "budget",
            Self::Unprofitable => "unprofitable",
            Self::Indexing => "indexing",
            Self::NoMatch => "no_match",
        }
    }

    /// Why nothing was drafted although no error was met.
    ///
    /// `allowed` are the nodes that the caller allowed, and those that the rule left of them; `found` those that were there
    /// before the draft was cut, if the prompt was read; `priced` whether a rule or costs have cut it.
    pub(crate) fn why(allowed: (usize, usize), found: Option<usize>, priced: bool) -> Self {
        match (allowed, found) {
            (_, None) => Self::Indexing,
            ((0, _), _) => Self::Budget,
            ((_, 1..), Some(0)) => Self::NoMatch,
            _ if priced => Self::Unprofitable,
            _ => Self::Budget,
        }
    }
}

/// What a drafter has done.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests begun, finished (their knowledge kept), closed or dropped by a panic.
    pub begun: AtomicU64,
    /// Requests whose knowledge was kept.
    pub finished: AtomicU64,
    /// Requests that panicked.
    pub failed: AtomicU64,
    /// Tokens appended.
    pub tokens: AtomicU64,
    /// Nodes of each draft whose outcome is known.
    pub nodes: Histogram,
    /// Nodes that each extension after a draft went along.
    pub accepted: Histogram,
    /// Nanoseconds of each single draft.
    pub draft_ns: Histogram,
    /// Nanoseconds of each batch call.
    pub step_ns: Histogram,
    /// Requests of each batch call.
    pub batch: Histogram,
    /// Empty drafts, in the order of [`Undrafted::ALL`].
    pub undrafted: [AtomicU64; Undrafted::ALL.len()],
}

impl Metrics {
    /// Adds to a counter.
    pub fn count(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }

    /// Counts what has become known of drafts.
    pub(crate) fn outcomes(&self, outcomes: impl IntoIterator<Item = Outcome>) {
        for Outcome { drafted, accepted } in outcomes {
            drafted.iter().for_each(|&nodes| self.nodes.add(nodes as u64));
            self.accepted.add(accepted as u64);
        }
    }

    /// Counts a draft that is empty.
    pub(crate) fn empty_draft(&self, why: Undrafted) {
        Self::count(&self.undrafted[why as usize], 1);
    }

    /// Adds a time.
    pub fn time(histogram: &Histogram, time: Duration) {
        histogram.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_draft_has_one_reason() {
        for (allowed, found, priced, why) in [
            ((4, 4), None, false, Undrafted::Indexing),
            ((0, 0), None, true, Undrafted::Indexing),
            ((0, 0), Some(0), false, Undrafted::Budget),
            ((4, 0), Some(0), false, Undrafted::Budget),
            ((4, 4), Some(3), false, Undrafted::Budget),
            ((4, 0), Some(0), true, Undrafted::Unprofitable),
            ((4, 4), Some(3), true, Undrafted::Unprofitable),
            ((4, 4), Some(0), true, Undrafted::NoMatch),
        ] {
            assert_eq!(Undrafted::why(allowed, found, priced), why, "{allowed:?} {found:?} {priced}");
        }
        assert!(Undrafted::ALL.iter().enumerate().all(|(at, &why)| why as usize == at));
    }

    #[test]
    fn values_are_counted_by_powers_of_two() {
        let histogram = Histogram::default();
        for value in [0, 1, 2, 3, 4, u64::MAX >> 1] {
            histogram.add(value);
        }
        let (counts, sum) = histogram.read();
        assert_eq!((&counts[..4], counts[Histogram::BUCKETS - 1]), (&[1, 1, 2, 1][..], 1));
        assert_eq!(sum, 10 + (u64::MAX >> 1));
    }
}
