//! The live store: the tokens of finished requests, in bounded memory, matched like a corpus.
//!
//! Documents lie one after another in a ring. For a few context lengths a hash table links the positions whose
//! last tokens hash alike, newest first; texts are compared, so collisions cost time and never a wrong match.
//! When the ring is full the oldest document goes, unless something drafted from it was accepted since it came to its
//! place: then it moves to the front once more (second chance).
//!
//! Ring and tables grow with what they hold. A table grows slot by slot (linear hashing, W. Litwin, VLDB 1980): each new
//! slot begins with the chain of the one whose share it takes. Texts enter in slices, between which others read.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::Token;
use crate::index::Hash;
use crate::memory::{MemoryFull, Reservation, try_reserve};
use crate::segments::Segments;
use crate::sources::corpus::{Corpus, Match};
use crate::sync::lock;

/// Context lengths that are linked.
const ORDERS: [usize; 3] = [2, 4, 8];
const LONGEST: usize = ORDERS[ORDERS.len() - 1];
/// Closes a document; no token.
const END: Token = Token::MAX;
/// Bytes of a token: itself, its links, and its share of the hash tables and of its document.
const BYTES: usize = 4 + ORDERS.len() * (4 + HEADS * 4) + 2;
/// Hash slots per token.
const HEADS: usize = 2;
/// Tokens per document, at least: as many as there are contexts to find its first own token by.
const DOCUMENT: usize = LONGEST;
/// Runs of this many tokens that the store holds already are not stored again.
const KNOWN: usize = 32;
/// Positions looked at for each sample that is wanted.
const STEPS: usize = 4;
/// Documents moved to the front for one that enters.
const SECOND_CHANCES: usize = 16;
/// A longer text becomes several documents, the next of which begins with the end of the one before.
const LONGEST_DOCUMENT: usize = 4096;
/// A ring of fewer tokens tries again to grow when it was refused memory.
const WORTH_HAVING: usize = 4 * LONGEST_DOCUMENT;
/// Tokens that enter, or are looked up, before others may read: some 30 microseconds.
const SLICE: usize = 128;

/// Tokens of finished requests. Readers share the lock; who adds to them takes it for one slice after the other.
pub struct LiveStore {
    ring: RwLock<Ring>,
    /// Whoever has it adds a document, and pays for it.
    paid: Mutex<Reservation>,
}

/// What the live store holds.
pub struct Ring {
    /// Positions count up for ever (from 1) and are stored modulo the capacity, in 32 bits.
    tokens: Segments<Token>,
    /// The position before each one that has the same hash, by order.
    previous: Segments<[u32; ORDERS.len()]>,
    heads: [Heads; ORDERS.len()],
    /// Documents are numbered for ever and stored modulo their most: where each starts, and how many tokens that were
    /// drafted from it were accepted.
    starts: Segments<u64>,
    used: Segments<AtomicU32>,
    oldest: usize,
    newest: usize,
    start: u64,
    end: u64,
    /// Tokens and documents that there may come to be.
    capacity: usize,
    documents: usize,
    /// Whether more memory was refused.
    full: bool,
}

/// The newest position with each hash.
struct Heads {
    slots: Segments<u32>,
    /// Slots in use.
    len: usize,
}

impl LiveStore {
    /// A store of at most `bytes` bytes, which `paid` pays for as it grows; 0 keeps nothing.
    pub fn new(bytes: usize, paid: Reservation) -> Self {
        let capacity = (bytes / BYTES).min(1 << 30);
        let capacity = if capacity < 256 { 0 } else { capacity };
        Self { ring: RwLock::new(Ring::new(capacity)), paid: Mutex::new(paid) }
    }

