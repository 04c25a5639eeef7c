//! Damaged and forged files: an error or an answer, never a panic, and `verify` sees every change.
//!
//! `SSSD_FUZZ_FILES` sets the number of forged files, `SSSD_FUZZ_SEED` their seed; `SSSD_FUZZ_ALL=1` tries all 255
//! changes of every byte.

use sssd_core::{Corpus, Token};
use xxhash_rust::xxh3::xxh3_64;

use super::build;
use crate::format::{FENCE, PAGE};
use crate::{BuildOptions, Datastore, Error};

const TRAILER: usize = 40;
// places in the header
const UUID: usize = 16;
const FILE_LENGTH: usize = 96;
const CHECKSUMS_AT: usize = 104;
const TABLE_AT: usize = 120;
const TABLE_HASH: usize = 136;

/// Seven of its patterns of 7 bits are tokens that occur, 93 more are tokens, and the rest are none.
const VOCAB: u32 = 100;
const STEP: u32 = 16;

/// A file with two segments and more than one fence.
fn small_file() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let documents: Vec<Vec<Token>> = (0..40)
        .map(|document| (0..document).map(|index| (index * index + document) % 7 * STEP).collect())
        .collect();
    let symbols = 12 * FENCE;
    assert!(documents.concat().len() as u64 > symbols / 2);
    build(&path, BuildOptions::new(VOCAB), Some(symbols / 2), &documents);
    std::fs::read(path).unwrap()
}

/// Opens and asks everything. Whether the file was accepted, and whether it verified.
fn exercise(bytes: Vec<u8>) -> (bool, bool) {
    let Ok(store) = Datastore::from_bytes("forged", bytes) else { return (false, false) };
    let (mut matches, mut successors, mut window) = (Vec::new(), Vec::new(), [0; 40]);
    let vocab_size = store.vocab_size();
    for context in
        [[0, 1, 4, 2, 2, 4, 1, 0, 1], [6, 6, 5, 3, 3, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, vocab_size, 1, 4]]
    {
        let context = context.map(|token| token.saturating_mul(STEP));
        matches.clear();
        store.matches(&context, 9, 8, &mut matches);
        assert!(matches.len() <= 9 * 8);
        for found in &matches {
            let length = store.continuation(found.position, &mut window);
            assert!(window[..length].iter().all(|&token| token < vocab_size));
        }
        for token in context {
            successors.clear();
            store.successors(token, &mut successors);
            assert!(successors.len() <= 32 && successors.iter().all(|&(token, _)| token < vocab_size));
        }
    }
    for position in [0, 1, 1 << 31, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        store.continuation(position, &mut window);
    }
    let counted =
        store.count(&[2, 4, 1].map(|token| token * STEP)).and_then(|_| store.occurrences(&[4 * STEP], 1000));
    assert!(counted.is_ok() || vocab_size <= 4 * STEP);
    (true, store.verify().is_ok())
}

struct Random(u64);

