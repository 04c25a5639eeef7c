//! The incremental index over one request's tokens: for every position, the previous position with the same
//! last `k` tokens, for a few lengths `k`.
//!
//! Appending costs one hash-table look-up per length, whatever the context; removing the newest token is the
//! exact inverse. Longer matches than the longest length are found by comparing backwards from the positions
//! on its chain.
//!
//! Forks share what they have in common: an immutable *base*, and on top of it each one's own positions and the
//! heads that differ from the base's.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::memory::{MemoryFull, Reservation, try_clone, try_reserve};
use crate::{MAX_TOKEN, Token};

/// The context lengths that have a chain of their own.
pub const ORDERS: [usize; 6] = [1, 2, 3, 4, 6, 10];
/// Marks the end of a chain.
pub const NONE: u32 = u32::MAX;

/// The lengths whose links stand beside the token.
const NEAR: usize = 3;

/// Fewer own positions than this are copied by a fork, whatever the share of the whole.
const FEW: usize = 64;

#[derive(Default)]
pub struct Index {
    tokens: Vec<Token>,
    /// Shared with forks of this index.
    base: Option<Arc<Base>>,
    /// Positions below this one are the base's.
    kept: usize,
    own: Layer,
}

/// A layer that forks share, with the bytes charged for it.
struct Base {
    layer: Layer,
    reservation: Reservation,
}

/// A position's token and, for the lengths that are looked up most, the previous position on the chain or `NONE`:
/// a sample is found and read in one or two lines of the cache.
#[derive(Clone, Copy)]
struct Links {
    token: Token,
    previous: [u32; NEAR],
}

/// Reads ahead of a draft what the draft will read, and so brings it near the processor. Several that advance in
/// turn wait for memory together.
#[derive(Clone, Copy)]
pub struct Lookahead {
    position: u32,
    left: u32,
    /// What was read, so that nobody can leave the reads out.
    seen: u32,
}

/// Tokens to be appended, and occurrences of the last one, that are looked at ahead.
const TOKENS_AHEAD: usize = 4;
const AHEAD: u32 = 64;
/// The same where longer matches make the others less important.
const AHEAD_BESIDE_LONGER: u32 = 24;

/// Positions with their chains, and the newest position of each context.
#[derive(Default)]
struct Layer {
    links: Vec<Links>,
    /// For each position and further length, the previous position on the chain or `NONE`.
    far: Vec<[u32; ORDERS.len() - NEAR]>,
    /// Above a base, only what differs from the base's; `NONE` then hides a context.
    heads: [Heads; ORDERS.len()],
}

impl Index {
    /// Indexes tokens that nobody has reserved memory for.
    pub fn append(&mut self, tokens: &[Token]) -> Result<(), MemoryFull> {
        self.reserve(tokens.len())?;
        tokens.iter().for_each(|&token| self.push(token));
        Ok(())
    }

    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// Indexes one more token, for which memory was reserved. The caller keeps the length below `NONE`.
    pub fn push(&mut self, token: Token) {
        let position = self.tokens.len() as u32;
        // placeholders are told apart by their places, so that no search finds one by another
        self.tokens.push(if token > MAX_TOKEN { position | !MAX_TOKEN } else { token });
        let mut links = [NONE; ORDERS.len()];
        let (hashes, known) = hashes(&self.tokens);
        for order in 0..known {
            links[order] = match self.own.heads[order].insert(hashes[order], position) {
                Some(previous) => previous,
                None => self.base.as_ref().map_or(NONE, |base| base.layer.heads[order].find(hashes[order])),
            };
        }
        self.own.push(token, links);
    }

    /// Forgets the newest tokens, down to `len` of them. Above a base it takes memory: see `reserve_pops`.
    pub fn truncate(&mut self, len: usize) {
        while self.tokens.len() > len {
            self.pop();
        }
    }