    /// Adds a text, as far as its tokens are new. The oldest documents make room. Between documents `interrupted` is
    /// asked whether to leave it at that; false if it was.
    pub fn commit(&self, tokens: &[Token], interrupted: &mut dyn FnMut() -> bool) -> bool {
        let tokens = &tokens[tokens.len().saturating_sub(self.read().capacity / 4)..];
        if tokens.len() <= ORDERS[0] {
            return true;
        }
        let mut at = 0;
        while at < tokens.len() {
            if interrupted() {
                return false;
            }
            let mut paid = lock(&self.paid);
            let until = tokens.len().min(at + LONGEST_DOCUMENT);
            for (from, to) in self.news(tokens, at, until) {
                self.append(&tokens[from..to], 0, &mut paid);
            }
            at = until;
        }
        true
    }

    /// What is new of `tokens[start..end]`, each part with enough before it to find it by.
    fn news(&self, tokens: &[Token], start: usize, end: usize) -> Vec<(usize, usize)> {
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for slice in (start..end).step_by(SLICE) {
            let ring = self.read();
            for at in slice..end.min(slice + SLICE) {
                let context = &tokens[(at + 1).saturating_sub(KNOWN)..=at];
                if context.len() == KNOWN && ring.knows(context) {
                    continue;
                }
                match parts.last_mut() {
                    Some((_, to)) if *to == at => *to += 1,
                    _ => parts.push((at.saturating_sub(if at == start { KNOWN } else { LONGEST }), at + 1)),
                }
            }
        }
        parts
    }

    /// Adds a document as it is, if there is memory for it.
    fn append(&self, tokens: &[Token], used: u32, paid: &mut Reservation) {
        let mut chances = SECOND_CHANCES;
        if tokens.len() <= ORDERS[0] {
            return;
        }
        // others read while memory is taken: it may have to be cleared
        let grown = self.read().grow(tokens.len() + 1, paid);
        if grown.is_err() && !self.ring.write().stop_growing() {
            return;
        }
        loop {
            let mut ring = self.ring.write();
            if ring.has_room(tokens.len()) {
                break;
            }
            if ring.oldest == ring.newest {
                return;
            }
            let moved = ring.evict(&mut chances);
            RwLockWriteGuard::unlock_fair(ring);
            if let Some((copy, used)) = moved {
                self.enter(&copy, used);
            }
        }
        self.enter(tokens, used);
    }

    /// Adds a document for which there is room.
    fn enter(&self, tokens: &[Token], used: u32) {
        self.ring.write().begin_document(used);
        for slice in (0..tokens.len()).step_by(SLICE) {
            let mut ring = self.ring.write();
            (slice..tokens.len().min(slice + SLICE)).for_each(|at| ring.push(&tokens[..=at]));
            // who waits comes first, or they would wait for the whole text
            RwLockWriteGuard::unlock_fair(ring);
        }
        self.ring.write().end_document();
    }

    /// Tells that what was drafted from here was accepted.
    pub fn credit(&self, position: u64) {
        self.read().credit(position);
    }

    /// Calls `act` with the documents, oldest first, and how often what was drafted from each was accepted of late.
    pub fn for_each_document<E: From<MemoryFull>>(
        &self,
        mut act: impl FnMut(&[Token], u32) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut tokens, mut next) = (Vec::new(), 0);
        loop {
            let ring = self.read();
            next = next.max(ring.oldest);
            // the last one may still be entering
            if next >= ring.newest || ring.is_open(next) {
                return Ok(());
            }
            tokens.clear();
            let (start, end) = (ring.start_of(next), ring.start_of(next + 1) - 1);
            try_reserve(&mut tokens, (end - start) as usize)?;
            tokens.extend((start..end).filter_map(|position| ring.token(position)));
            let used = ring.used(next).map_or(0, |used| used.load(Ordering::Relaxed));
            drop(ring);
            act(&tokens, used)?;
            next += 1;
        }
    }

    /// Adds a document as it was in another store.
    pub fn restore(&self, tokens: &[Token], used: u32) {
        if tokens.len() <= self.read().capacity / 4 {
            for part in tokens.chunks(LONGEST_DOCUMENT) {
                self.append(part, used, &mut lock(&self.paid));
            }
        }
    }

    /// Tokens held, and documents.
    pub fn len(&self) -> (usize, usize) {
        let ring = self.read();
        let documents = ring.newest - ring.oldest;
        (((ring.end - ring.start) as usize).saturating_sub(documents), documents)
    }

    pub fn memory_bytes(&self) -> usize {
        self.read().memory_bytes()
    }

    /// What is held, while nobody adds to it.
    pub fn read(&self) -> RwLockReadGuard<'_, Ring> {
        self.ring.read()
    }
}