impl Random {
    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn every_changed_byte_is_noticed() {
    let file = small_file();
    assert_eq!(exercise(file.clone()), (true, true));
    let all = setting("SSSD_FUZZ_ALL", 0) == 1;
    for place in 0..file.len() {
        for change in 1..=u8::MAX {
            if !all && change != 1 << (place % 8) {
                continue;
            }
            let mut bytes = file.clone();
            bytes[place] ^= change;
            assert!(!exercise(bytes).1, "byte {place} changed by {change:#04x} was not noticed");
        }
    }
}

#[test]
fn every_truncation_and_extension_is_refused() {
    let file = small_file();
    for length in 0..file.len() {
        assert!(Datastore::from_bytes("short", file[..length].to_vec()).is_err(), "accepted {length} bytes");
    }
    let longer = [file, vec![0]].concat();
    assert!(matches!(Datastore::from_bytes("long", longer), Err(Error::Corrupt { .. })));
}

/// Damage with all checksums of what opening reads put right, so that it gets past them.
#[test]
fn forged_files_do_no_harm() {
    let file = small_file();
    let mut random = Random(setting("SSSD_FUZZ_SEED", 1));
    let rounds = setting("SSSD_FUZZ_FILES", 20_000);
    let (mut accepted, mut unnoticed) = (0, 0);
    for _ in 0..rounds {
        let mut bytes = file.clone();
        let table = u64::from_le_bytes(bytes[TABLE_AT..TABLE_AT + 8].try_into().unwrap()) as usize;
        let body = PAGE as usize..table;
        // mostly the body, which opening does not check; sometimes the header's fields or the table
        let places = match random.below(4) {
            0 => 8..TABLE_HASH,
            1 => table..bytes.len() - TRAILER,
            _ => body,
        };
        for _ in 0..1 + random.below(8) {
            let place = places.start + random.below(places.len());
            match random.below(4) {
                0 => bytes[place] ^= 1 << random.below(8),
                1 => bytes[place] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                2 => bytes[place] = random.next() as u8,
                _ => {
                    let length = random.below(64).min(places.end - place);
                    let value = random.next() as u8;
                    bytes[place..place + length].fill(value);
                }
            }
        }
        if random.below(16) == 0 {
            bytes.truncate(random.below(bytes.len()));
        }
        reseal(&mut bytes);
        let changed = bytes != file;
        let (opened, verified) = exercise(bytes);
        accepted += u64::from(opened);
        unnoticed += u64::from(verified && changed);
    }
    println!("{rounds} forged files, {accepted} opened, {unnoticed} of them verified");
    assert!(accepted > rounds / 4);
    // A forger who puts the checksums right can change what only they protect: the unused parts of the header.
    assert!(unnoticed < rounds / 4);
}

/// Makes the checksums of the header, the table and the trailer fit whatever the file says now.
pub fn reseal(bytes: &mut [u8]) {
    if bytes.len() < PAGE as usize + TRAILER {
        return;
    }
    let field = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (table, end) = (field(bytes, TABLE_AT), bytes.len() - TRAILER);
    if table < end as u64 {
        let hash = xxh3_64(&bytes[table as usize..end]);
        bytes[TABLE_HASH..TABLE_HASH + 8].copy_from_slice(&hash.to_le_bytes());
    }
    let crc = PAGE as usize - 4;
    let sum = crc32fast::hash(&bytes[..crc]);
    bytes[crc..crc + 4].copy_from_slice(&sum.to_le_bytes());
    bytes.copy_within(UUID..UUID + 16, end);
    bytes.copy_within(FILE_LENGTH..FILE_LENGTH + 8, end + 16);
    let sum = xxh3_64(&bytes[end..end + 32]);
    bytes[end + 32..].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn the_errors_say_what_is_wrong() {
    let file = small_file();
    let refused = |bytes: Vec<u8>| Datastore::from_bytes("name", bytes).err().unwrap();
    let mut newer = file.clone();
    newer[8] = 9;
    let error = refused(newer);
    assert!(
        matches!(error, Error::Version { found: 9, supported: 2, .. })
            && error.to_string().contains("upgrade")
    );
    assert!(refused(b"text".to_vec()).to_string().contains("not a datastore"));
    let mut overlapping = file.clone();
    overlapping[CHECKSUMS_AT] ^= 1;
    reseal(&mut overlapping);
    assert!(refused(overlapping).to_string().contains("overlap"));
    let store = Datastore::from_bytes("name", file).unwrap();
    let error = store.check_model(Some(VOCAB + 1), None).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("the model has 101"));
    assert!(store.check_model(Some(VOCAB), Some(&[1; 32])).is_ok(), "an unknown tokenizer is not compared");
    assert!(matches!(store.count(&[VOCAB]), Err(Error::InvalidToken { token: VOCAB, vocab_size: VOCAB })));
}

#[test]
fn sections_outside_their_place_are_refused() {
    let file = small_file();
    let field = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let table = field(TABLE_AT) as usize;
    // the text of the first segment, and the suffixes of the second, which take less
    let (text, suffixes) = (table + 32, table + 128 + 48);
    let length = field(suffixes + 8) - field(suffixes);
    let moved = |to: u64| {
        let mut bytes = file.clone();
        bytes[suffixes..suffixes + 8].copy_from_slice(&to.to_le_bytes());
        bytes[suffixes + 8..suffixes + 16].copy_from_slice(&(to + length).to_le_bytes());
        reseal(&mut bytes);
        Datastore::from_bytes("name", bytes).err().map(|error| error.to_string())
    };
    assert_eq!(moved(field(suffixes)), None);
    for to in [field(text), 0, field(suffixes) + 1, field(CHECKSUMS_AT).next_multiple_of(PAGE)] {
        let error = moved(to).unwrap_or_default();
        assert!(error.contains("a section lies outside its place"), "{to}: {error}");
    }
}
