//! A draft's look-up: samples of what followed earlier occurrences of the end of its context.
//!
//! Of a mapped store it leaves out what is not in memory, and takes no more than a while.

use std::time::{Duration, Instant};

use smallvec::SmallVec;
use sssd_core::{DOMAINS, Match, Token};

use crate::domains::{Shares, Stretches};
use crate::residency::{Everything, Reach, Residency, waits};
use crate::segment::{Interval, Query, Segment};

/// Longest context that is looked up.
pub const MAX_MATCH: usize = 32;
/// A position is a segment and an offset in it of this many bits.
pub const OFFSET_BITS: u32 = 32;
/// Length that is tried first: counts only fall with the length, so it goes up or down from here. Measured on 30.9 M
/// tokens: 4.1 us from 3, 5.1 us from 4, 5.9 us from 5.
const FIRST_LENGTH: usize = 3;
/// A look-up that has taken so long ends with what it has found, if something is not in memory: one that is merely put off
/// by the system has to find the same whenever it runs. With all in memory it takes 4 to 30 us.
const LONGEST: Duration = Duration::from_micros(100);
/// Ranks that are tried in place of a sample whose text is not in memory.
const NEIGHBOURS: u64 = 4;
/// Occurrences of a length whose domains are asked for, where a store has several, and fewer where tombstones make finding
/// them slow.
const SEEN: usize = 256;
const SEEN_AMONG_DEAD: usize = 128;

/// One segment's occurrences of so many tokens: nothing if they could not be looked up.
type Found = Option<Interval>;

pub struct Lookup<'a> {
    segments: &'a [Segment],
    vocab_size: u32,
    context: &'a [Token],
    /// Of a store with several domains, those of each segment and what an occurrence counts in each.
    domains: Option<(&'a [Stretches], &'a [f32; DOMAINS])>,
    /// For each length from 1 on, one per segment.
    found: SmallVec<[Found; MAX_MATCH]>,
    /// When it began, if it is not to take long, and how often this thread had waited for a disk, if that is of interest.
    began: Option<(Instant, Option<i64>)>,
}

impl<'a> Lookup<'a> {
    /// Of a context of tokens that are in the vocabulary; nothing if there is no memory.
    pub fn new(segments: &'a [Segment], vocab_size: u32, context: &'a [Token]) -> Option<Self> {
        for &token in context {
            segments.iter().for_each(|segment| segment.prefetch_bucket(token));
        }
        let mut found = SmallVec::new();
        let count = context.len() * segments.len();
        found.try_reserve(count).ok()?;
        found.resize(count, Some(0..0));
        let bounded = residencies(segments).next().is_some();
        let watched = || residencies(segments).any(Residency::is_watched).then(waits);
        Some(Self {
            segments,
            vocab_size,
            context,
            domains: None,
            found,
            began: bounded.then(|| (Instant::now(), watched())),
        })
    }

    /// Takes samples of each domain by itself.
    pub fn by_domain(mut self, stretches: &'a [Stretches], weights: &'a [f32; DOMAINS]) -> Self {
        self.domains = Some((stretches, weights));
        self
    }

    /// See [`sssd_core::Corpus::matches`].
    pub fn matches(&mut self, max_samples: usize, out: &mut Vec<Match>) {
        let start = FIRST_LENGTH.min(self.context.len());
        let mut longest = start;
        while longest > 0 && !self.search(longest, start) {
            longest -= 1;
        }
        let shortest_known = longest;
        if longest == start {
            while longest < self.context.len() && self.search(longest + 1, start) {
                longest += 1;
            }
        }
        for length in (1..=longest).rev() {
            if length < shortest_known {
                self.search(length, start);
            }
            let first = out.len();
            if is_late(self.segments, self.began) || out.try_reserve(max_samples).is_err() {
                break;
            }
            let total = match self.domains {
                Some((stretches, weights)) => {
                    self.sample_domains(length, max_samples, stretches, weights, out)
                }
                None => {
                    let total = self.sample(length, max_samples, out) as f32;
                    let weight = total / (out.len() - first).max(1) as f32;
                    out[first..].iter_mut().for_each(|found| found.weight = weight);
                    total
                }
            };
            if total >= 2.0 * max_samples as f32 || length == 2 {
                break;
            }
        }
        self.end();
    }