    fn pop(&mut self) {
        let (hashes, known) = hashes(&self.tokens);
        self.tokens.pop();
        let base = self.base.as_deref().map(|base| &base.layer);
        let links = match (self.own.pop(), base) {
            (Some(links), _) => links,
            (None, Some(base)) => {
                self.kept -= 1;
                base.links_of(self.kept)
            }
            (None, None) => return,
        };
        for order in 0..known {
            let (hash, previous) = (hashes[order], links[order]);
            if previous == base.map_or(NONE, |base| base.heads[order].find(hash)) {
                self.own.heads[order].remove(hash);
            } else {
                self.own.heads[order].insert(hash, previous);
            }
        }
    }

    /// Another index with the same tokens, in time proportional to what was appended or forgotten since the
    /// last fork (amortized), and four bytes per token. What comes to be shared is charged once, and `reservation` pays
    /// for this index alone.
    pub fn fork(&mut self, reservation: &mut Reservation) -> Result<Self, MemoryFull> {
        if !self.is_light() {
            self.share(reservation)?;
        }
        Ok(Self {
            tokens: try_clone(&self.tokens)?,
            base: self.base.clone(),
            kept: self.kept,
            own: self.own.try_clone()?,
        })
    }

    /// Moves everything into a base.
    fn share(&mut self, reservation: &mut Reservation) -> Result<(), MemoryFull> {
        self.reclaim(reservation);
        let mut paid = reservation.new_empty();
        let layer = match &self.base {
            None => std::mem::take(&mut self.own),
            Some(base) => {
                // both are there for a moment
                paid.try_resize(base.layer.memory_bytes() + 2 * self.own.memory_bytes())?;
                let mut layer = base.layer.try_clone()?;
                layer.overlay(self.kept, &mut self.own)?;
                layer
            }
        };
        if self.base.is_none() {
            paid = reservation.split(layer.memory_bytes());
        }
        paid.try_resize(layer.memory_bytes())?;
        self.kept = layer.links.len();
        self.base = Some(Arc::new(Base { layer, reservation: paid }));
        Ok(())
    }

    /// Takes the base back once no fork shares it any more, if there is memory for both at once.
    pub fn reclaim(&mut self, reservation: &mut Reservation) {
        if let Some(base) = self.base.as_mut().and_then(Arc::get_mut)
            && base.layer.overlay(self.kept, &mut self.own).is_ok()
            && let Some(base) = self.base.take().and_then(Arc::into_inner)
        {
            let Base { layer, reservation: paid } = base;
            self.own = layer;
            self.kept = 0;
            reservation.merge(paid);
        }
    }

    /// Bytes that a fork will hold alone.
    pub fn fork_bytes(&self) -> usize {
        let own = if self.is_light() { self.own.memory_bytes() } else { 0 };
        self.tokens.len() * size_of::<Token>() + own
    }

    /// Whether a fork copies what stands above the base.
    fn is_light(&self) -> bool {
        self.own.len() <= FEW.max(self.tokens.len() / 4)
    }

    /// Bytes held for this index alone after `count` tokens have been forgotten, at most. What is forgotten below
    /// a base takes memory.
    pub fn bytes_after_pops(&self, count: usize) -> usize {
        self.bytes_with(0) + self.heads_bytes(self.below_base(count)) - self.heads_bytes(0)
    }

    fn heads_bytes(&self, more: usize) -> usize {
        self.own.heads.iter().map(|heads| heads.slots_with(more) * size_of::<Slot>()).sum()
    }

    /// Takes the memory for `tokens` more tokens, whatever they are.
    pub fn reserve(&mut self, tokens: usize) -> Result<(), MemoryFull> {
        let room = |capacity, len| grown(capacity, len, tokens) - len;
        let (held, links) = (self.tokens.len(), self.own.links.len());
        let tokens_room = room(self.tokens.capacity(), held);
        try_reserve(&mut self.tokens, tokens_room)?;
        let links_room = room(self.own.links.capacity(), links);
        try_reserve(&mut self.own.links, links_room)?;
        let far_room = room(self.own.far.capacity(), links);
        try_reserve(&mut self.own.far, far_room)?;
        self.own.reserve_heads(tokens)
    }

    /// Takes the memory for forgetting `count` tokens.
    pub fn reserve_pops(&mut self, count: usize) -> Result<(), MemoryFull> {
        self.own.reserve_heads(self.below_base(count))
    }

