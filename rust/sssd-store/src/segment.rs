//! A segment: a packed text, its suffix array and the small tables that keep a look-up in the cache.
//!
//! A look-up goes from the first token's bucket of ranks, through the fences (the leading symbols of every 64th
//! suffix, in one `u64`), to at most 64 ranks of one stretch of the suffix array: only these touch the text.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use sssd_core::Token;

use crate::bytes::Bytes;
use crate::format::{FENCE, SegmentEntry, symbol_bits};
use crate::packed::{LOAD_BITS, Packed, mask};
use crate::tombstones::Living;
use crate::{Error, Result};

/// Ranks of the suffixes that start with a query.
pub type Interval = Range<u64>;

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

    fn text(&self) -> Packed<'_> {
        Packed::new(self.section(0), self.symbol_bits)
    }

    fn suffix_array(&self) -> Packed<'_> {
        Packed::new(self.section(1), self.position_bits)
    }

    /// The living among the suffixes that start with `token`, numbered as [`Self::position`] takes them.
    pub fn bucket(&self, token: Token) -> Interval {
        self.number(self.ranks(token))
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
        self.text().get(self.suffix_array().get(rank) + 1)
    }

    /// Ranks of the suffixes that start with `token`.
    pub fn ranks(&self, token: Token) -> Interval {
        let buckets = Packed::new(self.section(2), self.rank_bits);
        let start = buckets.get(u64::from(token)).min(self.suffixes);
        start..buckets.get(u64::from(token) + 1).clamp(start, self.suffixes)
    }

    /// Brings the bucket of `token` closer.
    pub fn prefetch_bucket(&self, token: Token) {
        Packed::new(self.section(2), self.rank_bits).prefetch(u64::from(token));
    }

    fn fence(&self, index: u64) -> u64 {
        let fences = self.section(3);
        let bytes = fences.get(8 * index as usize..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn prefetch_fence(&self, index: u64) {
        if let Some(byte) = self.section(3).get(8 * index as usize) {
            crate::packed::prefetch(byte);
        }
    }

    /// The living among the suffixes that start with the query, numbered as [`Self::position`] takes them.
    pub fn interval(&self, query: &Query) -> Interval {
        self.number(self.search(query))
    }

    /// Ranks of the suffixes that start with the query.
    fn search(&self, query: &Query) -> Interval {
        let bucket = self.ranks(query.first);
        if query.words.is_empty() || bucket.is_empty() {
            return bucket;
        }
        let (text, suffixes) = (self.text(), self.suffix_array());
        let below = |rank: u64| compare(text, suffixes.get(rank), query).is_lt();
        let not_above = |rank: u64| compare(text, suffixes.get(rank), query).is_le();
        let fetch = |rank: u64| text.prefetch(suffixes.get(rank) + 1);

        let fences = bucket.start.div_ceil(FENCE)..bucket.end.div_ceil(FENCE);
        let near = |fence: u64| self.prefetch_fence(fence);
        let mut low = partition(fences.clone(), near, |fence| self.fence(fence) < query.key.0);
        let mut high = partition(low..fences.end, near, |fence| self.fence(fence) <= query.key.1);
        if !query.exact && low < high {
            let (equal, fetch) = (low..high, |fence| fetch(fence * FENCE));
            low = partition(equal.clone(), fetch, |fence| below(fence * FENCE));
            high = partition(low..equal.end, fetch, |fence| not_above(fence * FENCE));
        }
        // The rank at `fence` itself is settled; what lies between the fence before it and it is not.
        let stretch = |fence: u64| {
            let start = if fence == fences.start { bucket.start } else { (fence - 1) * FENCE + 1 };
            let end = if fence == fences.end { bucket.end } else { fence * FENCE };
            start..end
        };
        let start = partition(stretch(low), fetch, below);
        let stretch = stretch(high);
        let end = partition(start.max(stretch.start)..stretch.end.max(start), fetch, not_above);
        start..end
    }

    /// Where the living suffix of this number starts: its rank, if all live.
    #[inline]
    pub fn position(&self, number: u64) -> u64 {
        let rank = self.living.as_ref().map_or(number, |living| living.select(number));
        self.suffix_array().get(rank)
    }

    /// Brings the text at `position` closer.
    #[inline]
    pub fn prefetch(&self, position: u64) {
        self.text().prefetch(position);
    }

    /// Copies the tokens from `position` on, at most to the end of the document.
    #[inline]
    pub fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        let text = self.text();
        let per_load = (LOAD_BITS / self.symbol_bits) as usize;
        let mut copied = 0;
        for chunk in out.chunks_mut(per_load) {
            let mut word = text.load(position.saturating_add(copied as u64));
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

/// Compares the suffix at `position` with the query, whose first token is known to agree. A document end sorts
/// before every token, so that what lies beyond it is never decisive.
#[inline]
fn compare(text: Packed<'_>, position: u64, query: &Query) -> std::cmp::Ordering {
    let per_word = u64::from(LOAD_BITS / text.bits());
    let mut position = position + 1;
    for &(word, valid) in &query.words {
        let found = text.load(position) & valid;
        let difference = found ^ word;
        if difference != 0 {
            let shift = difference.trailing_zeros() / text.bits() * text.bits();
            let symbol = mask(text.bits());
            return (found >> shift & symbol).cmp(&(word >> shift & symbol));
        }
        position += per_word;
    }
    std::cmp::Ordering::Equal
}

/// The first of `range` for which `before` does not hold; terminates whatever `before` says. Asks about pivots
/// that `fetch` has brought closer seven at a time, so that three comparisons wait for the memory only once.
#[inline]
fn partition(mut range: Range<u64>, fetch: impl Fn(u64), before: impl Fn(u64) -> bool) -> u64 {
    while range.start < range.end {
        let Range { start, end } = range;
        let width = end - start;
        let pivot = |eighth: u64| start + width * eighth / 8;
        (1..8).map(pivot).for_each(&fetch);
        let (mut low, mut high) = (1, 8);
        while low < high {
            let middle = (low + high) / 2;
            if before(pivot(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        range.start = if low == 1 { start } else { pivot(low - 1) + 1 };
        range.end = if low == 8 { end } else { pivot(low) };
    }
    range.start
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
