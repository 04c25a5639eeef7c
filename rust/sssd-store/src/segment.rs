//! A segment: a packed text, its suffix array and the small tables that keep a look-up in the cache.
//!
//! A look-up goes from the first token's bucket of ranks, through the fences (the leading symbols of every 64th
//! suffix, in one `u64`), to at most 64 ranks of one stretch of the suffix array: only these touch the text.

use std::cmp::Ordering;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use sssd_core::Token;

use crate::bytes::Bytes;
use crate::format::{FENCE, SegmentEntry, symbol_bits};
use crate::packed::{LOAD_BITS, Packed, mask};
use crate::residency::{Everything, Reach, Residency};
use crate::tombstones::Living;
use crate::{Error, Result};

/// Ranks of the suffixes that start with a query.
pub type Interval = Range<u64>;

/// Fences that fill a line of the cache.
const CLOSE: u64 = 8;
/// Pages that a search asks for at most, for what may be found there.
const ASKED: usize = 16;

/// Tokens to look up, in the form in which the text is compared.
pub struct Query {
    first: Token,
    /// Leading bits of the symbols after the first, filled up with zeros and with ones.
    key: (u64, u64),
    /// Whether the key holds the whole query.
    exact: bool,
    /// The symbols after the first as they stand in the text, each with the mask of its valid bits.
    words: SmallVec<[(u64, u64); 16]>,
}

impl Query {
    /// `tokens` must not be empty and must lie in the vocabulary.
    pub fn new(tokens: &[Token], vocab_size: u32) -> Result<Self> {
        let bits = symbol_bits(vocab_size);
        let rest = &tokens[1..];
        let low = key(bits, rest.iter().map(|&token| u64::from(token) + 1));
        let used = (rest.len() as u64 * u64::from(bits)).min(64) as u32;
        let high = low | u64::MAX.checked_shr(used).unwrap_or(0);
        let chunks = rest.chunks((LOAD_BITS / bits) as usize);
        let mut words = SmallVec::new();
        words.try_reserve(chunks.len()).map_err(|_| Error::OutOfMemory("the tokens to look up".into()))?;
        words.extend(chunks.map(|chunk| {
            let word = chunk.iter().rev().fold(0, |word, &token| word << bits | (u64::from(token) + 1));
            (word, mask(bits * chunk.len() as u32))
        }));
        Ok(Self { first: tokens[0], key: (low, high), exact: rest.len() <= (64 / bits) as usize, words })
    }
}

/// The leading 64 bits of a string of symbols; compares as the string does.
pub fn key(bits: u32, symbols: impl IntoIterator<Item = u64>) -> u64 {
    let (mut key, mut room) = (0, u64::BITS);
    for symbol in symbols {
        if room <= bits {
            return key | symbol >> (bits - room);
        }
        room -= bits;
        key |= symbol << room;
    }
    key
}

/// A text of documents with its suffix array. Copies share the bytes.
#[derive(Clone)]
pub struct Segment {
    bytes: Arc<Bytes>,
    vocab_size: u32,
    symbol_bits: u32,
    position_bits: u32,
    rank_bits: u32,
    index_bits: u32,
    symbols: u64,
    suffixes: u64,
    sections: [Range<usize>; 6],
    living: Option<Arc<Living>>,
}

impl Segment {
    /// `entry` must have been accepted by [`crate::format::parse`] for these `bytes`.
    pub fn new(bytes: Arc<Bytes>, vocab_size: u32, entry: &SegmentEntry) -> Self {
        let sections = entry.sections.clone().map(|section| section.start as usize..section.end as usize);
        let [text, suffixes, ..] = sections.clone();
        bytes.advise_random(text);
        bytes.advise_random(suffixes);
        Self {
            bytes,
            vocab_size,
            symbol_bits: symbol_bits(vocab_size),
            position_bits: entry.position_bits(),
            rank_bits: entry.rank_bits(),
            index_bits: entry.successor_index_bits(),
            symbols: entry.symbols,
            suffixes: entry.suffixes,
            sections,
            living: None,
        }
    }

    /// Passes over the suffixes that do not live from now on.
    pub fn set_living(&mut self, living: Living) {
        self.living = Some(Arc::new(living));
    }

