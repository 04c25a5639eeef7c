//! Sorts a segment's suffixes and writes the sections that look-ups need.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use libsais::{LibsaisError, SuffixArrayConstruction};

use crate::format::{FENCE, MAX_SUCCESSORS, SegmentEntry, symbol_bits, zeros};
use crate::output::Output;
use crate::packed::{Packed, PackedWriter};
use crate::progress::Progress;
use crate::segment::{encode_share, key};

/// Symbols read back or written between two looks at the progress.
const CHUNK: usize = 1 << 16;

/// Reads the segment's text back, and appends and enters the other sections.
pub fn write_index(
    output: &mut Output,
    segment: &mut SegmentEntry,
    vocab_size: u32,
    progress: &Progress,
) -> io::Result<()> {
    let bits = symbol_bits(vocab_size);
    let mut text = read_text(output, segment, bits)?;
    progress.advance(0)?;
    let suffix_array = sort(&mut text)?;
    progress.advance(segment.symbols - segment.suffixes / 2)?;
    // The document ends sort first; nothing is looked up there.
    let suffixes = &suffix_array[segment.documents as usize..text.len()];

    let start = output.align()?;
    let mut writer = PackedWriter::new(segment.position_bits());
    for chunk in suffixes.chunks(CHUNK) {
        for &position in chunk {
            writer.push(position as u64, output)?;
        }
        progress.advance(chunk.len() as u64 / 2)?;
    }
    writer.finish(output)?;
    segment.sections[1] = start..output.position();

    let buckets = buckets(&text, vocab_size)?;
    segment.sections[2] = write_packed(output, &buckets, segment.rank_bits())?;

    let start = output.align()?;
    for (fence, &position) in suffixes.iter().step_by(FENCE as usize).enumerate() {
        if fence % CHUNK == 0 {
            progress.advance(0)?;
        }
        let rest = text[position as usize + 1..].iter().take_while(|&&symbol| symbol != 0);
        output.write_all(&key(bits, rest.map(|&symbol| symbol as u64)).to_le_bytes())?;
    }
    segment.sections[3] = start..output.position();

    let (index, successors) = successors(&text, suffixes, &buckets, progress)?;
    segment.successors = successors.len() as u64;
    segment.sections[4] = write_packed(output, &index, segment.successor_index_bits())?;
    segment.sections[5] = write_packed(output, &successors, bits + 8)?;
    Ok(())
}

fn read_text(output: &mut Output, segment: &SegmentEntry, bits: u32) -> io::Result<Vec<i32>> {
    let mut file = output.read_back()?;
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

fn write_packed(output: &mut Output, values: &[u64], bits: u32) -> io::Result<Range<u64>> {
    let start = output.align()?;
    let mut writer = PackedWriter::new(bits);
    for &value in values {
        writer.push(value, output)?;
    }
    writer.finish(output)?;
    Ok(start..output.position())
}