    /// How many of the newest `count` tokens are the base's. The heads of the others are this index's own already.
    fn below_base(&self, count: usize) -> usize {
        count.saturating_sub(self.own.links.len())
    }

    /// Bytes held for this index alone after `reserve(tokens)`.
    pub fn bytes_with(&self, tokens: usize) -> usize {
        let own = &self.own;
        let links = grown(own.links.capacity(), own.links.len(), tokens) * size_of::<Links>();
        let far = grown(own.far.capacity(), own.far.len(), tokens) * size_of::<[u32; ORDERS.len() - NEAR]>();
        let tokens_bytes = grown(self.tokens.capacity(), self.tokens.len(), tokens) * size_of::<Token>();
        tokens_bytes + links + far + self.heads_bytes(tokens)
    }

    /// The token at `position`, read from beside its links.
    pub fn token(&self, position: u32) -> Token {
        let (layer, at) = self.layer(position);
        layer.links[at].token
    }

    /// The previous position that ends the same `ORDERS[order]` tokens as `position`, or `NONE`.
    pub fn previous(&self, order: usize, position: u32) -> u32 {
        let (layer, at) = self.layer(position);
        match order.checked_sub(NEAR) {
            None => layer.links[at].previous[order],
            Some(far) => layer.far[at][far],
        }
    }

    /// Begins to read what appending `tokens` and drafting after them will read.
    pub fn look_ahead(&self, tokens: &[Token]) -> Lookahead {
        const KNOWN: usize = ORDERS[ORDERS.len() - 1];
        let tokens = &tokens[tokens.len().saturating_sub(TOKENS_AHEAD)..];
        let before = &self.tokens[self.tokens.len().saturating_sub(KNOWN)..];
        let mut tail = [0; KNOWN + TOKENS_AHEAD];
        tail[..before.len()].copy_from_slice(before);
        tail[before.len()..][..tokens.len()].copy_from_slice(tokens);
        let tail = &tail[..before.len() + tokens.len()];
        let mut lookahead = Lookahead { position: NONE, left: AHEAD, seen: 0 };
        for end in before.len() + 1..=tail.len() {
            let (hashes, known) = hashes(&tail[..end]);
            for layer in std::iter::once(&self.own).chain(self.base.iter().map(|base| &base.layer)) {
                for (heads, &hash) in layer.heads.iter().zip(&hashes[..known]) {
                    let slot = heads.slots.get(heads.home(hash));
                    lookahead.seen ^= slot.map_or(0, |slot| slot.position);
                }
            }
        }
        if let Some(last) = tail.last() {
            lookahead.position = self.newest(0, std::slice::from_ref(last));
        }
        if let &[.., before, last] = tail
            && self.newest(1, &[last, before]) != NONE
        {
            lookahead.left = AHEAD_BESIDE_LONGER;
        }
        lookahead
    }

    /// Goes on to the next earlier occurrence of the last token; false if there is none.
    pub fn advance(&self, lookahead: &mut Lookahead) -> bool {
        if lookahead.position == NONE || lookahead.left == 0 {
            return false;
        }
        let (layer, at) = self.layer(lookahead.position);
        // samples are compared with the tokens before, and read on
        let next = layer.links.get(at + 1).map_or(0, |next| next.token);
        lookahead.seen ^= layer.links[at.saturating_sub(3)].token ^ next;
        lookahead.position = layer.links[at].previous[0];
        lookahead.left -= 1;
        true
    }

    /// The layer that has `position`, and where.
    fn layer(&self, position: u32) -> (&Layer, usize) {
        let position = position as usize;
        match &self.base {
            Some(base) if position < self.kept => (&base.layer, position),
            _ => (&self.own, position - self.kept),
        }
    }

    /// The newest position that ends the first `ORDERS[order]` tokens of `context`, which is given newest first;
    /// or `NONE`.
    pub fn newest(&self, order: usize, context: &[Token]) -> u32 {
        let mut hash = Hash::default();
        let Some(context) = context.get(..ORDERS[order]) else { return NONE };
        context.iter().for_each(|&token| hash.add(token));
        let hash = hash.finish();
        match (self.own.heads[order].get(hash), &self.base) {
            (Some(position), _) => position,
            (None, Some(base)) => base.layer.heads[order].find(hash),
            (None, None) => NONE,
        }
    }

