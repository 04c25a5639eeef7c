//! Writes tombstones: one pass over the documents, one over the suffix array, and one look at every run of equal pairs.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::{ALIGN, ENTRY, Entry, Header, RANKS, blocks};
use crate::datastore::Datastore;
use crate::documents::DocumentReader;
use crate::format::{MAX_SUCCESSORS, symbol_bits, zeros};
use crate::output::Output;
use crate::packed::PackedWriter;
use crate::progress::Progress;
use crate::residency::Everything;
use crate::segment::{Segment, encode_share};
use crate::{Error, Result};

/// Ranks read at once.
const WINDOW: usize = 1 << 16;

/// Writes which documents of a store of one file are dead: those of `dead`, by their numbers, and those that are already.
/// Returns how many tokens that are. The target appears, or is replaced, in one durable step. Takes a quarter of a byte of
/// memory for every token of the largest segment. `progress` counts tokens twice, and document ends once.
///
/// # Errors
/// [`Error::InvalidArgument`] if the store has several files or `dead` is not one bool a document; [`Error::Corrupt`],
/// [`Error::Changed`] for a damaged store; [`Error::Io`], [`Error::OutOfMemory`], [`Error::Cancelled`].
pub fn write_tombstones(
    store: &Arc<Datastore>,
    dead: &[bool],
    target: &Path,
    progress: &Progress,
) -> Result<u64> {
    let (1, Some(file)) = (store.files().len(), store.files().next()) else {
        let problem = format!("tombstones are of one file, and the datastore has {}", store.files().len());
        return Err(Error::InvalidArgument(problem));
    };
    if dead.len() as u64 != file.documents {
        let problem =
            format!("{} documents are dead or not, but the datastore has {}", dead.len(), file.documents);
        return Err(Error::InvalidArgument(problem));
    }
    let mut documents = bits(file.documents)?;
    let mut positions = Vec::new(); // of each segment's text, the dead ones
    positions.try_reserve_exact(store.parts().len()).map_err(Error::memory("tombstones"))?;
    for segment in store.parts().iter().filter_map(|part| part.segment) {
        positions.push(bits(store.segment(segment).symbols())?);
    }
    let mut header = Header {
        vocab_size: file.vocab_size,
        store: file.uuid,
        documents: file.documents,
        ..Header::default()
    };
    mark(store, dead, &mut header, &mut documents, &mut positions, progress)?;
    let mut writer = Writer { output: Output::create(target).map_err(Error::io(target))?, table: Vec::new() };
    let mut write = || -> Result<()> {
        writer.write_words(&documents).map_err(Error::io(target))?;
        for (index, positions) in positions.iter_mut().enumerate() {
            let positions = std::mem::take(positions); // done with after this
            writer.write_segment(store, index, &positions, progress, target)?;
        }
        Ok(())
    };
    write()?;
    let dead_tokens = header.dead_tokens;
    writer.seal(header).map_err(Error::io(target))?;
    Ok(dead_tokens)
}

/// Zeros for so many bits.
fn bits(count: u64) -> Result<Vec<u64>> {
    let words = usize::try_from(count.div_ceil(64)).map_err(|_| Error::OutOfMemory("tombstones".into()))?;
    zeros(words).map_err(|_| Error::OutOfMemory("tombstones".into()))
}

/// Marks the dead documents, and the positions of their tokens.
fn mark(
    store: &Arc<Datastore>,
    dead: &[bool],
    header: &mut Header,
    documents: &mut [u64],
    positions: &mut [Vec<u64>],
    progress: &Progress,
) -> Result<()> {
    let mut reader = DocumentReader::new(Arc::clone(store));
    let (mut passed, mut symbols) = (0, 0);
    while let Some(document) = reader.next_document()? {
        let number = document.number as usize;
        if document.is_dead || dead[number] {
            header.dead_documents += 1;
            header.dead_tokens += document.length;
            documents[number / 64] |= 1 << (number % 64);
            if let Some(segment) = store.parts()[document.part].segment {
                fill(&mut positions[segment], document.start, document.start + document.length);
            }
        }
        (passed, symbols) = (passed + 1, symbols + document.length + 1);
        if passed == WINDOW || symbols > WINDOW as u64 {
            progress.count(symbols)?;
            (passed, symbols) = (0, 0);
        }
    }
    progress.count(symbols)
}

/// Sets the bits from `start` to `end`.
fn fill(words: &mut [u64], start: u64, end: u64) {
    let mut at = start;
    while at < end {
        let stop = end.min((at / 64 + 1) * 64);
        words[(at / 64) as usize] |= (u64::MAX >> (64 - (stop - at))) << (at % 64);
        at = stop;
    }
}

struct Writer {
    output: Output,
    table: Vec<Entry>,
}

impl Writer {
    fn write_words(&mut self, words: &[u64]) -> io::Result<()> {
        words.iter().try_for_each(|word| self.output.write_all(&word.to_le_bytes()))?;
        self.align()
    }

    fn align(&mut self) -> io::Result<()> {
        let missing = self.output.position().next_multiple_of(ALIGN) - self.output.position();
        self.output.write_all(&[0; ALIGN as usize][..missing as usize])
    }

    fn write_segment(
        &mut self,
        store: &Datastore,
        index: usize,
        dead: &[u64],
        progress: &Progress,
        target: &Path,
    ) -> Result<()> {
        let segment = store.segment(index);
        let suffixes = segment.suffixes();
        let blocks = living(store, segment, dead, progress)?;
        self.write_words(&blocks).map_err(Error::io(target))?;
        let (index, entries) = successors(store, segment, &blocks, progress)?;
        let living = rank(&blocks, suffixes);
        let entry = Entry { suffixes, living, successors: entries.len() as u64 };
        self.write_packed(&index, entry.index_bits()).map_err(Error::io(target))?;
        self.write_packed(&entries, symbol_bits(store.vocab_size()) + 8).map_err(Error::io(target))?;
        self.table.try_reserve(1).map_err(Error::memory("tombstones"))?;
        self.table.push(entry);
        Ok(())
    }

