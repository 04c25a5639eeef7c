//! What the target itself held probable: its most probable next tokens, by the last few tokens before them.
//!
//! One table serves all requests of a drafter, without locks.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use crate::index::Hash;
use crate::memory::Reservation;
use crate::segments::Segments;
use crate::sources::seqlock::{self, WORDS};
use crate::sync::{AtomicU64, Ordering};
use crate::{MAX_TOKEN, Token};

/// Numbers of last tokens by which entries are found, shortest first.
pub const FEEDBACK_ORDERS: [usize; 4] = [1, 2, 3, 5];
/// Tokens kept of each distribution.
pub const TOP_K: usize = 8;

/// Entries that share a bucket: an entry lives in the one of them that was written least recently.
const WAYS: usize = 4;
const BUCKET: usize = WAYS * WORDS;
// Words of an entry: state, TOP_K tokens of 32 bits, TOP_K probabilities of 16 bits, and the time of writing above the
// bits of the hash that give the bucket.
const TIME: usize = WORDS - 1;
const HASH_BITS: u32 = 24;
const HASH: u32 = (1 << HASH_BITS) - 1;
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

/// A bounded table of distributions, found by hash in buckets of four. It grows bucket by bucket as it fills (linear
/// hashing, W. Litwin, VLDB 1980): each new bucket takes over its share of an older one. While it grows, an entry that
/// finds its bucket full goes to the neighbouring one; later the oldest of the bucket makes room.
pub struct FeedbackTable {
    slots: Segments<AtomicU64>,
    /// Buckets in use, and how many there may be.
    buckets: AtomicUsize,
    most: usize,
    entries: AtomicUsize,
    clock: AtomicU64,
    /// No more memory is asked for before this time.
    patience: AtomicU64,
    /// Pays for it; whoever has it makes buckets.
    paid: Mutex<Reservation>,
}

const BUCKETS_PER_ENTRY: usize = 2;
/// Writes after which memory that was refused is asked for again.
const PATIENCE: u64 = 4096;

