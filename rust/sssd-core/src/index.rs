//! The incremental index over one request's tokens: for every position, the previous position with the same
//! last `k` tokens, for a few lengths `k`.
//!
//! Appending costs one hash-table look-up per length, whatever the context; removing the newest token is the
//! exact inverse. Longer matches than the longest length are found by comparing backwards from the positions
//! on its chain.

use crate::Token;

/// The context lengths that have a chain of their own.
pub const ORDERS: [usize; 6] = [1, 2, 3, 4, 6, 10];
/// Marks the end of a chain.
pub const NONE: u32 = u32::MAX;

#[derive(Clone, Default)]
pub struct Index {
    tokens: Vec<Token>,
    chains: [Chain; ORDERS.len()],
}

/// Links the positions that end the same `k` tokens, newest first.
#[derive(Clone, Default)]
struct Chain {
    heads: Heads,
    /// For each position, the previous one on its chain or `NONE`.
    previous: Vec<u32>,
}

impl Index {
    pub fn with_capacity(tokens: usize) -> Self {
        let chain = |_| Chain { heads: Heads::default(), previous: Vec::with_capacity(tokens) };
        Self { tokens: Vec::with_capacity(tokens), chains: std::array::from_fn(chain) }
    }

    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// Indexes one more token. The caller keeps the length below `NONE`.
    pub fn push(&mut self, token: Token) {
        let position = self.tokens.len() as u32;
        self.tokens.push(token);
        let mut hash = Hash::default();
        let mut hashed = 0;
        for (chain, order) in self.chains.iter_mut().zip(ORDERS) {
            if order > self.tokens.len() {
                chain.previous.push(NONE);
                continue;
            }
            for &token in self.tokens.iter().rev().take(order).skip(hashed) {
                hash.add(token);
            }
            hashed = order;
            let previous = chain.heads.replace(hash, position);
            chain.previous.push(previous);
        }
    }

    /// The previous position that ends the same `ORDERS[order]` tokens as `position`, or `NONE`.
    pub fn previous(&self, order: usize, position: u32) -> u32 {
        self.chains[order].previous[position as usize]
    }

    /// The newest position that ends the first `ORDERS[order]` tokens of `context`, which is given newest first;
    /// or `NONE`.
    pub fn newest(&self, order: usize, context: &[Token]) -> u32 {
        let mut hash = Hash::default();
        let Some(context) = context.get(..ORDERS[order]) else { return NONE };
        context.iter().for_each(|&token| hash.add(token));
        self.chains[order].heads.find(hash)
    }

    /// How many tokens that end at `position` agree with `context`, which is given newest first.
    pub fn match_length(&self, position: u32, context: &[Token]) -> usize {
        let ending = self.tokens[..=position as usize].iter().rev();
        ending.zip(context).take_while(|(token, expected)| token == expected).count()
    }

    pub fn memory_bytes(&self) -> usize {
        let chains: usize =
            self.chains.iter().map(|c| c.previous.capacity() * 4 + c.heads.memory_bytes()).sum();
        self.tokens.capacity() * 4 + chains
    }
}

/// A hash of tokens, newest first, that can be extended to longer contexts.
#[derive(Clone, Copy, Default)]
pub struct Hash(u64);

impl Hash {
    pub fn add(&mut self, token: Token) {
        self.0 = (self.0.rotate_left(23) ^ (u64::from(token) + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// 64 bits, well mixed in the upper half.
    pub fn wide(self) -> u64 {
        (self.0 ^ (self.0 >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    /// 32 well mixed bits, never 0.
    fn finish(self) -> u32 {
        (self.wide() >> 32) as u32 | 1
    }
}

/// An open-addressing table from context hash to newest position. A context is known by its hash alone: a
/// collision merges two chains, which readers see as a match that is too short.
#[derive(Clone, Default)]
struct Heads {
    slots: Vec<Slot>,
    used: usize,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// 0 in a vacant slot.
    hash: u32,
    position: u32,
}

impl Heads {
    fn find(&self, hash: Hash) -> u32 {
        let hash = hash.finish();
        match self.slots.get(self.locate(hash)) {
            Some(slot) if slot.hash == hash => slot.position,
            _ => NONE,
        }
    }

    /// Makes `position` the newest one of `hash` and returns the one before.
    fn replace(&mut self, hash: Hash, position: u32) -> u32 {
        if self.used * 4 >= self.slots.len() * 3 {
            self.grow();
        }
        let hash = hash.finish();
        let index = self.locate(hash);
        let slot = &mut self.slots[index];
        if slot.hash == hash {
            return std::mem::replace(&mut slot.position, position);
        }
        self.used += 1;
        *slot = Slot { hash, position };
        NONE
    }

    /// The slot of `hash`, or the vacant one where it belongs; 0 in an empty table.
    fn locate(&self, hash: u32) -> usize {
        let mask = self.slots.len().wrapping_sub(1);
        let mut index = (hash >> 1) as usize & mask;
        while let Some(slot) = self.slots.get(index) {
            if slot.hash == hash || slot.hash == 0 {
                return index;
            }
            index = (index + 1) & mask;
        }
        0
    }

    fn grow(&mut self) {
        let slots = vec![Slot::default(); (self.slots.len() * 2).max(16)];
        for slot in std::mem::replace(&mut self.slots, slots) {
            if slot.hash != 0 {
                let index = self.locate(slot.hash);
                self.slots[index] = slot;
            }
        }
    }

    fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chains_link_equal_contexts(tokens in prop::collection::vec(0u32..4, 0..120)) {
            let mut index = Index::with_capacity(0);
            tokens.iter().for_each(|&token| index.push(token));
            prop_assert_eq!(index.tokens(), &tokens[..]);
            for (order, length) in ORDERS.into_iter().enumerate() {
                for end in length..=tokens.len() {
                    let context = &tokens[end - length..end];
                    let earlier = (length..end).rev().find(|&e| &tokens[e - length..e] == context);
                    let expected = earlier.map_or(NONE, |e| e as u32 - 1);
                    prop_assert_eq!(index.previous(order, end as u32 - 1), expected);
                    let newest = (length..=tokens.len()).rev().find(|&e| &tokens[e - length..e] == context);
                    let reversed: Vec<_> = context.iter().rev().copied().collect();
                    prop_assert_eq!(Some(index.newest(order, &reversed)), newest.map(|e| e as u32 - 1));
                }
            }
        }

        #[test]
        fn match_length_counts_backwards(tokens in prop::collection::vec(0u32..2, 1..60)) {
            let mut index = Index::with_capacity(0);
            tokens.iter().for_each(|&token| index.push(token));
            let context: Vec<_> = tokens.iter().rev().copied().collect();
            for position in 0..tokens.len() {
                let expected = (0..=position).take_while(|&i| tokens[position - i] == context[i]).count();
                prop_assert_eq!(index.match_length(position as u32, &context), expected);
            }
        }
    }
}