    /// Looks up the last `length` tokens in all segments; whether they occur, as far as is known, or may.
    fn search(&mut self, length: usize, start: usize) -> bool {
        let tokens = &self.context[self.context.len() - length..];
        let Ok(query) = Query::new(tokens, self.vocab_size) else { return false };
        let count = self.segments.len();
        let (known, found) = self.found.split_at_mut((length - 1) * count);
        let shorter = known.len().checked_sub(count).map(|last| &known[last..]).filter(|_| length > start);
        for (index, segment) in self.segments.iter().enumerate() {
            // what a segment has of more tokens it has of fewer
            let may = |shorter: &[Found]| shorter[index].as_ref().is_none_or(|found| !found.is_empty());
            if shorter.is_none_or(may) {
                let late = index % 4 == 0 && is_late(self.segments, self.began);
                found[index] = if late { None } else { interval(segment, &query) };
            }
        }
        found[..count].iter().any(|found| found.as_ref().is_none_or(|found| !found.is_empty()))
    }

    /// Appends samples of the occurrences of the last `length` tokens, and returns how many there are.
    fn sample(&self, length: usize, limit: usize, out: &mut Vec<Match>) -> u64 {
        let Some(intervals) = self.intervals(length) else { return 0 };
        // their places in the suffix arrays are all on their way before the first is read
        let mut chosen: SmallVec<[(usize, Interval); 64]> = SmallVec::new();
        if chosen.try_reserve(limit).is_err() {
            return 0;
        }
        let total = sample(&intervals, limit, |index, rank, others| {
            self.segments[index].prefetch_position(rank);
            let last = (rank + others.clamp(1, NEIGHBOURS)).min(intervals[index].end);
            chosen.push((index, rank..last));
        });
        for (index, ranks) in chosen {
            self.take(index, ranks, length, 0, out);
        }
        total
    }

    /// The same of each domain by itself, with what each sample counts. Returns what all occurrences count.
    fn sample_domains(
        &self,
        length: usize,
        limit: usize,
        stretches: &[Stretches],
        weights: &[f32; DOMAINS],
        out: &mut Vec<Match>,
    ) -> f32 {
        let Some(intervals) = self.intervals(length) else { return 0.0 };
        let living = self.segments.iter().all(Segment::is_whole);
        let most = if living { SEEN } else { SEEN_AMONG_DEAD };
        let mut places: SmallVec<[(u32, u64); SEEN]> = SmallVec::new();
        if places.try_reserve(most).is_err() || out.try_reserve(most).is_err() {
            return 0.0;
        }
        let total = sample(&intervals, most, |index, rank, _| {
            self.segments[index].prefetch_position(rank);
            places.push((index as u32, rank));
        });
        let mut domains: SmallVec<[u8; SEEN]> = SmallVec::new();
        let mut seen = [0; DOMAINS];
        places.retain(|&mut (index, rank)| {
            let segment = &self.segments[index as usize];
            let start = match segment.residency() {
                None => segment.position(rank, Everything),
                Some(resident) => segment.position(rank, resident),
            };
            let Some(start) = start else { return false };
            let domain = stretches[index as usize].domain(start);
            seen[domain] += 1;
            domains.push(domain as u8);
            true
        });
        let each = total as f32 / places.len().max(1) as f32;
        let shares = Shares { seen: &seen, each, weights };
        let (wanted, mut taken) = (shares.samples(limit), [0; DOMAINS]);
        let first = out.len();
        let mut due = seen.map(|seen| seen / 2);
        for (&(index, rank), &domain) in places.iter().zip(&domains) {
            let at = usize::from(domain);
            due[at] += wanted[at];
            if due[at] >= seen[at] {
                due[at] -= seen[at];
                let last = (rank + NEIGHBOURS).min(intervals[index as usize].end);
                taken[at] += usize::from(self.take(index as usize, rank..last, length, domain, out));
            }
        }
        for found in &mut out[first..] {
            let at = usize::from(found.domain);
            found.weight = weights[at] * each * seen[at] as f32 / taken[at] as f32;
        }
        shares.total()
    }

