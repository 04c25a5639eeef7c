//! Positions and sizes beyond 2^31.

use std::io::{Seek, SeekFrom, Write};

use sssd_core::{Corpus, Match};

use crate::format::{BLOCK, Header, MAX_SYMBOLS, PAGE, SegmentEntry, symbol_bits};
use crate::packed::PackedWriter;
use crate::segment::key;
use crate::{BuildOptions, Builder, Datastore, Error, Load, Progress};

/// A segment of 2^32 symbols whose only document with tokens stands at its end; all before are empty. The
/// file is sparse: it takes a few pages on disk.
fn sparse_file(vocab_size: u32, document: &[u32]) -> tempfile::NamedTempFile {
    let mut entry =
        SegmentEntry { symbols: MAX_SYMBOLS, suffixes: document.len() as u64, ..Default::default() };
    entry.documents = entry.symbols - entry.suffixes;
    entry.successors = 0;
    let mut end = PAGE;
    for (section, length) in entry.section_lengths(vocab_size).into_iter().enumerate() {
        let start = end.next_multiple_of(PAGE);
        end = start + length;
        entry.sections[section] = start..end;
    }
    let first = MAX_SYMBOLS - document.len() as u64 - 1;
    let mut order: Vec<usize> = (0..document.len()).collect();
    order.sort_by_key(|&start| &document[start..]);
    let mut buckets =
        (0..=vocab_size).map(|token| document.iter().filter(|&&held| held < token).count() as u64);

    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut write = |at: u64, bits: u32, values: &mut dyn Iterator<Item = u64>| {
        let mut writer = PackedWriter::new(bits);
        file.seek(SeekFrom::Start(at)).unwrap();
        values.for_each(|value| writer.push(value, &mut file).unwrap());
        writer.finish(&mut file).unwrap();
    };
    let bits = symbol_bits(vocab_size);
    let text = entry.sections[0].start + first * u64::from(bits) / 8;
    let lead = first * u64::from(bits) % 8 / u64::from(bits); // symbols of the byte before the first
    let ends = (0..lead).map(|_| 0);
    write(text, bits, &mut ends.chain(document.iter().map(|&token| u64::from(token) + 1)));
    write(
        entry.sections[1].start,
        entry.position_bits(),
        &mut order.iter().map(|&start| first + start as u64),
    );
    write(entry.sections[2].start, entry.rank_bits(), &mut buckets);
    let fence = key(bits, document[order[0] + 1..].iter().map(|&token| u64::from(token) + 1));
    file.seek(SeekFrom::Start(entry.sections[3].start)).unwrap();
    file.write_all(&fence.to_le_bytes()).unwrap();
    let header = Header {
        vocab_size,
        tokens: entry.suffixes,
        documents: entry.documents,
        segment_symbols: entry.symbols,
        ..Default::default()
    };
    let checksums = vec![0; (end - PAGE).div_ceil(BLOCK) as usize];
    let (header, tail) = header.seal(end, &checksums, &[entry]).unwrap();
    file.seek(SeekFrom::Start(end)).unwrap();
    file.write_all(&tail).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(&header).unwrap();
    file
}

#[test]
fn a_document_beyond_position_2_to_the_31_is_found() {
    let file = sparse_file(3, &[2, 0, 1, 2, 0, 1, 1]);
    let store = Datastore::open(&[file.path()], Load::Mmap).unwrap();
    assert_eq!(store.count(&[0, 1]).unwrap(), 2);
    assert_eq!(store.count(&[2, 0, 1, 2]).unwrap(), 1);
    let mut matches: Vec<Match> = Vec::new();
    store.matches(&[2, 0, 1], 8, 4, &mut matches);
    assert_eq!(matches[0].length, 3);
    let mut following: Vec<Vec<u32>> = Vec::new();
    for found in matches.iter().filter(|found| found.length == 3) {
        assert!(found.position > 1 << 31);
        let mut out = [0; 8];
        let length = store.continuation(found.position, &mut out);
        following.push(out[..length].to_vec());
    }
    following.sort();
    assert_eq!(following, [vec![1], vec![2, 0, 1, 1]]);
}

#[test]
fn a_memory_limit_gives_segments_and_too_small_a_one_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let options = |limit| BuildOptions { max_memory: Some(limit), ..BuildOptions::new(100) };
    let error = Builder::create(&path, options(1 << 20)).err().unwrap();
    assert!(matches!(&error, Error::InvalidArgument(_)) && error.to_string().contains("at least"));

    let mut builder = Builder::create(&path, options(10 << 20)).unwrap();
    let stream: Vec<u32> = (0..1_000_000u32).map(|index| (index ^ index >> 7) % 100).collect();
    for piece in stream.chunks(999) {
        builder.add_stream(piece, 99).unwrap();
    }
    let summary = builder.finish(&Progress::default()).unwrap();
    assert_eq!(summary.tokens, 1_000_000);
    assert!(summary.segments > 1);
    let store = Datastore::open(&[&path], Load::Mmap).unwrap();
    let pairs = stream.windows(2).filter(|pair| **pair == [5, 6]).count();
    assert_eq!(store.count(&[5, 6]).unwrap(), pairs as u64);
}

#[test]
fn the_file_is_the_same_whatever_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let stream: Vec<u32> =
        (0..300_000u32).map(|index| (index ^ index >> 7).wrapping_mul(index) % 100).collect();
    let built = |threads| {
        let mut builder = Builder::create(&path, BuildOptions { threads, ..BuildOptions::new(100) }).unwrap();
        builder.limit_segments(40_000);
        for piece in stream.chunks(999) {
            builder.add_document(piece).unwrap();
        }
        let progress = Progress::default();
        let summary = builder.finish(&progress).unwrap();
        assert_eq!(summary.segments, 8);
        assert!(progress.done() >= summary.tokens * 9 / 10);
        std::fs::read(&path).unwrap()
    };
    let alone = built(1);
    for threads in [2, 3, 64] {
        assert!(built(threads) == alone, "{threads} threads");
    }
}

#[test]
fn a_build_that_is_given_up_ends_its_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut builder = Builder::create(&path, BuildOptions { threads: 3, ..BuildOptions::new(100) }).unwrap();
    builder.limit_segments(40_000);
    for document in 0..200u32 {
        builder.add_document(&vec![document % 100; 999]).unwrap();
    }
    let progress = Progress::default();
    progress.cancel();
    assert!(matches!(builder.finish(&progress), Err(Error::Cancelled)));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
}