    fn write_packed(&mut self, values: &[u64], bits: u32) -> io::Result<()> {
        let mut writer = PackedWriter::new(bits);
        values.iter().try_for_each(|&value| writer.push(value, &mut self.output))?;
        writer.finish(&mut self.output)?;
        self.align()
    }

    fn seal(self, mut header: Header) -> io::Result<u64> {
        let Self { output, table } = self;
        output.seal(|body_end, checksums| {
            let mut tail = Vec::new();
            tail.try_reserve_exact(8 * checksums.len() + ENTRY as usize * table.len())?;
            tail.extend(checksums.iter().flat_map(|sum| sum.to_le_bytes()));
            let counts = table.iter().flat_map(|entry| [entry.suffixes, entry.living, entry.successors]);
            tail.extend(counts.flat_map(u64::to_le_bytes));
            header.checksums_at = body_end;
            header.file_length = body_end + tail.len() as u64;
            header.segments = table.len() as u64;
            header.tail_hash = xxh3_64(&tail);
            Ok((header.encode(), tail))
        })
    }
}

/// The blocks of a segment, eight words each: how many suffixes live before it, and which of its own.
fn living(store: &Datastore, segment: &Segment, dead: &[u64], progress: &Progress) -> Result<Vec<u64>> {
    let memory = |_| Error::OutOfMemory("tombstones".into());
    let suffixes = segment.suffixes();
    let mut out: Vec<u64> = zeros(usize::try_from(blocks(suffixes) * 8).map_err(memory)?)
        .map_err(|_| Error::OutOfMemory("tombstones".into()))?;
    let (mut bytes, mut positions) = (Vec::new(), Vec::new());
    let mut rank = 0;
    while rank < suffixes {
        let path = store.check_file(0)?;
        segment.read_positions(rank, WINDOW, &mut bytes, &mut positions).map_err(Error::read(path))?;
        for &position in &positions {
            let is_dead =
                dead.get(position as usize / 64).is_some_and(|word| word >> (position % 64) & 1 == 1);
            let (block, bit) = ((rank / RANKS) as usize, rank % RANKS);
            out[block * 8 + 1 + (bit / 64) as usize] |= u64::from(!is_dead) << (bit % 64);
            rank += 1;
        }
        progress.count(positions.len() as u64)?;
    }
    let mut before = 0;
    for block in out.chunks_exact_mut(8) {
        block[0] = before;
        before += block[1..].iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    }
    Ok(out)
}

/// How many suffixes before this rank live.
fn rank(blocks: &[u64], rank: u64) -> u64 {
    let block = &blocks[(rank / RANKS) as usize * 8..][..8];
    let (word, bit) = ((rank % RANKS / 64) as usize, rank % 64);
    let whole: u64 = block[1..=word].iter().map(|word| u64::from(word.count_ones())).sum();
    let part = block.get(word + 1).map_or(0, |word| word & !(u64::MAX << bit));
    block[0] + whole + u64::from(part.count_ones())
}

/// The most frequent successors of every token among the living: where each token's entries start, and the entries.
fn successors(
    store: &Datastore,
    segment: &Segment,
    blocks: &[u64],
    progress: &Progress,
) -> Result<(Vec<u64>, Vec<u64>)> {
    let (mut index, mut entries) = (Vec::new(), Vec::new());
    let memory = || Error::memory("tombstones");
    index.try_reserve_exact(store.vocab_size() as usize + 1).map_err(memory())?;
    index.push(0);
    let mut counts: Vec<(u64, u64)> = Vec::new();
    for token in 0..store.vocab_size() {
        if token % 256 == 0 {
            progress.count(0)?;
            store.check_file(0)?;
        }
        let bucket = segment.ranks(token, Everything).unwrap_or(0..0);
        let total = rank(blocks, bucket.end) - rank(blocks, bucket.start);
        counts.clear();
        let mut start = if total > 0 { bucket.start } else { bucket.end };
        while start < bucket.end {
            if counts.len() % WINDOW == WINDOW - 1 {
                progress.count(0)?;
            }
            let symbol = segment.symbol_after(start);
            let end = run_end(start..bucket.end, |rank| segment.symbol_after(rank) == symbol);
            let count = rank(blocks, end) - rank(blocks, start);
            if count > 0 && symbol > 0 && symbol <= u64::from(store.vocab_size()) {
                counts.try_reserve(1).map_err(memory())?;
                counts.push((count, symbol));
            }
            start = end;
        }
        counts.sort_unstable_by_key(|&(count, symbol)| (std::cmp::Reverse(count), symbol));
        entries.try_reserve(MAX_SUCCESSORS).map_err(memory())?;
        entries.extend(counts.iter().take(MAX_SUCCESSORS).map(|&(count, symbol)| {
            let share = encode_share(count as f64 / total as f64);
            symbol << 8 | u64::from(share)
        }));
        index.push(entries.len() as u64);
    }
    Ok((index, entries))
}

/// Where the run that starts the range ends: after twice as long a step each, then by halves.
fn run_end(ranks: std::ops::Range<u64>, same: impl Fn(u64) -> bool) -> u64 {
    let (mut known, mut step) = (ranks.start, 1);
    while known + step < ranks.end && same(known + step) {
        known += step;
        step *= 2;
    }
    let (mut low, mut high) = (known + 1, (known + step).min(ranks.end));
    while low < high {
        let middle = low + (high - low) / 2;
        if same(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}