    /// Whether all suffixes live.
    pub fn is_whole(&self) -> bool {
        self.living.is_none()
    }

    /// Suffixes, the dead ones included.
    pub fn suffixes(&self) -> u64 {
        self.suffixes
    }

    /// Tokens and document ends.
    pub fn symbols(&self) -> u64 {
        self.symbols
    }

    /// Bytes of the text in the file.
    pub fn text_place(&self) -> Range<u64> {
        self.sections[0].start as u64..self.sections[0].end as u64
    }

    /// Reads at most `count` symbols from `position` on, a multiple of 8, without touching mapped pages. `bytes` is room
    /// for them as they stand in the file.
    pub fn read_symbols(
        &self,
        position: u64,
        count: usize,
        bytes: &mut Vec<u8>,
        out: &mut Vec<u32>,
    ) -> io::Result<()> {
        let place = (self.text_place().start, self.symbol_bits, self.symbols);
        self.read_packed(place, position, count, bytes, out)
    }

    /// Reads where at most `count` suffixes from `rank` on start, a multiple of 8, likewise.
    pub fn read_positions(
        &self,
        rank: u64,
        count: usize,
        bytes: &mut Vec<u8>,
        out: &mut Vec<u32>,
    ) -> io::Result<()> {
        let place = (self.sections[1].start as u64, self.position_bits, self.suffixes);
        self.read_packed(place, rank, count, bytes, out)
    }

    fn read_packed(
        &self,
        (start, width, total): (u64, u32, u64),
        position: u64,
        count: usize,
        bytes: &mut Vec<u8>,
        out: &mut Vec<u32>,
    ) -> io::Result<()> {
        let bits = u64::from(width);
        let count = total.saturating_sub(position).min(count as u64);
        let length = (count * bits).div_ceil(8) as usize;
        bytes.clear();
        bytes.try_reserve(length + size_of::<u64>())?;
        bytes.resize(length + size_of::<u64>(), 0); // room for the last load
        self.bytes.read(start + position / 8 * bits, &mut bytes[..length])?;
        out.clear();
        out.try_reserve(count as usize)?;
        let packed = Packed::new(bytes, width);
        out.extend((0..count).map(|index| packed.get(index) as u32));
        Ok(())
    }

    fn section(&self, index: usize) -> &[u8] {
        &self.bytes[self.sections[index].clone()]
    }

