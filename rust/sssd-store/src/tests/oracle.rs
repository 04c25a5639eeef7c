//! The store against a brute-force search of the documents.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sssd_core::{Corpus, Match, Token};

use super::build;
use crate::{BuildOptions, Datastore, Load};

/// A store of the documents, split over `files` files with segments of at most `segment_symbols`.
pub fn open(documents: &[Vec<Token>], vocab_size: u32, layout: (usize, u64)) -> Datastore {
    let folder = tempfile::tempdir().unwrap();
    let paths = write(folder.path(), documents, vocab_size, layout);
    let store = Datastore::open(&paths, Load::Ram).unwrap();
    store.verify().unwrap();
    store
}

/// The files of such a store.
pub fn write(
    folder: &Path,
    documents: &[Vec<Token>],
    vocab_size: u32,
    (files, segment_symbols): (usize, u64),
) -> Vec<PathBuf> {
    let parts = documents.chunks(documents.len().div_ceil(files).max(1));
    let paths: Vec<_> = (0..parts.len().max(1)).map(|part| folder.join(part.to_string())).collect();
    let parts = parts.chain(documents.is_empty().then_some(documents));
    for (path, part) in paths.iter().zip(parts) {
        build(path, BuildOptions::new(vocab_size), Some(segment_symbols), part);
    }
    paths
}

/// What follows each occurrence of `query`, sorted.
pub fn continuations(documents: &[Vec<Token>], query: &[Token]) -> Vec<Vec<Token>> {
    let mut found: Vec<_> = documents
        .iter()
        .flat_map(|document| (0..document.len()).map(move |start| &document[start..]))
        .filter_map(|suffix| suffix.strip_prefix(query))
        .map(<[Token]>::to_vec)
        .collect();
    found.sort();
    found
}

pub fn follow(
    store: &Datastore,
    positions: impl IntoIterator<Item = u64>,
    longest: usize,
) -> Vec<Vec<Token>> {
    let mut found: Vec<_> = positions
        .into_iter()
        .map(|position| {
            let mut out = vec![0; longest];
            let length = store.continuation(position, &mut out);
            out.truncate(length);
            out
        })
        .collect();
    found.sort();
    found
}

/// Corpora of few distinct tokens, some of them the largest ids of vocabularies of every symbol width.
pub fn corpus() -> impl Strategy<Value = (u32, Vec<Vec<Token>>)> {
    let vocab =
        prop_oneof![1u32..5, Just(255), Just(256), Just(65_535), Just(65_536), Just(128_256), Just(1 << 20)];
    vocab.prop_flat_map(|vocab| {
        let token = prop_oneof![4 => 0..vocab.min(3), 1 => Just(vocab - 1), 1 => 0..vocab];
        let document = prop::collection::vec(token, 0..40);
        (Just(vocab), prop::collection::vec(document, 0..30))
    })
}

/// Files, and the largest segment. A segment holds the longest document, so that none is cut.
pub fn layout() -> impl Strategy<Value = (usize, u64)> {
    (1usize..4, prop_oneof![Just(1 << 20), 50u64..200])
}

/// Stretches of the documents to look up.
pub fn queries(stream: &[Token], starts: &[(prop::sample::Index, usize)]) -> Vec<Vec<Token>> {
    let starts = starts.iter().filter(|_| !stream.is_empty());
    let stretch = |(start, length): &(prop::sample::Index, usize)| {
        let start = start.index(stream.len());
        stream[start..(start + length).min(stream.len())].to_vec()
    };
    starts.map(stretch).collect()
}

pub fn check_counts(
    store: &Datastore,
    documents: &[Vec<Token>],
    queries: &[Vec<Token>],
) -> Result<(), TestCaseError> {
    prop_assert_eq!(store.count(&[]).unwrap(), documents.concat().len() as u64);
    for query in queries {
        let expected = continuations(documents, query);
        prop_assert_eq!(store.count(query).unwrap(), expected.len() as u64);
        let positions = store.occurrences(query, usize::MAX).unwrap();
        prop_assert_eq!(follow(store, positions, 40), expected);
    }
    Ok(())
}

pub fn check_matches(
    store: &Datastore,
    documents: &[Vec<Token>],
    context: &[Token],
    max_length: usize,
    max_samples: usize,
) -> Result<(), TestCaseError> {
    let mut found: Vec<Match> = Vec::new();
    store.matches(context, max_length, max_samples, &mut found);

    let mut expected = Vec::new(); // (length, occurrences)
    for length in (1..=max_length.min(context.len())).rev() {
        let count = continuations(documents, &context[context.len() - length..]).len();
        if count > 0 && (length > 1 || expected.is_empty()) {
            expected.push((length, count));
            if count >= 2 * max_samples {
                break;
            }
        }
    }
    let mut rest = found.as_slice();
    for (length, count) in expected {
        let taken = count.min(max_samples);
        let (samples, others) = rest.split_at_checked(taken).ok_or(TestCaseError::fail("too few"))?;
        rest = others;
        for sample in samples {
            prop_assert_eq!(sample.length as usize, length);
            prop_assert_eq!(sample.weight, count as f32 / taken as f32);
        }
        let all = continuations(documents, &context[context.len() - length..]);
        let found = follow(store, samples.iter().map(|sample| sample.position), 40);
        prop_assert!(found.iter().all(|found| all.contains(found)));
        prop_assert!(taken < count || found == all);
    }
    prop_assert!(rest.is_empty());
    Ok(())
}

pub fn check_successors(
    store: &Datastore,
    documents: &[Vec<Token>],
    token: Token,
) -> Result<(), TestCaseError> {
    let mut found = Vec::new();
    store.successors(token, &mut found);
    let all = continuations(documents, &[token]);
    prop_assert!(found.len() <= 32);
    prop_assert!(found.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    for (successor, share) in &found {
        let count = all.iter().filter(|rest| rest.first() == Some(successor)).count();
        let exact = count as f32 / all.len() as f32;
        prop_assert!((share / exact - 1.0).abs() < 0.03, "{} {}", share, exact);
    }
    let mut distinct: Vec<_> = all.iter().filter_map(|rest| rest.first()).collect();
    distinct.dedup();
    prop_assert_eq!(found.len(), distinct.len().min(32));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn counts_and_continuations(
        (vocab, documents) in corpus(),
        layout in layout(),
        starts in prop::collection::vec((any::<prop::sample::Index>(), 1usize..12), 30),
        noise in prop::collection::vec(0u32..3, 1..5),
    ) {
        let store = open(&documents, vocab, layout);
        let mut queries = queries(&documents.concat(), &starts);
        queries.push(noise.iter().map(|&token| token.min(vocab - 1)).collect());
        check_counts(&store, &documents, &queries)?;
    }

    #[test]
    fn matches_follow_their_contract(
        (vocab, documents) in corpus(),
        layout in layout(),
        end in any::<prop::sample::Index>(),
        max_length in 1usize..10,
        max_samples in 1usize..6,
    ) {
        let store = open(&documents, vocab, layout);
        let stream: Vec<Token> = documents.concat();
        prop_assume!(!stream.is_empty());
        check_matches(&store, &documents, &stream[..=end.index(stream.len())], max_length, max_samples)?;
    }

    #[test]
    fn successors_are_the_most_frequent((vocab, documents) in corpus(), token in 0u32..4, layout in layout()) {
        check_successors(&open(&documents, vocab, layout), &documents, token)?;
    }
}