impl FeedbackTable {
    /// A table of at most `bytes` bytes, which `paid` pays for as it grows; 0 keeps nothing.
    pub fn new(bytes: usize, paid: Reservation) -> Self {
        let most = (bytes / (BUCKET * size_of::<u64>())).min(1 << HASH_BITS);
        Self {
            slots: Segments::new(most * BUCKET),
            buckets: AtomicUsize::new(0),
            most,
            entries: AtomicUsize::new(0),
            clock: AtomicU64::new(1),
            patience: AtomicU64::new(0),
            paid: Mutex::new(paid),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.buckets.load(Ordering::Acquire) == 0
    }

    pub fn memory_bytes(&self) -> usize {
        self.slots.memory_bytes()
    }

    /// Calls `act` with the entries, to be put into another table.
    pub fn for_each_entry<E>(&self, mut act: impl FnMut(&[u64; WORDS]) -> Result<(), E>) -> Result<(), E> {
        for bucket in 0..self.buckets.load(Ordering::Acquire) {
            for entry in entries(self.bucket(bucket)) {
                if let Some(words) = seqlock::read(entry).filter(|words| words[0] >> 32 != 0) {
                    act(&words)?;
                }
            }
        }
        Ok(())
    }

    /// Entries that are held, as far as threads that write meanwhile let it be told.
    pub fn len(&self) -> usize {
        self.entries.load(Ordering::Relaxed)
    }

    /// Makes buckets for so many entries, as far as there may be.
    pub fn expect(&self, entries: usize) {
        let wanted = BUCKETS_PER_ENTRY.saturating_mul(entries).min(self.most);
        self.grow_to(wanted, wanted);
    }

    /// Takes over an entry of another table, unless it has tokens from `limit` on.
    pub fn restore(&self, words: &[u64; WORDS], limit: Token) {
        let foreign = |pair: u64| pair >> 32 >= u64::from(limit) || pair as u32 >= limit;
        if self.most == 0
            || words[0] >> 32 == 0
            || words[1..5].iter().copied().any(foreign)
            || !self.make_room()
        {
            return;
        }
        let tag = (words[0] >> 32) as u32;
        if let Some(entry) = self.place(words[TIME] as u32, tag) {
            let new = seqlock::tag(entry) == 0;
            if seqlock::put(entry, words) && new {
                self.entries.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.clock.fetch_max((words[TIME] >> HASH_BITS).saturating_add(1), Ordering::Relaxed);
    }

    /// Remembers the target's distribution after `context`, which is given newest first.
    pub fn insert(&self, context: impl Iterator<Item = Token>, best: &Best) {
        if self.most == 0 {
            return;
        }
        let mut words = [0u64; WORDS];
        for (place, &(id, prob)) in best.tokens().iter().enumerate() {
            words[1 + place / 2] |= u64::from(id) << (32 * (place % 2));
            let prob = (prob * SCALE).round().max(1.0) as u64;
            words[5 + place / 4] |= prob << (16 * (place % 4));
        }
        let time = self.clock.fetch_add(1, Ordering::Relaxed) << HASH_BITS;
        for_each_order(context, |order, key| {
            if self.make_room() {
                let hash = (key >> 32) as u32 & HASH;
                words[TIME] = time | u64::from(hash);
                let tag = tag(order, key);
                let new = self.place(hash, tag).is_some_and(|entry| seqlock::write(entry, tag, &words));
                self.entries.fetch_add(usize::from(new), Ordering::Relaxed);
            }
        });
    }

    /// The distributions known for the ends of `context` (newest first), by order.
    pub fn find(
        &self,
        context: impl Iterator<Item = Token>,
        out: &mut [Option<Distribution>; FEEDBACK_ORDERS.len()],
    ) {
        *out = [None; FEEDBACK_ORDERS.len()];
        if self.is_empty() {
            return;
        }
        for_each_order(context, |order, key| {
            let (home, tag) = (self.home((key >> 32) as u32), tag(order, key));
            out[order] = self.held(home, tag).and_then(|entry| read(entry, tag));
        });
    }

    fn bucket(&self, number: usize) -> &[AtomicU64] {
        self.slots.slice(number * BUCKET, BUCKET).unwrap_or_default()
    }

    /// The bucket of a hash: by so many bits as number all buckets, or where that is too many yet, by one less.
    fn home(&self, hash: u32) -> usize {
        let buckets = self.buckets.load(Ordering::Acquire);
        let hash = (hash & HASH) as usize;
        let home = hash & (buckets.next_power_of_two() - 1);
        if home < buckets { home } else { hash & (buckets.next_power_of_two() / 2 - 1) }
    }

    /// The entry of a tag, in its bucket or where it may have gone when that was full.
    fn held(&self, home: usize, tag: u32) -> Option<&[AtomicU64]> {
        let of = |bucket| entries(self.bucket(bucket)).find(|entry| seqlock::tag(entry) == tag);
        of(home).or_else(|| if self.is_growing() { of(home ^ 1) } else { None })
    }

    /// Where to write what is known of a tag: over the same, in a vacant place, or over the oldest.
    fn place(&self, hash: u32, tag: u32) -> Option<&[AtomicU64]> {
        let home = self.home(hash);
        let bucket = self.bucket(home);
        let (held, free) = search(bucket, tag);
        if held.is_some() {
            return held;
        }
        let beside = if self.is_growing() { self.bucket(home ^ 1) } else { &[] };
        let (held, beside) = search(beside, tag);
        let oldest = || entries(bucket).min_by_key(|entry| entry[TIME].load(Ordering::Relaxed) >> HASH_BITS);
        held.or(free).or(beside).or_else(oldest)
    }

    fn is_growing(&self) -> bool {
        self.buckets.load(Ordering::Relaxed) < self.most
    }

    /// Makes buckets as the table fills, as far as there may be; false if there is none.
    fn make_room(&self) -> bool {
        // one entry in two buckets, or one in each that is still to be split: hardly any of them overflows
        let wanted = (BUCKETS_PER_ENTRY * self.entries.load(Ordering::Relaxed)).clamp(1, self.most);
        if self.buckets.load(Ordering::Relaxed) < wanted
            && self.patience.load(Ordering::Relaxed) <= self.clock.load(Ordering::Relaxed)
        {
            self.grow_to(wanted, BUCKETS_PER_ENTRY);
        }
        !self.is_empty()
    }

    /// Makes at most `most` further buckets, up to `wanted` in all. Does nothing while another thread makes some.
    fn grow_to(&self, wanted: usize, most: usize) {
        let Ok(mut paid) = self.paid.try_lock() else { return };
        let buckets = self.buckets.load(Ordering::Relaxed);
        for new in buckets..wanted.min(buckets.saturating_add(most)) {
            if self.slots.grow((new + 1) * BUCKET, &mut paid).is_err() {
                let patience = self.clock.load(Ordering::Relaxed) + PATIENCE;
                self.patience.store(patience, Ordering::Relaxed);
                return;
            }
            self.split(new);
            self.buckets.store(new + 1, Ordering::Release);
        }
    }

    /// Moves to the bucket `new` what belongs there from now on. An entry that another thread writes meanwhile may be
    /// lost.
    fn split(&self, new: usize) {
        let all = (new + 1).next_power_of_two();
        let old = new & (all / 2).saturating_sub(1);
        if old == new {
            return;
        }
        let both = entries(self.bucket(old)).chain(entries(self.bucket(old ^ 1)));
        // most are vacant
        for from in both.filter(|entry| seqlock::tag(entry) != 0) {
            let belongs = |words: &[u64; WORDS]| words[TIME] as usize & (all - 1) == new;
            if let Some(words) = seqlock::read(from).filter(belongs)
                && let Some(to) = vacant(self.bucket(new)).or_else(|| vacant(self.bucket(new ^ 1)))
                && seqlock::put(to, &words)
            {
                seqlock::put(from, &[0; WORDS]);
            }
        }
    }
}

fn entries(bucket: &[AtomicU64]) -> impl Iterator<Item = &[AtomicU64]> {
    bucket.chunks_exact(WORDS)
}

/// The entry of a tag, and the first vacant one.
fn search(bucket: &[AtomicU64], tag: u32) -> (Option<&[AtomicU64]>, Option<&[AtomicU64]>) {
    let mut free = None;
    for entry in entries(bucket) {
        match seqlock::tag(entry) {
            held if held == tag => return (Some(entry), free),
            0 if free.is_none() => free = Some(entry),
            _ => {}
        }
    }
    (None, free)
}

fn vacant(bucket: &[AtomicU64]) -> Option<&[AtomicU64]> {
    entries(bucket).find(|entry| seqlock::tag(entry) == 0)
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

fn read(entry: &[AtomicU64], tag: u32) -> Option<Distribution> {
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
    use std::sync::Arc;

    use super::*;
    use crate::memory::MemoryPool;
    use proptest::prelude::*;

    fn table(bytes: usize) -> FeedbackTable {
        FeedbackTable::new(bytes, Reservation::new(&Arc::new(MemoryPool::new(usize::MAX)), usize::MAX))
    }

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
        let table = table(1 << 16);
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
        let table = table(0);
        insert(&table, &[1], &[7], &[0.5]);
        assert_eq!((find(&table, &[1])[0], table.memory_bytes()), (None, 0));
    }

    #[test]
    fn readers_never_see_halves_of_two_entries() {
        let table = table(WAYS * WORDS * 8);
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

    #[test]
    fn entries_are_found_as_the_table_grows_and_in_tables_of_other_sizes() {
        let pool = Arc::new(MemoryPool::new(usize::MAX));
        let table = FeedbackTable::new(1 << 22, Reservation::shared(&pool));
        let found = |table: &FeedbackTable, most| {
            let holds = |n: &Token| find(table, &[*n])[0].is_some_and(|found| found.ids[0] == n + 1);
            (0..most).filter(holds).count()
        };
        for n in 0..4000 {
            insert(&table, &[n], &[n + 1], &[1.0]);
            assert!(find(&table, &[n])[0].is_some());
            // twice what is in use, as segments double
            assert!(
                pool.used() == table.memory_bytes()
                    && table.memory_bytes() <= 4 * 256 * (n as usize + 1) + 4096
            );
        }
        assert_eq!(found(&table, 4000), 4000);
        for (bytes, least) in [(1 << 22, 4000), (1 << 20, 3950), (1 << 17, 1500)] {
            let other = self::table(bytes);
            other.expect(table.len());
            let copied: Result<(), ()> = table.for_each_entry(|words| {
                other.restore(words, Token::MAX);
                Ok(())
            });
            assert!(copied.is_ok() && found(&other, 4000) >= least, "{bytes}: {}", found(&other, 4000));
            insert(&other, &[9999], &[1], &[1.0]);
            assert!(find(&other, &[9999])[0].is_some());
        }
        let other = self::table(1 << 22);
        let _: Result<(), ()> = table.for_each_entry(|words| {
            other.restore(words, 1000);
            Ok(())
        });
        assert!((990..1000).contains(&found(&other, 4000)));
    }

    #[test]
    fn a_table_that_grows_holds_what_a_map_would() {
        for seed in 0..20u32 {
            let (table, mut map) = (table(1 << 20), std::collections::HashMap::new());
            let mut state = seed.wrapping_mul(2_654_435_761) | 1;
            let mut random = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 16
            };
            let text: Vec<Token> = (0..600).map(|_| (random() % 100).trailing_zeros()).collect();
            for at in 1..text.len() {
                let id = random() % 500;
                insert(&table, &text[..at], &[id], &[1.0]);
                for length in FEEDBACK_ORDERS.into_iter().filter(|&length| length <= at) {
                    let held = map.entry(text[at - length..at].to_vec()).or_insert((0, 0u8));
                    *held = (id, held.1.saturating_add(1));
                }
            }
            let mut lost = 0;
            for (context, &(id, writes)) in &map {
                let order = FEEDBACK_ORDERS.iter().position(|&length| length == context.len()).unwrap();
                let found = find(&table, context)[order].map(|found| (found.ids[0], found.writes));
                assert!(
                    found.is_none_or(|found| found == (id, writes)),
                    "{context:?} {found:?} {id} {writes} of {} in {} seed {seed}",
                    map.len(),
                    table.buckets.load(Ordering::Relaxed)
                );
                lost += usize::from(found.is_none());
            }
            assert_eq!(lost, 0, "of {}", map.len());
        }
    }

    #[test]
    fn a_table_without_more_memory_keeps_to_what_it_has_and_asks_again() {
        let pool = Arc::new(MemoryPool::new(40_000));
        let table = FeedbackTable::new(1 << 20, Reservation::shared(&pool));
        (0..9000).for_each(|n| insert(&table, &[n], &[n + 1], &[1.0]));
        assert!(table.memory_bytes() == 32_768 && (2..5).contains(&pool.refused()));
        assert!(find(&table, &[8999])[0].is_some());
    }

    proptest! {
        #[test]
        fn a_small_table_stays_bounded_and_finds_the_newest(contexts in prop::collection::vec(0u32..1000, 1..300)) {
            let table = table(16 * WAYS * WORDS * 8);
            for &context in &contexts {
                insert(&table, &[context], &[context + 1], &[1.0]);
            }
            prop_assert!(table.memory_bytes() <= 16 * BUCKET * 8);
            let last = contexts[contexts.len() - 1];
            prop_assert_eq!(find(&table, &[last])[0].map(|found| found.ids[0]), Some(last + 1));
        }
    }
}
