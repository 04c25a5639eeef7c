//! What the target itself held probable: its most probable next tokens, by the last few tokens before them.
//!
//! One table serves all requests of a drafter, without locks.

use std::sync::OnceLock;

use crate::index::Hash;
use crate::sources::seqlock::{self, WORDS};
use crate::sync::{AtomicU64, Ordering};
use crate::{MAX_TOKEN, Token};

/// Numbers of last tokens by which entries are found, shortest first.
pub const FEEDBACK_ORDERS: [usize; 4] = [1, 2, 3, 5];
/// Tokens kept of each distribution.
pub const TOP_K: usize = 8;

/// Entries that share a bucket: an entry lives in the one of them that was written least recently.
const WAYS: usize = 4;
// Words of an entry: state, TOP_K tokens of 32 bits, TOP_K probabilities of 16 bits, and the time of writing.
const TIME: usize = WORDS - 1;
const SCALE: f32 = 65535.0;

/// The target's most probable next tokens, for several positions: `k` ids and probabilities each.
#[derive(Clone, Copy)]
pub struct TopK<'a> {
    /// Tokens of each position.
    pub k: usize,
    /// Their ids, position after position.
    pub ids: &'a [Token],
    /// Their probabilities, likewise.
    pub probs: &'a [f32],
}

impl<'a> TopK<'a> {
    /// The most probable tokens of one position, in order.
    pub(crate) fn best(&self, row: usize) -> Best {
        let range = row * self.k..(row + 1) * self.k;
        let mut best = Best { tokens: [(0, 0.0); TOP_K], count: 0 };
        let given = self.ids[range.clone()].iter().zip(&self.probs[range]);
        for (&id, &prob) in given.filter(|&(_, &prob)| prob > 0.0) {
            let held = &best.tokens[..best.count];
            if held.iter().any(|&(token, _)| token == id) {
                continue;
            }
            let place = held.iter().position(|&(_, held)| held < prob).unwrap_or(best.count);
            if place < TOP_K {
                best.count = (best.count + 1).min(TOP_K);
                best.tokens[place..best.count].rotate_right(1);
                best.tokens[place] = (id, prob);
            }
        }
        best
    }

    /// Number of positions.
    pub fn rows(&self) -> usize {
        self.ids.len().checked_div(self.k).unwrap_or(0)
    }
}

/// The most probable tokens of a position.
pub(crate) struct Best {
    tokens: [(Token, f32); TOP_K],
    count: usize,
}

impl Best {
    pub fn tokens(&self) -> &[(Token, f32)] {
        &self.tokens[..self.count]
    }
}

/// A distribution as read from the table, most probable token first.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distribution {
    pub ids: [Token; TOP_K],
    /// Zero from the first unused place on.
    pub probs: [f32; TOP_K],
    /// How often the entry was written, at most 255.
    pub writes: u8,
}

impl Distribution {
    /// Tokens and their probabilities, without the unused places.
    pub fn tokens(&self) -> impl Iterator<Item = (Token, f32)> {
        self.ids.into_iter().zip(self.probs).take_while(|&(_, prob)| prob > 0.0)
    }
}

/// Tokens that the target lately held probable and did not choose: it often says them next.
#[derive(Clone, Default)]
pub struct Recent {
    /// Most probable first: token and faded sum of its probabilities.
    pub tokens: Vec<(Token, f32)>,
}

/// Tokens kept, and how much of their probability is left after each further position.
const RECENT: usize = 32;
const FADING: f32 = 0.8;

impl Recent {
    /// Bytes that it may come to hold on the heap.
    pub const MOST_BYTES: usize = (RECENT + TOP_K).next_power_of_two() * size_of::<(Token, f32)>();

    /// Takes account of one position: what was probable, and what came.
    pub fn update(&mut self, probable: impl Iterator<Item = (Token, f32)>, came: Token) {
        self.tokens.iter_mut().for_each(|held| held.1 *= FADING);
        for (token, prob) in probable {
            match self.tokens.iter_mut().find(|held| held.0 == token) {
                Some(held) => held.1 += prob,
                None => self.tokens.push((token, prob)),
            }
        }
        self.tokens.retain(|held| held.0 != came);
        self.tokens.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
        self.tokens.truncate(RECENT);
    }
}

