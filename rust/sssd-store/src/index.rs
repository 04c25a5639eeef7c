//! Sorts a segment's suffixes and makes the sections that look-ups need.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use libsais::{LibsaisError, SuffixArrayConstruction};

use crate::format::{FENCE, MAX_SUCCESSORS, SegmentEntry, symbol_bits, zeros};
use crate::output::Output;
use crate::packed::{Packed, PackedWriter, bits_for, packed_len};
use crate::progress::Progress;
use crate::segment::{encode_share, key};

/// Symbols read back or written between two looks at the progress.
const CHUNK: usize = 1 << 16;

/// The sections of a segment but its text, ready to be written.
pub struct Index {
    sections: [Vec<u8>; 5],
    successors: u64,
}

impl Index {
    /// Appends the sections, and enters them.
    pub fn write(self, output: &mut Output, segment: &mut SegmentEntry) -> io::Result<()> {
        segment.successors = self.successors;
        for (section, place) in self.sections.into_iter().zip(&mut segment.sections[1..]) {
            let start = output.align()?;
            output.write_all(&section)?;
            *place = start..output.position();
        }
        Ok(())
    }
}

/// Reads a segment's text from the file and makes the other sections. Takes 8 bytes for each symbol, and what the small
/// sections take.
pub fn index(
    mut file: File,
    segment: &SegmentEntry,
    vocab_size: u32,
    progress: &Progress,
) -> io::Result<Index> {
    let bits = symbol_bits(vocab_size);
    let mut text = read_text(&mut file, segment, bits)?;
    progress.advance(0)?;
    let suffix_array = sort(&mut text)?;
    progress.advance(segment.symbols - segment.suffixes / 2)?;
    // The document ends sort first; nothing is looked up there.
    let suffixes = &suffix_array[segment.documents as usize..text.len()];

    let buckets = buckets(&text, vocab_size)?;
    let fences = fences(&text, suffixes, bits, progress)?;
    let (index, successors) = successors(&text, suffixes, &buckets, progress)?;
    drop(text);
    let small = |values: &[u64], bits| packed(values.iter().copied(), bits, &Progress::default());
    let mut out = Index {
        sections: [
            Vec::new(),
            small(&buckets, segment.rank_bits())?,
            fences,
            small(&index, bits_for(successors.len() as u64))?,
            small(&successors, bits + 8)?,
        ],
        successors: successors.len() as u64,
    };
    drop((buckets, index, successors));
    let positions = suffixes.iter().map(|&position| position as u64);
    out.sections[0] = packed(positions, segment.position_bits(), progress)?;
    Ok(out)
}

fn read_text(file: &mut File, segment: &SegmentEntry, bits: u32) -> io::Result<Vec<i32>> {
    file.seek(SeekFrom::Start(segment.sections[0].start))?;
    let mut text = Vec::new();
    text.try_reserve_exact(segment.symbols as usize)?;
    let mut bytes = zeros(CHUNK / 8 * bits as usize + 8)?; // room for the last 8-byte load
    while (text.len() as u64) < segment.symbols {
        let count = (segment.symbols - text.len() as u64).min(CHUNK as u64);
        file.read_exact(&mut bytes[..(count as usize * bits as usize).div_ceil(8)])?;
        let packed = Packed::new(&bytes, bits);
        text.extend((0..count).map(|index| packed.get(index) as i32));
    }
    Ok(text)
}

/// The suffix array of all symbols, document ends included.
fn sort(text: &mut [i32]) -> io::Result<Vec<i32>> {
    let mut sorted = zeros(text.len())?;
    let sorter =
        SuffixArrayConstruction::for_text_mut(text).in_borrowed_buffer(&mut sorted).single_threaded();
    match sorter.run() {
        Ok(_) => Ok(sorted),
        Err(LibsaisError::OutOfMemory) => Err(io::ErrorKind::OutOfMemory.into()),
        Err(error) => Err(io::Error::other(format!("the suffix sorter failed: {error}"))),
    }
}

/// The leading symbols of every 64th suffix.
fn fences(text: &[i32], suffixes: &[i32], bits: u32, progress: &Progress) -> io::Result<Vec<u8>> {
    let mut fences = Vec::new();
    fences.try_reserve_exact(8 * suffixes.len().div_ceil(FENCE as usize))?;
    for (fence, &position) in suffixes.iter().step_by(FENCE as usize).enumerate() {
        if fence % CHUNK == 0 {
            progress.advance(0)?;
        }
        let rest = text[position as usize + 1..].iter().take_while(|&&symbol| symbol != 0);
        fences.extend(key(bits, rest.map(|&symbol| symbol as u64)).to_le_bytes());
    }
    Ok(fences)
}

/// For each token the number of suffixes that start with a smaller one, and last the number of all.
fn buckets(text: &[i32], vocab_size: u32) -> io::Result<Vec<u64>> {
    let mut buckets = zeros(vocab_size as usize + 2)?;
    for &symbol in text.iter().filter(|&&symbol| symbol != 0) {
        buckets[symbol as usize + 1] += 1;
    }
    let mut sum = 0;
    for bucket in &mut buckets {
        sum += *bucket;
        *bucket = sum;
    }
    buckets.remove(0);
    Ok(buckets)
}

/// The most frequent successors of every token: where each token's entries start, and the entries (symbol and
/// share), most frequent first.
fn successors(
    text: &[i32],
    suffixes: &[i32],
    buckets: &[u64],
    progress: &Progress,
) -> io::Result<(Vec<u64>, Vec<u64>)> {
    let (mut index, mut entries) = (Vec::new(), Vec::new());
    index.try_reserve_exact(buckets.len())?;
    index.push(0);
    let vocab_size = buckets.len() - 1;
    entries.try_reserve_exact(suffixes.len().min(vocab_size * MAX_SUCCESSORS))?;
    let mut counts: Vec<(u64, i32)> = Vec::new();
    for bucket in buckets.windows(2) {
        let ranks = &suffixes[bucket[0] as usize..bucket[1] as usize];
        if ranks.len() > CHUNK {
            progress.advance(0)?;
        }
        counts.clear();
        counts.try_reserve(ranks.len().min(vocab_size + 1))?;
        // Equal successors are neighbours, for the suffixes are sorted.
        for symbol in ranks.iter().map(|&position| text[position as usize + 1]) {
            match counts.last_mut() {
                Some((count, last)) if *last == symbol => *count += 1,
                _ => counts.push((1, symbol)),
            }
        }
        counts.retain(|&(_, symbol)| symbol != 0);
        counts.sort_unstable_by_key(|&(count, symbol)| (std::cmp::Reverse(count), symbol));
        for &(count, symbol) in counts.iter().take(MAX_SUCCESSORS) {
            let share = encode_share(count as f64 / ranks.len() as f64);
            entries.push((symbol as u64) << 8 | u64::from(share));
        }
        index.push(entries.len() as u64);
    }
    Ok((index, entries))
}

fn packed(values: impl ExactSizeIterator<Item = u64>, bits: u32, progress: &Progress) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let count = values.len();
    out.try_reserve_exact(packed_len(count as u64, bits) as usize)?;
    let mut writer = PackedWriter::new(bits);
    for (index, value) in values.enumerate() {
        writer.push(value, &mut out)?;
        if index % CHUNK == CHUNK - 1 {
            progress.advance(CHUNK as u64 / 2)?;
        }
    }
    progress.advance((count % CHUNK) as u64 / 2)?;
    writer.finish(&mut out)?;
    Ok(out)
}