    /// How many tokens that end at `position` agree with `context`, which is given newest first.
    pub fn match_length(&self, position: u32, context: &[Token]) -> usize {
        let (layer, at) = self.layer(position);
        // four tokens beside the links, then the tokens themselves
        let near = layer.links[at.saturating_sub(3)..=at].iter().rev();
        let length = near.zip(context).take_while(|(links, expected)| links.token == **expected).count();
        if length < 4 && length <= at {
            return length;
        }
        let newest = self.tokens[..=position as usize].iter().rev();
        newest.zip(context).take_while(|(token, expected)| token == expected).count()
    }

    /// Compares everything with an index made anew.
    pub fn check(&self) -> Result<(), String> {
        let mut fresh = Self::default();
        fresh.append(&self.tokens).map_err(|full| full.to_string())?;
        if self.kept + self.own.links.len() != self.tokens.len() {
            return Err(format!("{} + {} links", self.kept, self.own.links.len()));
        }
        for position in 0..self.tokens.len() {
            for order in 0..ORDERS.len() {
                if self.previous(order, position as u32) != fresh.previous(order, position as u32) {
                    return Err(format!("the link of order {order} at {position} is wrong"));
                }
            }
            for (order, length) in
                ORDERS.into_iter().enumerate().filter(|&(_, length)| length <= position + 1)
            {
                let context: Vec<_> = self.tokens[..=position].iter().rev().take(length).copied().collect();
                if self.newest(order, &context) != fresh.newest(order, &context) {
                    return Err(format!("the head of order {order} at {position} is wrong"));
                }
            }
        }
        for (own, fresh) in self.own.heads.iter().zip(&fresh.own.heads) {
            if own.slots.iter().filter(|slot| slot.hash != 0).count() != own.used
                || (self.base.is_none() && own.used != fresh.used)
            {
                return Err(format!("{} heads instead of {}", own.used, fresh.used));
            }
        }
        Ok(())
    }

    /// Bytes held for this index alone, and bytes of the base that it may share with forks.
    pub fn memory_bytes(&self) -> (usize, usize) {
        let base = self.base.as_ref().map_or(0, |base| base.layer.memory_bytes());
        (self.tokens.capacity() * size_of::<Token>() + self.own.memory_bytes(), base)
    }
}

impl Layer {
    fn push(&mut self, token: Token, links: [u32; ORDERS.len()]) {
        let (previous, far) = (std::array::from_fn(|i| links[i]), std::array::from_fn(|i| links[NEAR + i]));
        self.links.push(Links { token, previous });
        self.far.push(far);
    }

    fn pop(&mut self) -> Option<[u32; ORDERS.len()]> {
        let links = self.links.len().checked_sub(1).map(|at| self.links_of(at))?;
        self.links.pop();
        self.far.pop();
        Some(links)
    }

    fn links_of(&self, at: usize) -> [u32; ORDERS.len()] {
        let (near, far) = (&self.links[at].previous, &self.far[at]);
        std::array::from_fn(|i| if i < NEAR { near[i] } else { far[i - NEAR] })
    }

    /// How much there is to copy.
    fn len(&self) -> usize {
        self.heads.iter().map(|heads| heads.used).fold(self.links.len(), usize::max)
    }

    /// Cuts this layer to `kept` positions and puts on top of it what is `above`, which is then empty. If there is no
    /// memory for it, nothing changes.
    fn overlay(&mut self, kept: usize, above: &mut Self) -> Result<(), MemoryFull> {
        let more = (kept + above.links.len()).saturating_sub(self.links.len());
        try_reserve(&mut self.links, more)?;
        try_reserve(&mut self.far, more)?;
        for (heads, above) in self.heads.iter_mut().zip(&above.heads) {
            heads.reserve(above.used)?;
        }
        let above = std::mem::take(above);
        self.links.truncate(kept);
        self.links.extend(above.links);
        self.far.truncate(kept);
        self.far.extend(above.far);
        for (heads, above) in self.heads.iter_mut().zip(above.heads) {
            for Slot { hash, position } in above.slots.into_iter().filter(|slot| slot.hash != 0) {
                if position == NONE {
                    heads.remove(hash);
                } else {
                    heads.insert(hash, position);
                }
            }
        }
        Ok(())
    }

