//! The live store: the tokens of finished requests, in bounded memory, matched like a corpus.
//!
//! Documents lie one after another in a ring. For a few context lengths a hash table links the positions whose
//! last tokens hash alike, newest first; texts are compared, so collisions cost time and never a wrong match.
//! Nothing is allocated after the first commit. When the ring is full the oldest document goes, unless something
//! drafted from it was accepted since it came to its place: then it moves to the front once more (second chance).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::Token;
use crate::index::Hash;
use crate::sources::corpus::{Corpus, Match};

/// Context lengths that are linked.
const ORDERS: [usize; 3] = [2, 4, 8];
/// Closes a document; no token.
const END: Token = Token::MAX;
/// Bytes of a token: itself, its links, and its share of the hash tables.
const BYTES: usize = 4 + ORDERS.len() * (4 + HEADS * 4);
/// Hash slots per token.
const HEADS: usize = 2;
/// Runs of this many tokens that the store holds already are not stored again.
const KNOWN: usize = 32;
/// Positions looked at for each sample that is wanted.
const STEPS: usize = 4;
/// Documents moved to the front for one commit.
const SECOND_CHANCES: usize = 16;

/// Tokens of finished requests. Readers share the lock; a commit takes it for microseconds per thousand tokens.
pub struct LiveStore {
    ring: RwLock<Ring>,
    capacity: usize,
}

#[derive(Default)]
struct Ring {
    /// Positions count up for ever (from 1) and are stored modulo the capacity, in 32 bits.
    tokens: Vec<Token>,
    links: [Links; ORDERS.len()],
    documents: VecDeque<Document>,
    start: u64,
    end: u64,
}

#[derive(Default)]
struct Links {
    /// The newest position with each hash.
    heads: Vec<u32>,
    /// The one before each position with the same hash.
    previous: Vec<u32>,
}

struct Document {
    start: u64,
    /// Accepted tokens that were drafted from it.
    used: AtomicU32,
}

impl LiveStore {
    /// A store of at most `bytes` bytes; 0 keeps nothing.
    pub fn new(bytes: usize) -> Self {
        let capacity = (bytes / BYTES).min(1 << 30);
        Self { ring: RwLock::default(), capacity: if capacity < 256 { 0 } else { capacity } }
    }

    /// Adds a document, as far as its tokens are new. The oldest documents make room.
    pub fn commit(&self, tokens: &[Token]) {
        let tokens = &tokens[tokens.len().saturating_sub(self.capacity / 4)..];
        if tokens.len() > ORDERS[0] {
            let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
            ring.allocate(self.capacity);
            ring.commit(tokens);
        }
    }

    /// Tells that what was drafted from here was accepted.
    pub fn credit(&self, position: u64) {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let document = ring.documents.partition_point(|document| document.start <= position);
        if let Some(document) = document.checked_sub(1).and_then(|at| ring.documents.get(at)) {
            document.used.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The documents, oldest first, and how often what was drafted from each was accepted of late.
    pub fn documents(&self) -> Vec<(Vec<Token>, u32)> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let ends = ring.documents.iter().skip(1).map(|next| next.start).chain(std::iter::once(ring.end));
        let documents = ring.documents.iter().zip(ends).map(|(document, end)| {
            let tokens = (document.start..end - 1).map(|position| ring.tokens[ring.place(position)]);
            (tokens.collect(), document.used.load(Ordering::Relaxed))
        });
        documents.collect()
    }

    /// Adds documents as they were in another store.
    pub fn restore(&self, documents: &[(Vec<Token>, u32)]) {
        let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
        for (tokens, used) in documents.iter().filter(|(tokens, _)| tokens.len() <= self.capacity / 4) {
            ring.allocate(self.capacity);
            ring.append(tokens);
            if let Some(document) = ring.documents.back_mut() {
                *document.used.get_mut() = *used;
            }
        }
    }

    /// Tokens held, and documents.
    pub fn len(&self) -> (usize, usize) {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        ((ring.end - ring.start) as usize - ring.documents.len(), ring.documents.len())
    }

    /// Bytes that it may come to hold.
    pub fn most_bytes(&self) -> usize {
        self.capacity * BYTES
    }

    pub fn memory_bytes(&self) -> usize {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let links = ring.links.iter().map(|links| links.heads.len() + links.previous.len());
        4 * (ring.tokens.len() + links.sum::<usize>()) + ring.documents.capacity() * size_of::<Document>()
    }
}

impl Corpus for LiveStore {
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        if !ring.documents.is_empty() {
            ring.matches(&context[context.len().saturating_sub(max_length)..], max_samples, out);
        }
    }

    fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let mut read = 0;
        while let Some(token) = out.get_mut(read).and_then(|_| ring.token(position + read as u64)) {
            out[read] = token;
            read += 1;
        }
        read
    }

    fn successors(&self, _: Token, _: &mut Vec<(Token, f32)>) {}
}

impl Ring {
    fn allocate(&mut self, capacity: usize) {
        if self.tokens.is_empty() {
            (self.start, self.end) = (1, 1);
            // zero pages cost nothing until they are used
            self.tokens = vec![0; capacity];
            let heads = (capacity * HEADS).next_power_of_two()
                / if (capacity * HEADS).is_power_of_two() { 1 } else { 2 };
            self.links =
                std::array::from_fn(|_| Links { heads: vec![0; heads], previous: vec![0; capacity] });
        }
    }

    fn place(&self, position: u64) -> usize {
        (position % self.tokens.len() as u64) as usize
    }

    /// The token at `position`, if one of a document is held there.
    fn token(&self, position: u64) -> Option<Token> {
        let held = (self.start..self.end).contains(&position);
        held.then(|| self.tokens[self.place(position)]).filter(|&token| token != END)
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
        let links = &self.links[order];
        let first = match hash(order, context) {
            Some(hash) if !links.heads.is_empty() => self.held(links.heads[slot(hash, links.heads.len())]),
            _ => None,
        };
        std::iter::successors(first, move |&position| {
            self.held(links.previous[self.place(position)]).filter(|&before| before < position)
        })
    }

    fn matches(&self, context: &[Token], max_samples: usize, out: &mut Vec<Match>) {
        let first = out.len();
        let mut longer = usize::MAX;
        for order in (0..ORDERS.len()).rev() {
            for position in self.chain(order, context).take(STEPS * max_samples) {
                if out.len() == first + max_samples {
                    return;
                }
                let length = self.match_length(position, context);
                if (ORDERS[order]..longer).contains(&length) && self.token(position + 1).is_some() {
                    out.push(Match { position: position + 1, length: length as u32, weight: 1.0 });
                }
            }
            longer = ORDERS[order];
        }
    }

    fn commit(&mut self, tokens: &[Token]) {
        // what is new, and enough before it to find it by
        let longest = ORDERS[ORDERS.len() - 1];
        let mut from = 0;
        let mut new_until = 0;
        for at in 0..tokens.len() {
            let context = &tokens[(at + 1).saturating_sub(KNOWN)..=at];
            let known = context.len() == KNOWN
                && self
                    .chain(ORDERS.len() - 1, context)
                    .take(STEPS)
                    .any(|position| self.match_length(position, context) == KNOWN);
            if known {
                if at == new_until {
                    self.append(&tokens[from..at]);
                    from = at;
                }
            } else {
                if new_until < at {
                    from = at.saturating_sub(longest);
                }
                new_until = at + 1;
            }
        }
        if new_until == tokens.len() {
            self.append(&tokens[from..]);
        }
    }

    /// Adds a document as it is.
    fn append(&mut self, tokens: &[Token]) {
        if tokens.len() <= ORDERS[0] {
            return;
        }
        let mut chances = SECOND_CHANCES;
        while self.end - self.start + tokens.len() as u64 + 1 > self.tokens.len() as u64 {
            let Some(oldest) = self.documents.pop_front() else { return };
            let end = self.documents.front().map_or(self.end, |next| next.start);
            self.start = end;
            let used = oldest.used.into_inner();
            if used > 0 && chances > 0 {
                chances -= 1;
                // its place may be taken while it is copied
                let copy: Vec<Token> =
                    (oldest.start..end - 1).map(|position| self.tokens[self.place(position)]).collect();
                self.push(&copy, used / 2);
            }
        }
        self.push(tokens, 0);
    }