    fn view<R: Reach>(&self, section: usize, bits: u32, reach: R) -> View<'_, R> {
        View { packed: Packed::new(self.section(section), bits), start: self.sections[section].start, reach }
    }

    fn text<R: Reach>(&self, reach: R) -> View<'_, R> {
        self.view(0, self.symbol_bits, reach)
    }

    fn suffix_array<R: Reach>(&self, reach: R) -> View<'_, R> {
        self.view(1, self.position_bits, reach)
    }

    /// Where what is not in memory may be left out, what tells.
    pub fn residency(&self) -> Option<&Residency> {
        self.bytes.residency()
    }

    /// The living among the suffixes that start with `token`, numbered as [`Self::position`] takes them; nothing if that
    /// is out of reach.
    pub fn bucket<R: Reach>(&self, token: Token, reach: R) -> Option<Interval> {
        self.ranks(token, reach).map(|ranks| self.number(ranks))
    }

    #[inline]
    fn number(&self, ranks: Interval) -> Interval {
        match &self.living {
            None => ranks,
            Some(living) => living.rank(ranks.start)..living.rank(ranks.end),
        }
    }

    /// The symbol after the first of the suffix of this rank.
    pub fn symbol_after(&self, rank: u64) -> u64 {
        self.text(Everything).packed.get(self.suffix_array(Everything).packed.get(rank) + 1)
    }

    /// Ranks of the suffixes that start with `token`; nothing if that is out of reach.
    pub fn ranks<R: Reach>(&self, token: Token, reach: R) -> Option<Interval> {
        let buckets = self.view(2, self.rank_bits, reach);
        let start = buckets.get(u64::from(token))?.min(self.suffixes);
        Some(start..buckets.get(u64::from(token) + 1)?.clamp(start, self.suffixes))
    }

    /// Brings the bucket of `token` closer.
    pub fn prefetch_bucket(&self, token: Token) {
        Packed::new(self.section(2), self.rank_bits).prefetch(u64::from(token));
    }

    fn fence<R: Reach>(&self, index: u64, reach: R) -> Option<u64> {
        let at = usize::try_from(index).ok()?.saturating_mul(8);
        if !reach.has(self.sections[3].start.saturating_add(at), 8) {
            return None;
        }
        let bytes = self.section(3).get(at..).and_then(<[u8]>::first_chunk);
        Some(bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    fn prefetch_fence(&self, index: u64) {
        if let Some(byte) = self.section(3).get(8 * index as usize) {
            crate::packed::prefetch(byte);
        }
    }

    /// The living among the suffixes that start with the query, numbered as [`Self::position`] takes them, as far as they
    /// are within reach: nothing if none is known to be, though there may be some.
    pub fn interval<R: Reach>(&self, query: &Query, reach: R) -> Option<Interval> {
        self.search(query, reach).map(|ranks| self.number(ranks))
    }

    /// Ranks of the suffixes that start with the query, likewise.
    fn search<R: Reach>(&self, query: &Query, reach: R) -> Option<Interval> {
        let bucket = self.ranks(query.first, reach)?;
        if query.words.is_empty() || bucket.is_empty() {
            return Some(bucket);
        }
        let (text, suffixes) = (self.text(reach), self.suffix_array(reach));
        let order = |rank: u64| compare(text, suffixes.get(rank)?, query);
        let below = |rank: u64| order(rank).map(Ordering::is_lt);
        let not_above = |rank: u64| order(rank).map(Ordering::is_le);
        let fetch = |rank: u64| {
            if suffixes.sees(rank) {
                text.packed.prefetch(suffixes.packed.get(rank) + 1);
            }
        };

        let fences = bucket.start.div_ceil(FENCE)..bucket.end.div_ceil(FENCE);
        let near = |fence: u64| self.prefetch_fence(fence);
        let fence = |index: u64| self.fence(index, reach);
        let mut low = partition(fences.clone(), near, |index| Some(fence(index)? < query.key.0))?;
        let not_after = |index| Some(fence(index)? <= query.key.1);
        // most intervals are short
        let close = (low + CLOSE).min(fences.end);
        let far = close < fences.end && not_after(close)?;
        let mut high = partition(if far { close + 1..fences.end } else { low..close }, near, not_after)?;
        if !query.exact && low < high {
            let (equal, fetch) = (low..high, |fence| fetch(fence * FENCE));
            low = partition(equal.clone(), fetch, |fence| below(fence * FENCE))?;
            high = partition(low..equal.end, fetch, |fence| not_above(fence * FENCE))?;
        }
        // The rank at `fence` itself is settled; what lies between the fence before it and it is not.
        let stretch = |fence: u64| {
            let start = if fence == fences.start { bucket.start } else { (fence - 1) * FENCE + 1 };
            let end = if fence == fences.end { bucket.end } else { fence * FENCE };
            start..end
        };
        let (first, last) = (stretch(low), stretch(high));
        let whole = || {
            let start = partition(first.clone(), fetch, below)?;
            let end = partition(start.max(last.start)..last.end.max(start), fetch, not_above)?;
            Some(start..end)
        };
        whole().or_else(|| self.part(query, first.clone(), last.clone(), reach))
    }

    /// The interval that begins in the stretch `first` and ends in `last`, of which not all is within reach: from the
    /// first to the last rank that is known to belong to it.
    #[cold]
    fn part<R: Reach>(&self, query: &Query, first: Interval, last: Interval, reach: R) -> Option<Interval> {
        const EQUAL: Option<Ordering> = Some(Ordering::Equal);
        let (text, suffixes) = (self.text(reach), self.suffix_array(reach));
        // each place is read once, when all are on their way
        let orders = |stretch: &Interval| {
            let seen = |rank| suffixes.sees(rank).then(|| suffixes.packed.get(rank));
            let place = |rank| seen(rank).filter(|&at| text.sees(at + 1));
            let places: SmallVec<[Option<u64>; FENCE as usize]> = stretch.clone().map(place).collect();
            places.iter().flatten().for_each(|&at| text.packed.prefetch(at + 1));
            let orders = places.iter().map(|&place| compare(text, place?, query));
            orders.collect::<SmallVec<[Option<Ordering>; FENCE as usize]>>()
        };
        let found = orders(&first);
        if first == last {
            let below = found.iter().rposition(|&order| order == Some(Ordering::Less)).map_or(0, |at| at + 1);
            let above =
                found.iter().position(|&order| order == Some(Ordering::Greater)).unwrap_or(found.len());
            // what may belong to it is of use when the next draft looks here
            let unseen = (below..above).filter(|&at| found[at].is_none()).take(ASKED);
            unseen.filter_map(|at| suffixes.get(first.start + at as u64)).for_each(|at| _ = text.has(at + 1));
            let start = found.iter().position(|&order| order == EQUAL)? as u64;
            let end = found.iter().rposition(|&order| order == EQUAL)? as u64;
            return Some(first.start + start..first.start + end + 1);
        }
        // the fences between them belong to it
        let start = found.iter().position(|&order| order == EQUAL).unwrap_or(found.len()) as u64;
        let end = orders(&last).iter().rposition(|&order| order == EQUAL).map_or(0, |at| at as u64 + 1);
        let start = first.start + start;
        Some(start..(last.start + end).max(start))
    }

    /// Where the living suffix of this number starts: its rank, if all live.
    #[inline]
    pub fn position<R: Reach>(&self, number: u64, reach: R) -> Option<u64> {
        let rank = self.living.as_ref().map_or(number, |living| living.select(number));
        self.suffix_array(reach).get(rank)
    }

    /// Whether the text at `position` is within reach; if not, it is asked for.
    #[inline]
    pub fn has(&self, position: u64, reach: impl Reach) -> bool {
        self.text(reach).has(position)
    }

    /// Whether it is.
    #[inline]
    pub fn sees(&self, position: u64, reach: impl Reach) -> bool {
        self.text(reach).sees(position)
    }

    /// Brings the entry of this number closer, where it is that of the rank.
    #[inline]
    pub fn prefetch_position(&self, number: u64) {
        if self.living.is_none() {
            self.suffix_array(Everything).packed.prefetch(number);
        }
    }

    /// Brings the text at `position` closer.
    #[inline]
    pub fn prefetch(&self, position: u64) {
        self.text(Everything).packed.prefetch(position);
    }

    /// Copies the tokens from `position` on, at most to the end of the document or of what is within reach.
    #[inline]
    pub fn continuation<R: Reach>(&self, position: u64, out: &mut [Token], reach: R) -> usize {
        let text = self.text(reach);
        let per_load = (LOAD_BITS / self.symbol_bits) as usize;
        let mut copied = 0;
        for chunk in out.chunks_mut(per_load) {
            let Some(mut word) = text.load(position.saturating_add(copied as u64)) else { return copied };
            for slot in chunk {
                let symbol = word & mask(self.symbol_bits);
                let ended = symbol == 0 || symbol > u64::from(self.vocab_size);
                if ended || position + copied as u64 >= self.symbols {
                    return copied;
                }
                *slot = (symbol - 1) as Token;
                word >>= self.symbol_bits;
                copied += 1;
            }
        }
        copied
    }

    /// Whether the successors of `token` are within reach.
    pub fn has_successors<R: Reach>(&self, token: Token, reach: R) -> bool {
        if self.living.is_some() {
            return true; // theirs are in memory
        }
        let index = self.view(4, self.index_bits, reach);
        let entries = self.view(5, self.symbol_bits + 8, reach);
        let (start, end) = (index.get(u64::from(token)), index.get(u64::from(token) + 1));
        let Some((start, end)) = start.zip(end) else { return false };
        // fewer bytes than a page has
        let end = end.min(start + crate::format::MAX_SUCCESSORS as u64);
        start >= end || (entries.has(start) & entries.has(end - 1))
    }

    /// The most frequent successors of `token`, most frequent first, each with its share of the occurrences.
    pub fn successors(&self, token: Token) -> impl Iterator<Item = (Token, f32)> + '_ {
        let (index, entries) = match &self.living {
            None => {
                let index = Packed::new(self.section(4), self.index_bits);
                (index, Packed::new(self.section(5), self.symbol_bits + 8))
            }
            Some(living) => living.successors(),
        };
        let start = index.get(u64::from(token));
        let end = index.get(u64::from(token) + 1).min(start + crate::format::MAX_SUCCESSORS as u64);
        (start..end).filter_map(move |entry| {
            let entry = entries.get(entry);
            let token = (entry >> 8).checked_sub(1).filter(|&token| token < u64::from(self.vocab_size))?;
            Some((token as Token, decode_share(entry as u8)))
        })
    }
}