/// A bounded table of distributions. The memory is taken with the first entry.
pub struct FeedbackTable {
    slots: OnceLock<Box<[AtomicU64]>>,
    buckets: usize,
    clock: AtomicU64,
}

impl FeedbackTable {
    /// A table of at most `bytes` bytes; 0 keeps nothing.
    pub fn new(bytes: usize) -> Self {
        let buckets = bytes / (WAYS * WORDS * size_of::<u64>());
        Self { slots: OnceLock::new(), buckets, clock: AtomicU64::new(1) }
    }

    pub fn is_empty(&self) -> bool {
        self.slots.get().is_none()
    }

    /// Bytes that it may come to hold.
    pub fn most_bytes(&self) -> usize {
        self.buckets * WAYS * WORDS * size_of::<u64>()
    }

    pub fn memory_bytes(&self) -> usize {
        self.slots.get().map_or(0, |slots| slots.len() * size_of::<u64>())
    }

    /// The entries, each with its place, to be put into a table of the same size.
    pub fn entries(&self) -> Vec<(u64, [u64; WORDS])> {
        let entries = self.slots.get().map_or(&[][..], |slots| slots).chunks_exact(WORDS);
        let held = entries.zip(0..).filter_map(|(entry, place)| {
            let words = seqlock::read(entry).filter(|words| words[0] >> 32 != 0)?;
            Some((place, words))
        });
        held.collect()
    }

    /// Puts entries of another table of the same size where they were. Left out are those that have no place here
    /// or tokens from `limit` on.
    pub fn restore(&self, entries: &[(u64, [u64; WORDS])], limit: Token) {
        if self.buckets == 0 || entries.is_empty() {
            return;
        }
        let slots = self.slots();
        for (place, words) in entries {
            let Some(entry) = usize::try_from(*place).ok().and_then(|place| slots.get(place * WORDS..))
            else {
                continue;
            };
            if words[1..5].iter().any(|&pair| pair >> 32 >= u64::from(limit) || pair as u32 >= limit) {
                continue;
            }
            for (slot, &word) in entry.iter().zip(words) {
                slot.store(word, Ordering::Relaxed);
            }
            self.clock.fetch_max(words[TIME].saturating_add(1), Ordering::Relaxed);
        }
    }

