//! Which domain the text at a place of a segment is of, and samples of each.

use sssd_core::DOMAINS;

use crate::{Error, Result};

/// Blocks of a segment whose first stretch is known at once.
const BLOCKS: u32 = 1 << 12;

/// Stretches of a segment's text, each of one domain.
#[derive(Clone)]
pub struct Stretches {
    /// Where each begins, the first at 0, and its domain.
    starts: Vec<(u32, u8)>,
    /// Of each block of 2^`shift` symbols the stretch in which it begins.
    first: Vec<u32>,
    shift: u32,
}

impl Stretches {
    /// Of a segment of so many symbols, from where each begins, in order.
    fn new(starts: impl ExactSizeIterator<Item = (u32, u8)>, symbols: u64) -> Result<Self> {
        let memory = || Error::memory("the domains of a datastore");
        let shift = symbols.div_ceil(u64::from(BLOCKS)).next_power_of_two().trailing_zeros();
        let (mut all, mut first) = (Vec::new(), Vec::new());
        all.try_reserve_exact(starts.len()).map_err(memory())?;
        all.extend(starts);
        let blocks = (symbols >> shift) as usize + 1;
        first.try_reserve_exact(blocks).map_err(memory())?;
        let mut at = 0;
        for block in 0..blocks as u64 {
            while all.get(at + 1).is_some_and(|next| u64::from(next.0) <= block << shift) {
                at += 1;
            }
            first.push(at as u32);
        }
        Ok(Self { starts: all, first, shift })
    }

    /// The domain of the text at a position.
    #[inline]
    pub fn domain(&self, position: u64) -> usize {
        let block = (position >> self.shift) as usize;
        let mut at = self.first[block.min(self.first.len() - 1)] as usize;
        while self.starts.get(at + 1).is_some_and(|next| u64::from(next.0) <= position) {
            at += 1;
        }
        usize::from(self.starts[at].1)
    }
}

/// Documents of a file that follow one another and are of one domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainRun {
    /// How many.
    pub documents: u64,
    /// Tokens of all of them.
    pub tokens: u64,
    /// Below [`DOMAINS`].
    pub domain: u8,
}

impl DomainRun {
    /// The same where so many domains are known before; the last one has what there is no room for.
    pub(crate) fn after(self, known: usize) -> Self {
        Self { domain: (usize::from(self.domain) + known).min(DOMAINS - 1) as u8, ..self }
    }
}

/// A domain is small, and told from all that are not, if it has no more tokens, and no more than this part of all.
const MOST_TOKENS: u64 = 1 << 21;
const PART: u64 = 8;

/// The number of each domain that look-ups go by: 0 for all that are not small, the next ones for
/// those that are; and how many numbers there are. `tokens` has those of each domain, as it was said.
pub fn numbers(tokens: &[u64]) -> (Vec<u8>, usize) {
    let all: u64 = tokens.iter().sum();
    let is_small = |own: u64| own > 0 && own <= MOST_TOKENS && own <= all / PART;
    let (mut numbers, mut next) = (Vec::new(), 0);
    for &own in tokens {
        let small = is_small(own) && next + 1 < DOMAINS;
        next += usize::from(small);
        numbers.push(if small { next as u8 } else { 0 });
    }
    (numbers, next + 1)
}

/// The stretches of segments of so many symbols, which follow one another.
pub fn stretches(
    runs: &[DomainRun],
    numbers: &[u8],
    segments: impl Iterator<Item = u64>,
) -> Result<Vec<Stretches>> {
    let memory = || Error::memory("the domains of a datastore");
    let mut bounds: Vec<(u64, u8)> = Vec::new();
    bounds.try_reserve_exact(runs.len()).map_err(memory())?;
    let mut end = 0u64;
    for run in runs.iter().filter(|run| run.documents > 0) {
        let number = numbers[usize::from(run.domain)];
        if bounds.last().is_none_or(|last| last.1 != number) {
            bounds.push((end, number));
        }
        end = end.saturating_add(run.documents).saturating_add(run.tokens);
    }
    let mut all = Vec::new();
    let mut start = 0;
    for symbols in segments {
        let place = start..start + symbols;
        let first = bounds.partition_point(|bound| bound.0 <= place.start).saturating_sub(1);
        let last = bounds.partition_point(|bound| bound.0 < place.end).max(first + 1);
        let held = bounds.get(first..last).unwrap_or(&[(0, 0)]);
        let held = held.iter().map(|&(at, domain)| (at.saturating_sub(place.start) as u32, domain));
        all.try_reserve(1).map_err(memory())?;
        all.push(Stretches::new(held, symbols)?);
        start = place.end;
    }
    Ok(all)
}

/// Of each domain its occurrences among those seen, how many each of these stands for, and what one counts.
pub struct Shares<'a> {
    pub seen: &'a [usize; DOMAINS],
    pub each: f32,
    pub weights: &'a [f32; DOMAINS],
}

/// Least samples of a domain whose occurrences count whole, if it has so many.
const LEAST: f32 = 16.0;

impl Shares<'_> {
    /// What the occurrences of all domains count.
    pub fn total(&self) -> f32 {
        self.seen.iter().zip(self.weights).map(|(&seen, weight)| seen as f32 * self.each * weight).sum()
    }

    /// How many samples each domain gets where one would have `limit`: by what its occurrences count, but a few at least.
    pub fn samples(&self, limit: usize) -> [usize; DOMAINS] {
        let rate = (limit as f32 / self.total()).min(1.0) * self.each;
        std::array::from_fn(|domain| {
            let (seen, weight) = (self.seen[domain], self.weights[domain]);
            let wanted = (seen as f32 * weight * rate).max(LEAST * weight);
            seen.min(wanted.round() as usize)
        })
    }
}