impl Corpus for Ring {
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
        if self.newest > self.oldest {
            self.find(&context[context.len().saturating_sub(max_length)..], max_samples, out);
        }
    }

    fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        let mut read = 0;
        while let Some(token) = out.get_mut(read).and_then(|_| self.token(position + read as u64)) {
            out[read] = token;
            read += 1;
        }
        read
    }

    fn successors(&self, _: Token, _: &mut Vec<(Token, f32)>) {}
}

impl Ring {
    fn new(capacity: usize) -> Self {
        let slots = (capacity * HEADS).checked_ilog2().map_or(0, |bits| 1 << bits);
        Self {
            tokens: Segments::new(capacity),
            previous: Segments::new(capacity),
            heads: std::array::from_fn(|_| Heads { slots: Segments::new(slots), len: 0 }),
            starts: Segments::new(capacity / DOCUMENT),
            used: Segments::new(capacity / DOCUMENT),
            oldest: 0,
            newest: 0,
            start: 1,
            end: 1,
            capacity,
            documents: capacity / DOCUMENT,
            full: false,
        }
    }

    /// Takes memory for `more` tokens of a document.
    fn grow(&self, more: usize, paid: &mut Reservation) -> Result<(), MemoryFull> {
        if self.full {
            return Ok(());
        }
        let tokens = self.end as usize + more;
        self.starts.grow_resident(self.newest + 2, paid)?;
        self.used.grow_resident(self.newest + 2, paid)?;
        for heads in &self.heads {
            heads.slots.grow_resident(HEADS * tokens, paid)?;
        }
        self.previous.grow_resident(tokens, paid)?;
        self.tokens.grow_resident(tokens, paid)
    }

    /// Since it cannot grow, stays as it is from now on; false if that is not worth having.
    fn stop_growing(&mut self) -> bool {
        let held = self.tokens.len().min(self.previous.len());
        let documents = self.starts.len().min(self.used.len());
        self.full = held >= WORTH_HAVING && held >= self.end as usize && documents > self.newest;
        if self.full {
            (self.capacity, self.documents) = (held, documents);
        }
        self.full
    }

    /// Whether a document of `tokens` tokens can enter.
    fn has_room(&self, tokens: usize) -> bool {
        let tokens = self.end - self.start + tokens as u64 + 1;
        tokens <= self.capacity as u64 && self.newest - self.oldest + 1 < self.documents
    }

    /// Takes the oldest document out. If something of it was of use, and `chances` are left, it is to enter anew.
    fn evict(&mut self, chances: &mut usize) -> Option<(Vec<Token>, u32)> {
        let (start, end) = (self.start_of(self.oldest), self.start_of(self.oldest + 1));
        let used = self.used(self.oldest).map_or(0, |used| used.load(Ordering::Relaxed));
        let mut copy = Vec::new();
        if used > 0 && *chances > 0 {
            *chances -= 1;
            if try_reserve(&mut copy, (end - start) as usize).is_ok() {
                copy.extend((start..end).filter_map(|position| self.token(position)));
            }
        }
        self.oldest += 1;
        self.start = end;
        (!copy.is_empty()).then_some((copy, used / 2))
    }

    fn begin_document(&mut self, used: u32) {
        let (place, end) = (self.newest % self.documents.max(1), self.end);
        if let (Some(start), Some(count)) = (self.starts.get_mut(place), self.used.get_mut(place)) {
            *start = end;
            *count.get_mut() = used;
            self.newest += 1;
        }
    }