    fn slots(&self) -> &[AtomicU64] {
        self.slots.get_or_init(|| (0..self.buckets * WAYS * WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    /// Remembers the target's distribution after `context`, which is given newest first.
    pub fn insert(&self, context: impl Iterator<Item = Token>, best: &Best) {
        if self.buckets == 0 {
            return;
        }
        let mut words = [0u64; WORDS];
        for (place, &(id, prob)) in best.tokens().iter().enumerate() {
            words[1 + place / 2] |= u64::from(id) << (32 * (place % 2));
            let prob = (prob * SCALE).round().max(1.0) as u64;
            words[5 + place / 4] |= prob << (16 * (place % 4));
        }
        words[TIME] = self.clock.fetch_add(1, Ordering::Relaxed);
        let slots = self.slots();
        for_each_order(context, |order, key| {
            write(&slots[self.bucket(key)..][..WAYS * WORDS], tag(order, key), &words);
        });
    }

    /// The distributions known for the ends of `context` (newest first), by order.
    pub fn find(
        &self,
        context: impl Iterator<Item = Token>,
        out: &mut [Option<Distribution>; FEEDBACK_ORDERS.len()],
    ) {
        *out = [None; FEEDBACK_ORDERS.len()];
        let Some(slots) = self.slots.get() else { return };
        for_each_order(context, |order, key| {
            out[order] = read(&slots[self.bucket(key)..][..WAYS * WORDS], tag(order, key));
        });
    }

    /// The first word of the bucket of `key`.
    fn bucket(&self, key: u64) -> usize {
        ((u128::from(key) * self.buckets as u128) >> 64) as usize * WAYS * WORDS
    }
}

/// Calls `act` with the key of each order that the context is long enough for.
fn for_each_order(context: impl Iterator<Item = Token>, mut act: impl FnMut(usize, u64)) {
    let mut hash = Hash::default();
    let (mut known, mut order) = (0, 0);
    let usual = |token: &Token| *token <= MAX_TOKEN;
    for token in context.take(FEEDBACK_ORDERS[FEEDBACK_ORDERS.len() - 1]).take_while(usual) {
        hash.add(token);
        known += 1;
        if FEEDBACK_ORDERS[order] == known {
            act(order, hash.wide());
            order += 1;
        }
    }
}

/// What tells a bucket's entries apart; never 0.
fn tag(order: usize, key: u64) -> u32 {
    ((key as u32) << 2 | order as u32).max(1)
}

fn write(bucket: &[AtomicU64], tag: u32, words: &[u64; WORDS]) {
    let entries = || bucket.chunks_exact(WORDS);
    let held = entries().find(|entry| seqlock::tag(entry) == tag);
    let oldest = || entries().min_by_key(|entry| entry[TIME].load(Ordering::Relaxed));
    if let Some(entry) = held.or_else(oldest) {
        seqlock::write(entry, tag, words);
    }
}

fn read(bucket: &[AtomicU64], tag: u32) -> Option<Distribution> {
    let entry = bucket.chunks_exact(WORDS).find(|entry| seqlock::tag(entry) == tag)?;
    let words = seqlock::read(entry).filter(|words| (words[0] >> 32) as u32 == tag)?;
    let mut found = Distribution { writes: seqlock::writes(&words), ..Distribution::default() };
    for place in 0..TOP_K {
        found.ids[place] = (words[1 + place / 2] >> (32 * (place % 2))) as u32;
        found.probs[place] = f32::from((words[5 + place / 4] >> (16 * (place % 4))) as u16) / SCALE;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(table: &FeedbackTable, context: &[Token]) -> [Option<Distribution>; FEEDBACK_ORDERS.len()] {
        let mut out = [None; FEEDBACK_ORDERS.len()];
        table.find(context.iter().rev().copied(), &mut out);
        out
    }

    fn insert(table: &FeedbackTable, context: &[Token], ids: &[Token], probs: &[f32]) {
        let best = TopK { k: ids.len(), ids, probs }.best(0);
        table.insert(context.iter().rev().copied(), &best);
    }

    #[test]
    fn the_last_distribution_wins_and_is_sorted() {
        let table = FeedbackTable::new(1 << 16);
        insert(&table, &[1, 2, 3], &[7, 8], &[0.5, 0.25]);
        insert(&table, &[9, 2, 3], &[8, 7, 6], &[0.125, 0.75, 0.0]);
        let found = find(&table, &[1, 2, 3]);
        assert_eq!(
            found.map(|found| found.map(|s| (s.ids[0], s.writes))),
            [Some((7, 2)), Some((7, 2)), Some((7, 1)), None]
        );
        let newest = found[0].unwrap();
        assert_eq!((newest.ids[1], newest.probs[2]), (8, 0.0));
        assert!((newest.probs[0] - 0.75).abs() < 1e-4);
    }

    #[test]
    fn no_memory_keeps_nothing() {
        let table = FeedbackTable::new(0);
        insert(&table, &[1], &[7], &[0.5]);
        assert_eq!((find(&table, &[1])[0], table.memory_bytes()), (None, 0));
    }

    #[test]
    fn readers_never_see_halves_of_two_entries() {
        let table = FeedbackTable::new(WAYS * WORDS * 8);
        std::thread::scope(|scope| {
            for writer in 1..3u32 {
                let table = &table;
                scope.spawn(move || {
                    (0..20_000).for_each(|_| {
                        insert(table, &[5], &[writer, writer + 2, writer + 4], &[writer as f32 / 16.0; 3])
                    });
                });
            }
            for _ in 0..20_000 {
                if let Some(found) = find(&table, &[5])[0] {
                    let writer = found.ids[0];
                    assert_eq!(found.ids[..3], [writer, writer + 2, writer + 4]);
                    assert!(found.probs[..3].iter().all(|prob| (prob - writer as f32 / 16.0).abs() < 1e-4));
                }
            }
        });
    }

    proptest! {
        #[test]
        fn a_small_table_stays_bounded_and_finds_the_newest(contexts in prop::collection::vec(0u32..1000, 1..300)) {
            let table = FeedbackTable::new(16 * WAYS * WORDS * 8);
            for &context in &contexts {
                insert(&table, &[context], &[context + 1], &[1.0]);
            }
            prop_assert_eq!(table.memory_bytes(), 16 * WAYS * WORDS * 8);
            let last = contexts[contexts.len() - 1];
            prop_assert_eq!(find(&table, &[last])[0].map(|found| found.ids[0]), Some(last + 1));
        }
    }
}