    /// The occurrences of the last `length` tokens in each segment; nothing if there is no memory.
    fn intervals(&self, length: usize) -> Option<SmallVec<[Interval; MAX_MATCH]>> {
        let count = self.segments.len();
        let found = &self.found[(length - 1) * count..length * count];
        let mut intervals = SmallVec::new();
        intervals.try_reserve(count).ok()?;
        intervals.extend(found.iter().map(|found| found.clone().unwrap_or(0..0)));
        Some(intervals)
    }

    /// Appends the first of these suffixes whose text can be had, if there is one.
    fn take(&self, index: usize, ranks: Interval, length: usize, domain: u8, out: &mut Vec<Match>) -> bool {
        let segment = &self.segments[index];
        let start = match segment.residency() {
            None => segment.position(ranks.start, Everything),
            Some(resident) => near(segment, ranks, length as u64, resident),
        };
        let Some(start) = start else { return false };
        let offset = start.saturating_add(length as u64);
        segment.prefetch(offset);
        let (position, length) = (position(index, offset), length as u32);
        out.push(Match { position, length, weight: 1.0, domain });
        true
    }

    fn end(&self) {
        if let Some((began, before)) = self.began {
            let slow = began.elapsed() > LONGEST;
            let waited = slow && before.is_some_and(|before| waits() > before);
            residencies(self.segments).for_each(|residency| residency.looked_up(slow, waited));
        }
    }
}

fn is_late(segments: &[Segment], began: Option<(Instant, Option<i64>)>) -> bool {
    began.is_some_and(|(began, before)| {
        let waited = || before.is_some_and(|before| waits() > before);
        began.elapsed() > LONGEST && (residencies(segments).any(Residency::has_missed) || waited())
    })
}

fn residencies(segments: &[Segment]) -> impl Iterator<Item = &Residency> {
    segments.iter().filter_map(Segment::residency)
}

/// Hands out at most `limit` evenly spread ranks of the intervals (one per segment): the segment, the rank, and how
/// many others it stands for; and returns how many ranks there are.
#[inline]
pub fn sample(intervals: &[Interval], limit: usize, mut take: impl FnMut(usize, u64, u64)) -> u64 {
    let total: u64 = intervals.iter().map(length).sum();
    let taken = total.min(limit as u64);
    let (mut segment, mut before) = (0, 0);
    for sample in 0..taken {
        // The middle of the sample's share; in 128 bits, for `total` may be large.
        let rank = ((2 * u128::from(sample) + 1) * u128::from(total) / (2 * u128::from(taken))) as u64;
        while rank - before >= length(&intervals[segment]) {
            before += length(&intervals[segment]);
            segment += 1;
        }
        take(segment, intervals[segment].start + (rank - before), total / taken);
    }
    total
}

#[inline]
pub fn length(interval: &Interval) -> u64 {
    interval.end.saturating_sub(interval.start)
}

pub fn position(segment: usize, offset: u64) -> u64 {
    (segment as u64) << OFFSET_BITS | offset.min(u64::from(u32::MAX))
}

fn interval(segment: &Segment, query: &Query) -> Found {
    match segment.residency() {
        None => segment.interval(query, Everything),
        Some(resident) => segment.interval(query, resident),
    }
}

/// Where the first of these suffixes starts whose text is in memory. If none is, that of the first is asked for.
fn near<R: Reach>(segment: &Segment, ranks: Interval, length: u64, reach: R) -> Option<u64> {
    let mut first = None;
    for rank in ranks {
        let start = segment.position(rank, reach)?;
        if segment.sees(start.saturating_add(length), reach) {
            return Some(start);
        }
        first.get_or_insert(start);
    }
    segment.has(first?.saturating_add(length), reach);
    None
}
