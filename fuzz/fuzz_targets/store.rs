//! Datastore files with anything in them, checksums that fit where the format has any, under a drafter.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{Corpus, fuzz_target};
use sssd_core::Token;
use sssd_fuzz::use_store;
use sssd_store::{BuildOptions, Builder, Datastore, Progress};
use xxhash_rust::xxh3::xxh3_64;

// places in the header
const PAGE: usize = 4096;
const UUID: usize = 16;
const FILE_LENGTH: usize = 96;
const CHECKSUMS_AT: usize = 104;
const CHECKSUMS_HASH: usize = 112;
const TABLE_AT: usize = 120;
const TABLE_HASH: usize = 136;
const TRAILER: usize = 40;

static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    // 100 of 127 patterns of a symbol are tokens, so that others can be noticed
    let mut builder = Builder::create(&path, BuildOptions::new(100)).unwrap();
    for document in 0..12_u32 {
        let tokens: Vec<Token> =
            (0..40).map(|at| (at * at * (document + 1) + at) % if at < 20 { 9 } else { 100 }).collect();
        builder.add_document(&tokens).unwrap();
    }
    builder.finish(&Progress::default()).unwrap();
    std::fs::read(path).unwrap()
});

fn number(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// Changes of a good file: a place of 3 bytes, where the highest bit means from the end, and 8 new bytes.
fn change(data: &[u8]) -> Vec<u8> {
    let mut bytes = GOOD.clone();
    for change in data.chunks_exact(11) {
        let place = u32::from_le_bytes([change[0], change[1], change[2], 0]);
        let last = bytes.len() - 8;
        // of the header only the fields are of interest
        let at = match place >> 22 {
            0 => place as usize % 148,
            1 => last.saturating_sub(place as usize & 0xfff),
            _ => PAGE + place as usize % (last - PAGE),
        };
        bytes[at..at + 8].copy_from_slice(&change[3..]);
    }
    bytes
}

/// Makes the checksums of what opening reads fit, and those of the body.
fn seal(bytes: &mut [u8]) {
    let end = bytes.len() - TRAILER;
    let (sums, table) = (number(bytes, CHECKSUMS_AT), number(bytes, TABLE_AT));
    if PAGE <= sums && sums + 8 <= table && table <= end {
        let sum = xxh3_64(&bytes[PAGE..sums.min(PAGE + (1 << 20))]);
        bytes[sums..sums + 8].copy_from_slice(&sum.to_le_bytes());
        let sum = xxh3_64(&bytes[sums..table]);
        bytes[CHECKSUMS_HASH..CHECKSUMS_HASH + 8].copy_from_slice(&sum.to_le_bytes());
        let sum = xxh3_64(&bytes[table..end]);
        bytes[TABLE_HASH..TABLE_HASH + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[..PAGE - 4]);
    bytes[PAGE - 4..PAGE].copy_from_slice(&crc.to_le_bytes());
    let mut trailer = bytes[UUID..UUID + 16].to_vec();
    trailer.extend(&bytes[FILE_LENGTH..FILE_LENGTH + 8]);
    trailer.extend(&GOOD[..8]);
    trailer.extend(xxh3_64(&trailer).to_le_bytes());
    bytes[end..].copy_from_slice(&trailer);
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let mut bytes = change(data);
    seal(&mut bytes);
    let Ok(store) = Datastore::from_bytes("fuzzed", bytes) else { return Corpus::Keep };
    use_store(store);
    Corpus::Keep
});