    fn push(&mut self, tokens: &[Token], used: u32) {
        self.documents.push_back(Document { start: self.end, used: AtomicU32::new(used) });
        for (at, &token) in tokens.iter().enumerate() {
            let place = self.place(self.end);
            self.tokens[place] = token;
            for (order, links) in self.links.iter_mut().enumerate() {
                links.previous[place] = 0;
                if let Some(hash) = hash(order, &tokens[..=at]) {
                    let slot = slot(hash, links.heads.len());
                    links.previous[place] = std::mem::replace(&mut links.heads[slot], self.end as u32);
                }
            }
            self.end += 1;
        }
        let place = self.place(self.end);
        self.tokens[place] = END;
        self.end += 1;
    }
}

fn hash(order: usize, context: &[Token]) -> Option<u64> {
    let mut hash = Hash::default();
    let start = context.len().checked_sub(ORDERS[order])?;
    context[start..].iter().rev().for_each(|&token| hash.add(token));
    Some(hash.wide())
}

fn slot(hash: u64, slots: usize) -> usize {
    ((u128::from(hash) * slots as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(store: &LiveStore, context: &[Token]) -> Vec<(u32, Vec<Token>)> {
        let mut found = Vec::new();
        store.matches(context, 32, 64, &mut found);
        let mut out = [0; 4];
        let mut read = |m: &Match| {
            let count = store.continuation(m.position, &mut out);
            (m.length, out[..count].to_vec())
        };
        found.iter().map(&mut read).collect()
    }

    #[test]
    fn finds_what_was_committed_newest_first() {
        let store = LiveStore::new(1 << 20);
        store.commit(&[1, 2, 3, 4, 5]);
        store.commit(&[9, 2, 3, 7]);
        assert_eq!(matches(&store, &[1, 2, 3]), [(2, vec![7]), (3, vec![4, 5])]);
        assert_eq!(store.len(), (9, 2));
    }

    #[test]
    fn known_text_is_not_stored_again() {
        let store = LiveStore::new(1 << 20);
        let text: Vec<Token> = (0..500).collect();
        store.commit(&text);
        store.commit(&text);
        assert!(store.len().0 < 500 + 2 * KNOWN, "{:?}", store.len());
        let longer = [&text[..], &[1000, 1001, 1002, 1003]].concat();
        store.commit(&longer);
        assert!(matches(&store, &[498, 499, 1000]).contains(&(3, vec![1001, 1002, 1003])));
    }

    #[test]
    fn what_is_used_stays_longer() {
        let store = LiveStore::new(BYTES * 1024);
        let document = |n: u32| (n * 100..n * 100 + 50).collect::<Vec<_>>();
        store.commit(&document(0));
        let mut found = Vec::new();
        store.matches(&[10, 11], 32, 64, &mut found);
        store.credit(found[0].position);
        (1..25).for_each(|n| store.commit(&document(n)));
        assert!(!matches(&store, &[10, 11]).is_empty());
        assert!(matches(&store, &[110, 111]).is_empty());
        (25..80).for_each(|n| store.commit(&document(n)));
        assert!(matches(&store, &[10, 11]).is_empty(), "one use is not for ever");
    }

    proptest! {
        #[test]
        fn holds_its_limit_and_matches_truly(documents in prop::collection::vec(prop::collection::vec(0u32..6, 0..200), 1..60)) {
            let limit = BYTES * 600;
            let store = LiveStore::new(limit);
            for document in &documents {
                store.commit(document);
                prop_assert!(store.memory_bytes() <= limit + 256 * size_of::<Document>());
                let context = &document[..document.len() / 2];
                let mut found = Vec::new();
                store.matches(context, 32, 64, &mut found);
                for m in found {
                    let mut text = vec![0; m.length as usize];
                    prop_assert_eq!(store.continuation(m.position - u64::from(m.length), &mut text), text.len());
                    prop_assert_eq!(&text[..], &context[context.len() - text.len()..]);
                }
            }
            // the newest document is there, as far as one document may fill the store
            if let Some(document) = documents.last().filter(|document| document.len() > 3) {
                let kept = &document[document.len().saturating_sub(600 / 4)..];
                let mut found = Vec::new();
                store.matches(&kept[..3], 32, 64, &mut found);
                prop_assert!(!found.is_empty());
            }
        }
    }
}