/// A packed section, of which only what is within reach is read.
#[derive(Clone, Copy)]
struct View<'a, R> {
    packed: Packed<'a>,
    /// Bytes of the file before it.
    start: usize,
    reach: R,
}

impl<R: Reach> View<'_, R> {
    #[inline]
    fn has(self, index: u64) -> bool {
        self.reach.has(self.start.saturating_add(self.packed.place(index)), 8)
    }

    #[inline]
    fn sees(self, index: u64) -> bool {
        self.reach.sees(self.start.saturating_add(self.packed.place(index)), 8)
    }

    #[inline]
    fn get(self, index: u64) -> Option<u64> {
        self.has(index).then(|| self.packed.get(index))
    }

    #[inline]
    fn load(self, index: u64) -> Option<u64> {
        self.has(index).then(|| self.packed.load(index))
    }
}

/// A share in (0, 1] as sixteenths of a power of two, rounded to the nearest.
pub fn encode_share(share: f64) -> u8 {
    (-16.0 * share.log2()).round().clamp(0.0, 255.0) as u8
}

fn decode_share(code: u8) -> f32 {
    /// 2^(-i / 16): drafts decode 32 shares a node, and exp2 takes longer.
    const FRACTIONS: [f32; 16] = [
        1.0, 0.9576033, 0.91700405, 0.8781261, 0.8408964, 0.80524516, 0.7711054, 0.7384131, 0.70710677,
        0.6771278, 0.6484198, 0.6209289, 0.59460354, 0.5693943, 0.5452539, 0.52213687,
    ];
    let power = f32::from_bits((127 - u32::from(code / 16)) << 23);
    FRACTIONS[usize::from(code % 16)] * power
}