    fn reserve_heads(&mut self, more: usize) -> Result<(), MemoryFull> {
        self.heads.iter_mut().try_for_each(|heads| heads.reserve(more))
    }

    fn try_clone(&self) -> Result<Self, MemoryFull> {
        let (links, far) = (try_clone(&self.links)?, try_clone(&self.far)?);
        let mut copy = Self { links, far, ..Self::default() };
        for (copy, heads) in copy.heads.iter_mut().zip(&self.heads) {
            *copy = Heads { slots: try_clone(&heads.slots)?, ..*heads };
        }
        Ok(copy)
    }

    fn memory_bytes(&self) -> usize {
        let heads: usize = self.heads.iter().map(Heads::memory_bytes).sum();
        let links = self.links.capacity() * size_of::<Links>();
        links + self.far.capacity() * size_of::<[u32; ORDERS.len() - NEAR]>() + heads
    }
}

/// The capacity for `more` items: a quarter of it may be spare.
pub fn grown(capacity: usize, len: usize, more: usize) -> usize {
    if len + more <= capacity { capacity } else { (len + more).max(capacity + capacity / 4 + 16) }
}

/// The hashes of the contexts that end `tokens`, and how many of them there are.
fn hashes(tokens: &[Token]) -> ([u32; ORDERS.len()], usize) {
    let mut hashes = [0; ORDERS.len()];
    let (mut hash, mut hashed, mut known) = (Hash::default(), 0, 0);
    for (order, length) in ORDERS.into_iter().enumerate().take_while(|&(_, length)| length <= tokens.len()) {
        tokens.iter().rev().take(length).skip(hashed).for_each(|&token| hash.add(token));
        (hashes[order], hashed, known) = (hash.finish(), length, order + 1);
    }
    (hashes, known)
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
/// collision merges two chains, which readers see as a match that is too short. Where a hash has its slot is secret, so
/// that no choice of tokens crowds slots together.
#[derive(Default)]
struct Heads {
    slots: Vec<Slot>,
    used: usize,
    seed: Seed,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// 0 in a vacant slot.
    hash: u32,
    position: u32,
}

#[derive(Clone, Copy)]
struct Seed(u64, u64);

impl Default for Seed {
    fn default() -> Self {
        let random = RandomState::new();
        Self(random.hash_one(0), random.hash_one(1) | 1)
    }
}

/// Slots that are passed on the way to one's own, at most: with ten million entries hardly ever half as many. A table
/// where it is more changes its seed.
const PROBES: usize = 1024;

impl Heads {
    fn get(&self, hash: u32) -> Option<u32> {
        self.slots.get(self.locate(hash)).filter(|slot| slot.hash == hash).map(|slot| slot.position)
    }

    /// The newest position, or `NONE`.
    fn find(&self, hash: u32) -> u32 {
        self.get(hash).unwrap_or(NONE)
    }

    /// Makes `position` the newest one of `hash` and returns the one before. Room for it was reserved.
    fn insert(&mut self, hash: u32, position: u32) -> Option<u32> {
        let index = self.locate(hash);
        let slot = &mut self.slots[index];
        if slot.hash == hash {
            return Some(std::mem::replace(&mut slot.position, position));
        }
        self.used += 1;
        *slot = Slot { hash, position };
        if self.distance(hash, index) > PROBES {
            self.reseed();
        }
        None
    }

    fn remove(&mut self, hash: u32) {
        let mask = self.slots.len().wrapping_sub(1);
        let mut vacant = self.locate(hash);
        if self.slots.get(vacant).is_none_or(|slot| slot.hash != hash) {
            return;
        }
        self.used -= 1;
        // what stands behind moves up, unless it would leave the way from its own place
        let mut index = vacant;
        loop {
            index = (index + 1) & mask;
            let slot = self.slots[index];
            if slot.hash == 0 {
                break;
            }
            if self.distance(slot.hash, index) >= index.wrapping_sub(vacant) & mask {
                self.slots[vacant] = slot;
                vacant = index;
            }
        }
        self.slots[vacant] = Slot::default();
    }

    /// Takes the memory for `more` entries.
    fn reserve(&mut self, more: usize) -> Result<(), MemoryFull> {
        let slots = self.slots_with(more);
        if slots == self.slots.len() {
            return Ok(());
        }
        let mut new = Vec::new();
        try_reserve(&mut new, slots)?;
        new.resize(slots, Slot::default());
        let old = std::mem::replace(&mut self.slots, new);
        self.place(old);
        Ok(())
    }

    /// Slots that hold `more` entries and leave a quarter vacant.
    fn slots_with(&self, more: usize) -> usize {
        let mut slots = self.slots.len();
        while (self.used + more) * 4 > slots * 3 {
            slots = (slots * 2).max(16);
        }
        slots
    }

    /// Where the way to the slot of `hash` begins. Any two hashes meet there as rarely as random numbers.
    fn home(&self, hash: u32) -> usize {
        let Seed(one, two) = self.seed;
        let product = u128::from(u64::from(hash) ^ one) * u128::from(two);
        ((product >> 64) as u64 ^ product as u64) as usize & self.slots.len().wrapping_sub(1)
    }

    /// Slots from the home of `hash` to `index`.
    fn distance(&self, hash: u32, index: usize) -> usize {
        index.wrapping_sub(self.home(hash)) & self.slots.len().wrapping_sub(1)
    }

    /// The slot of `hash`, or the vacant one where it belongs; 0 in an empty table.
    fn locate(&self, hash: u32) -> usize {
        let mask = self.slots.len().wrapping_sub(1);
        let mut index = self.home(hash);
        while let Some(slot) = self.slots.get(index) {
            if slot.hash == hash || slot.hash == 0 {
                return index;
            }
            index = (index + 1) & mask;
        }
        0
    }

    /// Gives every entry another place.
    fn reseed(&mut self) {
        let mut old = Vec::new();
        // without memory the table stays as it is: right, and slow
        if try_reserve(&mut old, self.used).is_ok() {
            old.extend(self.slots.iter().filter(|slot| slot.hash != 0));
            self.slots.fill(Slot::default());
            self.seed = Seed::default();
            self.place(old);
        }
    }

    fn place(&mut self, entries: Vec<Slot>) {
        for slot in entries.into_iter().filter(|slot| slot.hash != 0) {
            let index = self.locate(slot.hash);
            self.slots[index] = slot;
        }
    }

    fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryPool;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chains_link_equal_contexts(tokens in prop::collection::vec(0u32..4, 0..120)) {
            let mut index = Index::default();
            index.append(&tokens).unwrap();
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
            let mut index = Index::default();
            index.append(&tokens).unwrap();
            let context: Vec<_> = tokens.iter().rev().copied().collect();
            for position in 0..tokens.len() {
                let expected = (0..=position).take_while(|&i| tokens[position - i] == context[i]).count();
                prop_assert_eq!(index.match_length(position as u32, &context), expected);
            }
        }

        /// A family of forks under random operations: each member equals an index made anew.
        #[test]
        fn forks_and_truncations_leave_what_a_new_index_holds(
            operations in prop::collection::vec((0usize..6, 0usize..5, prop::collection::vec(0u32..3, 0..90)), 0..24),
        ) {
            let pool = Arc::new(MemoryPool::new(usize::MAX));
            let reservation = || Reservation::new(&pool, usize::MAX);
            let mut family = vec![(Index::default(), reservation(), Vec::new())];
            for (member, kind, tokens) in operations {
                let at = member % family.len();
                let (index, reservation, history) = &mut family[at];
                match kind {
                    0 | 1 => {
                        index.reclaim(reservation);
                        let expected = index.bytes_with(tokens.len());
                        index.reserve(tokens.len()).unwrap();
                        prop_assert_eq!(index.memory_bytes().0, expected);
                        tokens.iter().for_each(|&token| index.push(token));
                        prop_assert_eq!(index.memory_bytes().0, expected);
                        history.extend(tokens);
                    }
                    2 => {
                        history.truncate(history.len().saturating_sub(tokens.len() * 2));
                        index.reserve_pops(tokens.len() * 2).unwrap();
                        index.truncate(history.len());
                    }
                    3 => {
                        reservation.try_resize(index.memory_bytes().0).unwrap();
                        let fork = index.fork(reservation).unwrap();
                        let fork = (fork, reservation.new_empty(), history.clone());
                        family.push(fork);
                    }
                    _ if family.len() > 1 => drop(family.swap_remove(at)),
                    _ => {}
                }
                for (index, reservation, history) in &mut family {
                    reservation.try_resize(index.memory_bytes().0).unwrap();
                    prop_assert_eq!(index.tokens(), &history[..]);
                    prop_assert_eq!(index.check(), Ok(()));
                    let mut lookahead = index.look_ahead(&[1]);
                    let steps = std::iter::repeat(()).take_while(|()| index.advance(&mut lookahead)).count();
                    let occurrences = history.iter().filter(|&&token| token == 1).count();
                    prop_assert!(steps == occurrences.min(AHEAD as usize) || steps == AHEAD_BESIDE_LONGER as usize);
                }
                // every byte is charged once
                let own: usize = family.iter().map(|member| member.0.memory_bytes().0).sum();
                let mut bases: Vec<_> = family.iter().filter_map(|member| member.0.base.clone()).collect();
                bases.sort_by_key(Arc::as_ptr);
                bases.dedup_by_key(|base| Arc::as_ptr(base));
                let shared: usize = bases.iter().map(|base| base.layer.memory_bytes()).sum();
                prop_assert_eq!(pool.used(), own + shared);
            }
        }
    }

    /// Hashes whose slots would be one beside the other by any public rule.
    fn crowd(count: u32) -> impl Iterator<Item = u32> {
        (0..count).map(|n| n << 13 | 1)
    }

    #[test]
    fn no_choice_of_hashes_makes_ways_long() {
        let mut heads = Heads::default();
        heads.reserve(100_000).unwrap();
        crowd(100_000).for_each(|hash| _ = heads.insert(hash, hash));
        let ways = crowd(100_000).map(|hash| heads.distance(hash, heads.locate(hash)));
        assert!(ways.max().unwrap() < PROBES / 2);
    }

    #[test]
    fn a_table_whose_ways_are_long_takes_another_seed() {
        // a seed that makes slots of what is chosen
        let mut heads = Heads { seed: Seed(0, 1), ..Heads::default() };
        heads.reserve(3 * PROBES as usize).unwrap();
        let slots = heads.slots.len() as u32;
        let hashes = || (1..=3 * PROBES as u32).map(|n| n.wrapping_mul(slots) | 1);
        hashes().for_each(|hash| assert_eq!(heads.insert(hash, hash), None));
        assert!(heads.seed.1 != 1);
        hashes().for_each(|hash| assert_eq!(heads.find(hash), hash));
        assert!(hashes().all(|hash| heads.distance(hash, heads.locate(hash)) <= PROBES));
        hashes().for_each(|hash| heads.remove(hash));
        assert_eq!((heads.used, heads.slots.iter().filter(|slot| slot.hash != 0).count()), (0, 0));
    }

    #[test]
    fn forks_share_their_positions_and_give_them_back() {
        let mut index = Index::default();
        index.append(&(0..1000).map(|token| token % 7).collect::<Vec<_>>()).unwrap();
        let (alone, _) = index.memory_bytes();
        let mut reservation = Reservation::new(&Arc::new(MemoryPool::new(usize::MAX)), usize::MAX);
        reservation.try_resize(alone).unwrap();
        let mut forks: Vec<_> = (0..8).map(|_| index.fork(&mut reservation).unwrap()).collect();
        forks.iter_mut().for_each(|fork| fork.append(&[1]).unwrap());
        let (own, base) = forks[0].memory_bytes();
        assert!(own < 10_000 && own + base <= alone + 10_000);
        drop(forks);
        index.reclaim(&mut reservation);
        assert_eq!((index.memory_bytes().1, reservation.bytes()), (0, alone));
        assert_eq!(index.check(), Ok(()));
    }
}
