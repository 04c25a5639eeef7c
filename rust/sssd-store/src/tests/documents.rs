//! Documents read back, and added to another store.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use sssd_core::Token;

use super::build;
use super::oracle::{corpus, layout, open};
use crate::{BuildOptions, Builder, Datastore, DocumentReader, Error, Load, Progress};

/// All documents of a store.
pub fn read(store: &Arc<Datastore>) -> crate::Result<Vec<Vec<Token>>> {
    let mut reader = DocumentReader::new(Arc::clone(store));
    let mut documents = Vec::new();
    while let Some(document) = reader.next_document()? {
        assert_eq!(document.number, documents.len() as u64);
        let mut tokens = Vec::new();
        while (tokens.len() as u64) < document.length {
            let from = tokens.len() as u64;
            tokens.extend_from_slice(reader.tokens(&document, from)?);
        }
        assert!(reader.tokens(&document, document.length)?.is_empty());
        documents.push(tokens);
    }
    Ok(documents)
}

/// Writes what `chosen` names of a store, and returns what was added.
fn merge(
    path: &Path,
    options: BuildOptions,
    segment: u64,
    store: &Arc<Datastore>,
    chosen: &[bool],
) -> Vec<bool> {
    let mut builder = Builder::create(path, options).unwrap();
    builder.limit_segments(segment);
    let mut chosen = chosen.to_vec();
    builder.add_datastore(store, &mut chosen).unwrap();
    assert_eq!(builder.watch().done(), store.files().map(|file| file.tokens + file.documents).sum::<u64>());
    builder.finish(&Progress::default()).unwrap();
    chosen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, ..ProptestConfig::default() })]

    #[test]
    fn are_those_that_were_added((vocab, documents) in corpus(), layout in layout(), start in 0u64..40) {
        let store = Arc::new(open(&documents, vocab, layout));
        prop_assert_eq!(store.documents(), documents.len() as u64);
        prop_assert_eq!(&read(&store).unwrap(), &documents);
        let mut reader = DocumentReader::new(store);
        reader.skip_to(start);
        let next = reader.next_document().unwrap();
        prop_assert!(next.map_or(documents.len() as u64 <= start, |next| next.number <= start));
    }

    #[test]
    fn make_the_file_that_they_would_have_made_at_first(
        (vocab, documents) in corpus(),
        layout in layout(),
        segment in prop_oneof![Just(1 << 20), 50u64..200],
        seed in prop::collection::vec(any::<bool>(), 30),
        deduplicate: bool,
    ) {
        let store = Arc::new(open(&documents, vocab, layout));
        let chosen = &seed[..documents.len()];
        let folder = tempfile::tempdir().unwrap();
        let paths = ["merged", "built"].map(|name| folder.path().join(name));
        let options = BuildOptions { deduplicate, ..BuildOptions::new(vocab) };
        let added = merge(&paths[0], options.clone(), segment, &store, chosen);
        let mut seen = HashSet::new();
        let is_new = |(document, &chosen): (&Vec<Token>, &bool)| chosen && (seen.insert(document.clone()) || !deduplicate);
        let expected: Vec<bool> = documents.iter().zip(chosen).map(is_new).collect();
        prop_assert_eq!(&added, &expected);
        let kept: Vec<_> = documents.iter().zip(chosen).filter(|(_, chosen)| **chosen).map(|(document, _)| document.clone()).collect();
        build(&paths[1], options, Some(segment), &kept);
        let [merged, built] = paths.map(|path| std::fs::read(path).unwrap());
        prop_assert!(merged == built);
    }
}

#[test]
fn longer_than_what_is_read_at_once_are_whole_and_cut_where_the_builder_cuts() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["first", "merged", "built"].map(|name| folder.path().join(name));
    let document =
        |length: usize| (0..length as u32).map(|index| (index ^ index >> 5) % 99).collect::<Vec<_>>();
    let documents: Vec<_> = [3, 65_533, 0, 65_535, 65_536, 70_000, 200_000, 1].map(document).into();
    build(&paths[0], BuildOptions::new(99), None, &documents);
    let store = Arc::new(Datastore::open(&paths[..1], Load::Mmap).unwrap());
    assert_eq!(read(&store).unwrap(), documents);
    let all = vec![true; documents.len()];
    for deduplicate in [false, true] {
        let options = BuildOptions { deduplicate, ..BuildOptions::new(99) };
        assert_eq!(merge(&paths[1], options.clone(), 90_001, &store, &all), all);
        build(&paths[2], options, Some(90_001), &documents);
        assert!(std::fs::read(&paths[1]).unwrap() == std::fs::read(&paths[2]).unwrap());
    }
}

#[test]
fn of_a_damaged_or_foreign_store_are_not_added() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["store", "merged"].map(|name| folder.path().join(name));
    build(
        &paths[0],
        BuildOptions { fingerprint: [1; 32], ..BuildOptions::new(9) },
        None,
        &[vec![1, 2, 3], vec![]],
    );
    let mut bytes = std::fs::read(&paths[0]).unwrap();
    let store = Arc::new(Datastore::from_bytes("store", bytes.clone()).unwrap());
    let attempt = |store: &Arc<Datastore>, options, chosen: &[bool]| {
        let mut builder = Builder::create(&paths[1], options).unwrap();
        let added = builder.add_datastore(store, &mut chosen.to_vec());
        assert!(!builder.has_failed() && (added.is_ok() || builder.symbols() == 0));
        added
    };
    assert!(attempt(&store, BuildOptions::new(9), &[true; 2]).is_ok());
    let mismatch = attempt(&store, BuildOptions::new(10), &[true; 2]);
    assert!(matches!(mismatch, Err(Error::Mismatch { .. })));
    let mismatch = attempt(&store, BuildOptions { fingerprint: [2; 32], ..BuildOptions::new(9) }, &[true; 2]);
    assert!(matches!(mismatch, Err(Error::Mismatch { .. })));
    let short = attempt(&store, BuildOptions::new(9), &[true]);
    assert!(matches!(short, Err(Error::InvalidArgument(_))));
    bytes[4096] ^= 3; // another token
    let store = Arc::new(Datastore::from_bytes("store", bytes.clone()).unwrap());
    assert!(matches!(attempt(&store, BuildOptions::new(9), &[true; 2]), Err(Error::Corrupt { .. })));
    bytes[4096] = 0; // another document
    bytes[4097] = 0;
    let store = Arc::new(Datastore::from_bytes("store", bytes.clone()).unwrap());
    assert!(matches!(read(&store), Err(Error::Corrupt { .. })));
    bytes[4096] = 0xff; // no token
    let store = Arc::new(Datastore::from_bytes("store", bytes).unwrap());
    assert!(matches!(read(&store), Err(Error::Corrupt { .. })));
}