/// Compares the suffix at `position` with the query, whose first token is known to agree; nothing if it is out of reach.
/// A document end sorts before every token, so that what lies beyond it is never decisive.
#[inline]
fn compare<R: Reach>(text: View<'_, R>, position: u64, query: &Query) -> Option<Ordering> {
    let bits = text.packed.bits();
    let per_word = u64::from(LOAD_BITS / bits);
    let mut position = position + 1;
    for &(word, valid) in &query.words {
        let found = text.load(position)? & valid;
        let difference = found ^ word;
        if difference != 0 {
            let shift = difference.trailing_zeros() / bits * bits;
            let symbol = mask(bits);
            return Some((found >> shift & symbol).cmp(&(word >> shift & symbol)));
        }
        position += per_word;
    }
    Some(Ordering::Equal)
}

/// The first of `range` for which `before` does not hold, nothing if `before` does not tell; terminates whatever it says.
/// Asks about pivots that `fetch` has brought closer seven at a time, so that three comparisons wait for the memory only
/// once.
#[inline]
fn partition(
    mut range: Range<u64>,
    fetch: impl Fn(u64),
    before: impl Fn(u64) -> Option<bool>,
) -> Option<u64> {
    while range.start < range.end {
        let Range { start, end } = range;
        let width = end - start;
        let pivot = |eighth: u64| start + width * eighth / 8;
        (1..8).map(pivot).for_each(&fetch);
        let (mut low, mut high) = (1, 8);
        while low < high {
            let middle = (low + high) / 2;
            if before(pivot(middle))? {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        range.start = if low == 1 { start } else { pivot(low - 1) + 1 };
        range.end = if low == 8 { end } else { pivot(low) };
    }
    Some(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_decoded_as_powers_of_two() {
        for code in 0..=255 {
            let exact = (f32::from(code) / -16.0).exp2();
            assert!((decode_share(code) / exact - 1.0).abs() < 1e-6);
        }
    }
}
