//! A store with tombstones against a brute-force search of the living documents, and forged tombstones.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use sssd_core::{Corpus, Token};
use xxhash_rust::xxh3::xxh3_64;

use super::build;
use super::documents::read;
use super::oracle::{check_counts, check_matches, check_successors, corpus, follow, layout, queries, write};
use crate::format::{BLOCK, PAGE};
use crate::{BuildOptions, Builder, Datastore, Error, Load, Progress, write_tombstones};

const CHECKSUMS_AT: usize = 64;
const TAIL_HASH: usize = 80;
const CRC_AT: usize = 4092;

/// Opens files of which the documents of `dead` are so, in two strokes.
fn open(paths: &[std::path::PathBuf], dead: &[bool]) -> Datastore {
    let mut store = Datastore::open(paths, Load::Mmap).unwrap();
    let mut rest = dead;
    for (file, path) in paths.iter().enumerate() {
        let mut alone = Datastore::open(&[path], Load::Mmap).unwrap();
        let (dead, others) = rest.split_at(alone.documents() as usize);
        rest = others;
        let target = path.with_extension("dead");
        for share in [2, 1] {
            let some: Vec<bool> =
                dead.iter().enumerate().map(|(at, dead)| at % share == 0 && *dead).collect();
            write_tombstones(&Arc::new(alone), &some, &target, &Progress::default()).unwrap();
            alone = Datastore::open(&[path], Load::Mmap).unwrap();
            alone.add_tombstones(0, &target, &Progress::default()).unwrap();
        }
        store.add_tombstones(file, &target, &Progress::default()).unwrap();
    }
    store
}

fn living(documents: &[Vec<Token>], dead: &[bool]) -> Vec<Vec<Token>> {
    let living = documents.iter().zip(dead).filter(|(_, dead)| !**dead);
    living.map(|(document, _)| document.clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_store_with_tombstones_is_one_of_the_living(
        (vocab, documents) in corpus(),
        layout in layout(),
        dead in prop::collection::vec(any::<bool>(), 30),
        starts in prop::collection::vec((any::<prop::sample::Index>(), 1usize..8), 12),
        (max_length, max_samples) in (1usize..10, 1usize..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let dead = &dead[..documents.len()];
        let paths = write(folder.path(), &documents, vocab, layout);
        let store = Arc::new(open(&paths, dead));
        let merged = folder.path().join("merged");
        let mut builder = Builder::create(&merged, BuildOptions::new(vocab)).unwrap();
        let mut added = vec![true; documents.len()];
        builder.add_datastore(&store, &mut added).unwrap();
        builder.finish(&Progress::default()).unwrap();
        let merged = Arc::new(Datastore::open(&[&merged], Load::Ram).unwrap());
        prop_assert!(added.iter().zip(dead).all(|(added, dead)| added != dead));

        let left = living(&documents, dead);
        prop_assert_eq!(&read(&merged).unwrap(), &left);
        prop_assert_eq!(&read(&store).unwrap(), &documents);
        let queries = queries(&documents.concat(), &starts); // also those of the dead
        for store in [&store, &merged] {
            check_counts(store, &left, &queries)?;
            for context in &queries {
                check_matches(store, &left, context, max_length, max_samples)?;
            }
            for token in 0..vocab.min(4) {
                check_successors(store, &left, token)?;
            }
        }
    }
}

/// Three tokens in random order, so that each has thousands of occurrences.
fn dense() -> (Vec<Vec<Token>>, Vec<bool>) {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 40
    };
    let documents: Vec<Vec<Token>> =
        (0..120).map(|_| (0..500).map(|_| (next() % 3) as Token).collect()).collect();
    let dead = (0..documents.len()).map(|at| next() % 3 == 0 || at / 10 == 4).collect();
    (documents, dead)
}

#[test]
fn samples_are_spread_evenly_over_the_living() {
    let folder = tempfile::tempdir().unwrap();
    let (documents, dead) = dense();
    let paths = write(folder.path(), &documents, 3, (1, 1 << 20));
    let store = open(&paths, &dead);
    let left = living(&documents, &dead);
    let alone = folder.path().join("alone");
    build(&alone, BuildOptions::new(3), None, &left);
    let alone = Datastore::open(&[&alone], Load::Ram).unwrap();
    for query in [vec![0], vec![1, 2], vec![2, 2, 2], vec![0, 1, 2, 0, 1]] {
        let all = store.occurrences(&query, usize::MAX).unwrap();
        assert_eq!(all.len() as u64, alone.count(&query).unwrap());
        // in the order of the suffixes, those of the living alone
        let ordered = |store: &Datastore, positions: &[u64]| -> Vec<Vec<Token>> {
            positions.iter().flat_map(|&position| follow(store, [position], 20)).collect()
        };
        let expected = alone.occurrences(&query, usize::MAX).unwrap();
        assert_eq!(ordered(&store, &all), ordered(&alone, &expected));
        let (total, taken) = (all.len(), 64.min(all.len()));
        let few = store.occurrences(&query, taken).unwrap();
        let spread: Vec<u64> = (0..taken).map(|at| all[(2 * at + 1) * total / (2 * taken)]).collect();
        assert_eq!(few, spread);
    }
    for token in 0..3 {
        let [mut one, mut other] = [Vec::new(), Vec::new()];
        store.successors(token, &mut one);
        alone.successors(token, &mut other);
        assert_eq!(one, other);
    }
}

/// A store with tombstones, and their bytes.
fn small(folder: &Path) -> (Vec<std::path::PathBuf>, Vec<Vec<Token>>, Vec<u8>) {
    let documents = vec![vec![0, 1, 2, 0, 1], vec![], vec![2, 1, 0], vec![0, 1, 1], vec![1]];
    let paths = write(folder, &documents, 3, (1, 9));
    open(&paths, &[false, true, true, false, false]);
    let bytes = std::fs::read(paths[0].with_extension("dead")).unwrap();
    (paths, living(&documents, &[false, true, true, false, false]), bytes)
}

/// Opens the store with these tombstones, and looks at all that they are asked about.
fn attempt(path: &Path, bytes: &[u8]) -> Result<Datastore, Error> {
    let mut store = Datastore::open(&[path], Load::Ram).unwrap();
    store.add_tombstones_from_bytes(0, "dead", bytes.to_vec())?;
    let mut found = Vec::new();
    for token in 0..3 {
        let count = store.count(&[token]).unwrap();
        assert!(count <= store.count(&[]).unwrap());
        for position in store.occurrences(&[token], 100).unwrap() {
            store.continuation(position, &mut [0; 8]);
        }
        store.matches(&[token, 1, 0], 8, 4, &mut found);
        let mut successors = Vec::new();
        store.successors(token, &mut successors);
    }
    let store = Arc::new(store);
    read(&store).unwrap();
    Ok(Arc::into_inner(store).unwrap())
}

#[test]
fn a_changed_byte_or_another_length_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, left, bytes) = small(folder.path());
    let store = attempt(&paths[0], &bytes).unwrap();
    assert_eq!(store.count(&[0, 1]).unwrap(), 3);
    assert_eq!(store.dead(0), (2, 3));
    assert_eq!(store.count(&[]).unwrap(), left.concat().len() as u64);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(attempt(&paths[0], &changed).is_err(), "{at}");
        assert!(attempt(&paths[0], &bytes[..at]).is_err(), "{at}");
    }
    assert!(attempt(&paths[0], &[bytes.clone(), vec![0]].concat()).is_err());
}