    /// Adds the last of `text`, the tokens of the newest document up to it.
    fn push(&mut self, text: &[Token]) {
        let (Some(&token), end) = (text.last(), self.end) else { return };
        let mut previous = [0; ORDERS.len()];
        for (order, heads) in self.heads.iter_mut().enumerate() {
            heads.split(HEADS);
            if let Some(hash) = hash(order, text)
                && let Some(head) = heads.slots.get_mut(heads.home(hash))
            {
                previous[order] = std::mem::replace(head, end as u32);
            }
        }
        self.store(token, previous);
    }

    fn end_document(&mut self) {
        self.store(END, [0; ORDERS.len()]);
    }

    fn store(&mut self, token: Token, links: [u32; ORDERS.len()]) {
        let place = self.place(self.end);
        if let (Some(held), Some(previous)) = (self.tokens.get_mut(place), self.previous.get_mut(place)) {
            (*held, *previous) = (token, links);
            self.end += 1;
        }
    }

    fn place(&self, position: u64) -> usize {
        (position % self.capacity as u64) as usize
    }

    /// The token at `position`, if one of a document is held there.
    fn token(&self, position: u64) -> Option<Token> {
        let held = (self.start..self.end).contains(&position);
        let token = if held { self.tokens.get(self.place(position)) } else { None };
        token.copied().filter(|&token| token != END)
    }

    /// Where a document starts, or the next one would.
    fn start_of(&self, document: usize) -> u64 {
        let start = self.starts.get(document % self.documents.max(1));
        if document < self.newest { start.copied().unwrap_or(self.end) } else { self.end }
    }

    fn used(&self, document: usize) -> Option<&AtomicU32> {
        self.used.get(document % self.documents.max(1))
    }

    /// Whether a document is still entering.
    fn is_open(&self, document: usize) -> bool {
        let last = self.end.wrapping_sub(1);
        document + 1 == self.newest && self.tokens.get(self.place(last)) != Some(&END)
    }

    fn credit(&self, position: u64) {
        if !(self.start..self.end).contains(&position) {
            return;
        }
        let (mut low, mut high) = (self.oldest, self.newest);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.start_of(middle) <= position { low = middle } else { high = middle }
        }
        self.used(low).map(|used| used.fetch_add(1, Ordering::Relaxed));
    }

    /// The position that was stored in 32 bits, if it is still held.
    fn held(&self, stored: u32) -> Option<u64> {
        let age = (self.end as u32).wrapping_sub(stored);
        let position = self.end.checked_sub(u64::from(age))?;
        (stored != 0 && position >= self.start && position < self.end).then_some(position)
    }

    /// How many tokens that end at `position` agree with the end of `context`.
    fn match_length(&self, position: u64, context: &[Token]) -> usize {
        let expected = context.iter().rev().enumerate();
        expected
            .take_while(|&(back, &token)| self.token(position.wrapping_sub(back as u64)) == Some(token))
            .count()
    }

    /// Positions that may end the last `ORDERS[order]` tokens of `context`, newest first.
    fn chain(&self, order: usize, context: &[Token]) -> impl Iterator<Item = u64> {
        let heads = &self.heads[order];
        let head = hash(order, context).and_then(|hash| heads.slots.get(heads.home(hash)));
        let first = head.and_then(|&stored| self.held(stored));
        std::iter::successors(first, move |&position| {
            let stored = self.previous.get(self.place(position))?[order];
            self.held(stored).filter(|&before| before < position)
        })
    }

    fn knows(&self, context: &[Token]) -> bool {
        let mut chain = self.chain(ORDERS.len() - 1, context).take(2 * STEPS);
        chain.any(|position| self.match_length(position, context) == context.len())
    }

    /// Appends at most `max_samples` matches of the end of `context`, longest first.
    fn find(&self, context: &[Token], max_samples: usize, out: &mut Vec<Match>) {
        let first = out.len();
        let mut longer = usize::MAX;
        for order in (0..ORDERS.len()).rev() {
            for position in self.chain(order, context).take(STEPS * max_samples) {
                if out.len() == first + max_samples {
                    return;
                }
                let length = self.match_length(position, context);
                if (ORDERS[order]..longer).contains(&length) && self.token(position + 1).is_some() {
                    out.push(Match { position: position + 1, length: length as u32, weight: 1.0, domain: 0 });
                }
            }
            longer = ORDERS[order];
        }
    }

    fn memory_bytes(&self) -> usize {
        let heads: usize = self.heads.iter().map(|heads| heads.slots.memory_bytes()).sum();
        let documents = self.starts.memory_bytes() + self.used.memory_bytes();
        self.tokens.memory_bytes() + self.previous.memory_bytes() + heads + documents
    }
}

