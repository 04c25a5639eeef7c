//! Tombstones with anything in them, checksums that fit, on the datastore that they were written for, under a drafter.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::{Corpus, fuzz_target};
use sssd_core::Token;
use sssd_fuzz::use_store;
use sssd_store::{BuildOptions, Builder, Datastore, Progress, write_tombstones};
use xxhash_rust::xxh3::xxh3_64;

// places in the header
const PAGE: usize = 4096;
const CHECKSUMS_AT: usize = 64;
const TAIL_HASH: usize = 80;
/// Of the counts of a segment.
const ENTRY: usize = 24;

/// A datastore and tombstones of half of it.
static GOOD: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let (path, tombstones) = (folder.path().join("store"), folder.path().join("tombstones"));
    let mut builder = Builder::create(&path, BuildOptions::new(100)).unwrap();
    for document in 0..12_u32 {
        let tokens: Vec<Token> = (0..90).map(|at| (at * at * (document + 1) + at) % 100).collect();
        builder.add_document(&tokens).unwrap();
    }
    builder.finish(&Progress::default()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let store = Arc::new(Datastore::from_bytes("store", bytes.clone()).unwrap());
    let dead: Vec<bool> = (0..12).map(|document| document % 2 == 0).collect();
    write_tombstones(&store, &dead, &tombstones, &Progress::default()).unwrap();
    (bytes, std::fs::read(tombstones).unwrap())
});

/// Changes of good tombstones: a place of 2 bytes, where the highest bit means the header, and 8 new bytes.
fn change(data: &[u8]) -> Vec<u8> {
    let mut bytes = GOOD.1.clone();
    for change in data.chunks_exact(10) {
        let place = usize::from(u16::from_le_bytes([change[0], change[1]]));
        let at = match place >> 15 {
            0 => PAGE + place % (bytes.len() - PAGE - 7),
            _ => place % (TAIL_HASH + 8),
        };
        bytes[at..at + 8].copy_from_slice(&change[2..]);
    }
    bytes
}

/// Makes the checksums fit: of the one block, of what follows it, of the header.
fn seal(bytes: &mut [u8]) {
    let body_end = u64::from_le_bytes(bytes[CHECKSUMS_AT..CHECKSUMS_AT + 8].try_into().unwrap()) as usize;
    if (PAGE..=bytes.len() - 8 - ENTRY).contains(&body_end) {
        let sum = xxh3_64(&bytes[PAGE..body_end]);
        bytes[body_end..body_end + 8].copy_from_slice(&sum.to_le_bytes());
        let sum = xxh3_64(&bytes[body_end..]);
        bytes[TAIL_HASH..TAIL_HASH + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[..PAGE - 4]);
    bytes[PAGE - 4..PAGE].copy_from_slice(&crc.to_le_bytes());
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let mut bytes = change(data);
    seal(&mut bytes);
    let mut store = Datastore::from_bytes("store", GOOD.0.clone()).unwrap();
    if store.add_tombstones_from_bytes(0, "fuzzed", bytes).is_ok() {
        use_store(store);
    }
    Corpus::Keep
});