#[test]
fn those_of_another_store_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, _, bytes) = small(folder.path());
    let other = folder.path().join("other");
    build(&other, BuildOptions::new(3), None, &[vec![0, 1]]);
    let error = attempt(&other, &bytes).err().unwrap();
    assert!(matches!(&error, Error::InvalidArgument(_)) && error.to_string().contains("another datastore"));
    let store = Arc::new(Datastore::open(&[&paths[0], &other], Load::Ram).unwrap());
    let error = write_tombstones(&store, &[true; 6], &folder.path().join("dead"), &Progress::default());
    assert!(matches!(error, Err(Error::InvalidArgument(_))));
    let store = Arc::new(Datastore::open(&[&other], Load::Ram).unwrap());
    let error = write_tombstones(&store, &[], &folder.path().join("dead"), &Progress::default());
    assert!(matches!(error, Err(Error::InvalidArgument(_))));
    let cancelled = Progress::default();
    cancelled.cancel();
    let error = write_tombstones(&store, &[true], &folder.path().join("dead"), &cancelled);
    assert!(matches!(error, Err(Error::Cancelled)) && !folder.path().join("dead").exists());
    let mut newer = bytes;
    newer[8] = 9;
    assert!(matches!(attempt(&paths[0], &newer), Err(Error::Version { found: 9, .. })));
}

/// Makes the checksums fit again.
fn reseal(bytes: &mut [u8]) {
    let end = u64::from_le_bytes(bytes[CHECKSUMS_AT..CHECKSUMS_AT + 8].try_into().unwrap()) as usize;
    if let Some(body) = bytes.get(PAGE as usize..end).map(<[u8]>::to_vec) {
        for (index, block) in body.chunks(BLOCK as usize).enumerate() {
            if let Some(place) = bytes.get_mut(end + 8 * index..end + 8 * index + 8) {
                place.copy_from_slice(&xxh3_64(block).to_le_bytes());
            }
        }
        let hash = xxh3_64(&bytes[end..]);
        bytes[TAIL_HASH..TAIL_HASH + 8].copy_from_slice(&hash.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes[..CRC_AT]);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&sum.to_le_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn forged_tombstones_do_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0usize..4), 1..6),
    ) {
        thread_local! {
            static SMALL: (tempfile::TempDir, Vec<std::path::PathBuf>, Vec<u8>) = {
                let folder = tempfile::tempdir().unwrap();
                let (paths, _, bytes) = small(folder.path());
                (folder, paths, bytes)
            };
        }
        SMALL.with(|(_, paths, bytes)| {
            let mut forged = bytes.clone();
            let length = forged.len();
            for (place, byte, region) in &changes {
                // header, sections, table; anywhere
                let range = [0..88, PAGE as usize..length, length - 48..length, 0..length][*region].clone();
                forged[range.start + place.index(range.len())] = *byte;
            }
            reseal(&mut forged);
            let _ = attempt(&paths[0], &forged);
        });
    }
}