impl Heads {
    /// Takes up to `more` further slots into use, as far as there are any.
    fn split(&mut self, more: usize) {
        for new in self.len..self.slots.len().min(self.len + more) {
            let old = new & ((new + 1).next_power_of_two() / 2).saturating_sub(1);
            let chain = self.slots.get(old).copied();
            if let (Some(chain), Some(slot)) = (chain, self.slots.get_mut(new)) {
                *slot = chain;
            }
            self.len = new + 1;
        }
    }

    /// The slot of a hash: by so many bits as number all slots, or where that is too many yet, by one less.
    fn home(&self, hash: u64) -> usize {
        let (hash, all) = ((hash >> 32) as usize, self.len.next_power_of_two());
        let home = hash & (all - 1);
        if home < self.len { home } else { hash & (all / 2).saturating_sub(1) }
    }
}

fn hash(order: usize, context: &[Token]) -> Option<u64> {
    let mut hash = Hash::default();
    let start = context.len().checked_sub(ORDERS[order])?;
    context[start..].iter().rev().for_each(|&token| hash.add(token));
    Some(hash.wide())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::MemoryPool;
    use proptest::prelude::*;

    fn store(bytes: usize, pool: &Arc<MemoryPool>) -> LiveStore {
        LiveStore::new(bytes, Reservation::new(pool, usize::MAX))
    }

    fn unlimited(bytes: usize) -> LiveStore {
        store(bytes, &Arc::new(MemoryPool::new(usize::MAX)))
    }

    fn commit(store: &LiveStore, tokens: &[Token]) {
        assert!(store.commit(tokens, &mut || false));
    }

    fn matches(store: &LiveStore, context: &[Token]) -> Vec<(u32, Vec<Token>)> {
        let mut found = Vec::new();
        store.read().matches(context, 32, 64, &mut found);
        let mut out = [0; 4];
        let mut read = |m: &Match| {
            let count = store.read().continuation(m.position, &mut out);
            (m.length, out[..count].to_vec())
        };
        found.iter().map(&mut read).collect()
    }

    #[test]
    fn finds_what_was_committed_newest_first() {
        let store = unlimited(1 << 20);
        commit(&store, &[1, 2, 3, 4, 5]);
        commit(&store, &[9, 2, 3, 7]);
        assert_eq!(matches(&store, &[1, 2, 3]), [(2, vec![7]), (3, vec![4, 5])]);
        assert_eq!(store.len(), (9, 2));
    }

    #[test]
    fn known_text_is_not_stored_again() {
        let store = unlimited(1 << 20);
        let text: Vec<Token> = (0..500).collect();
        commit(&store, &text);
        commit(&store, &text);
        assert!(store.len().0 < 500 + 2 * KNOWN, "{:?}", store.len());
        let longer = [&text[..], &[1000, 1001, 1002, 1003]].concat();
        commit(&store, &longer);
        assert!(matches(&store, &[498, 499, 1000]).contains(&(3, vec![1001, 1002, 1003])));
    }

    #[test]
    fn what_is_used_stays_longer() {
        let store = unlimited(BYTES * 1024);
        let document = |n: u32| (n * 100..n * 100 + 50).collect::<Vec<_>>();
        commit(&store, &document(0));
        let mut found = Vec::new();
        store.read().matches(&[10, 11], 32, 64, &mut found);
        store.credit(found[0].position);
        (1..25).for_each(|n| commit(&store, &document(n)));
        assert!(!matches(&store, &[10, 11]).is_empty());
        assert!(matches(&store, &[110, 111]).is_empty());
        (25..80).for_each(|n| commit(&store, &document(n)));
        assert!(matches(&store, &[10, 11]).is_empty(), "one use is not for ever");
    }

    proptest! {
        #[test]
        fn holds_its_limit_and_matches_truly(documents in prop::collection::vec(prop::collection::vec(0u32..6, 0..200), 1..60)) {
            let limit = BYTES * 600;
            let store = unlimited(limit);
            for document in &documents {
                commit(&store, document);
                prop_assert!(store.memory_bytes() <= limit);
                let context = &document[..document.len() / 2];
                let mut found = Vec::new();
                store.read().matches(context, 32, 64, &mut found);
                for m in found {
                    let mut text = vec![0; m.length as usize];
                    prop_assert_eq!(store.read().continuation(m.position - u64::from(m.length), &mut text), text.len());
                    prop_assert_eq!(&text[..], &context[context.len() - text.len()..]);
                }
            }
            // the newest document is there, as far as one document may fill the store
            if let Some(document) = documents.last().filter(|document| document.len() > 3) {
                let kept = &document[document.len().saturating_sub(600 / 4)..];
                let mut found = Vec::new();
                store.read().matches(&kept[..3], 32, 64, &mut found);
                prop_assert!(!found.is_empty());
            }
        }
    }

    /// What is found must not depend on how the tables have grown, but for chains that are cut off.
    #[test]
    fn a_store_that_grows_finds_what_it_holds() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let pool = Arc::new(MemoryPool::new(usize::MAX));
        let store = store(BYTES << 17, &pool);
        let documents: Vec<Vec<Token>> =
            (0..200).map(|_| (0..300).map(|_| random() % 2000).collect()).collect();
        for (n, document) in documents.iter().enumerate() {
            commit(&store, document);
            assert_eq!(pool.used(), store.memory_bytes());
            assert!(store.memory_bytes() < 3 * BYTES * 310 * (n + 1) + 40_000);
        }
        for document in &documents {
            for at in (8..300).step_by(7) {
                let found = matches(&store, &document[..at]);
                let next = document[at..300.min(at + 4)].to_vec();
                assert!(found.contains(&(at.min(32) as u32, next)));
            }
        }
    }

    #[test]
    fn long_texts_enter_in_parts_that_overlap() {
        let store = unlimited(BYTES << 17);
        let text: Vec<Token> = (0..10_000).collect();
        commit(&store, &text);
        assert_eq!(store.len().1, 3);
        for end in [4000, 4095, 4096, 4097, 4110, 8200, 9990] {
            assert!(
                matches(&store, &text[end - 10..end]).contains(&(10, text[end..end + 4].to_vec())),
                "{end}"
            );
        }
        let mut whole = Vec::new();
        let all: Result<(), MemoryFull> = store.for_each_document(|tokens, _| {
            let last = whole.last().copied();
            whole.extend(tokens.iter().filter(|&&token| Some(token) > last));
            Ok(())
        });
        assert_eq!((all, whole), (Ok(()), text));
    }

    #[test]
    fn a_store_that_gets_no_more_memory_goes_on_with_what_it_has() {
        let pool = Arc::new(MemoryPool::new(BYTES << 16));
        let store = store(BYTES << 18, &pool);
        for n in 0..400 {
            let document: Vec<Token> = (n * 1000..n * 1000 + 900).collect();
            commit(&store, &document);
            assert!(pool.used() <= pool.limit() && pool.used() == store.memory_bytes());
            let found = matches(&store, &document[800..850]);
            assert!(found.contains(&(32, document[850..854].to_vec())), "{n}");
        }
        assert!(pool.refused() < 10);
    }
}
