//! Samples by domain against a brute-force search of the documents.

use std::sync::Arc;

use proptest::prelude::*;
use sssd_core::{Corpus, DOMAINS, Match, Token};

use super::oracle::{continuations, corpus, follow, layout, open, write};
use crate::{Datastore, DomainRun, Error, Load, Progress, write_tombstones};

/// Says which domain each document is of.
fn set(store: &mut Datastore, documents: &[Vec<Token>], domains: &[u8]) {
    let mut runs = documents.iter().zip(domains).map(|(document, &domain)| DomainRun {
        documents: 1,
        tokens: document.len() as u64,
        domain,
    });
    let files: Vec<_> = store.files().map(|file| file.documents as usize).collect();
    let files: Vec<_> = files.into_iter().map(|count| runs.by_ref().take(count).collect()).collect();
    store.set_domains(&files).unwrap();
}

/// The number by which look-ups know each domain: 0 unless it has at most an eighth of all tokens.
fn numbers(documents: &[Vec<Token>], domains: &[u8]) -> Vec<u8> {
    let tokens = |domain: u8| {
        let own = documents.iter().zip(domains).filter(|(_, held)| **held == domain);
        own.map(|(document, _)| document.len()).sum::<usize>()
    };
    let small = |&domain: &u8| tokens(domain) > 0 && 8 * tokens(domain) <= documents.concat().len();
    let known: Vec<u8> = (0..DOMAINS as u8).filter(small).collect();
    let place = |domain| known.iter().position(|known| known == domain).map_or(0, |at| at as u8 + 1);
    domains.iter().map(place).collect()
}

/// The samples that a domain with `seen` occurrences gets.
fn wanted(seen: usize, weight: f32, total: f32, limit: usize) -> usize {
    let by_weight = seen as f32 * weight * (limit as f32 / total).min(1.0);
    seen.min(by_weight.max(16.0 * weight).round() as usize)
}

fn check(
    store: &Datastore,
    (documents, domains): (&[Vec<Token>], &[u8]),
    context: &[Token],
    (max_length, max_samples): (usize, usize),
    weights: &[f32; DOMAINS],
) -> Result<(), TestCaseError> {
    let mut found: Vec<Match> = Vec::new();
    store.matches_by_domain(context, max_length, max_samples, weights, &mut found);
    let of = |domain: usize| {
        let own = documents.iter().zip(domains).filter(move |(_, held)| usize::from(**held) == domain);
        own.map(|(document, _)| document.clone()).collect::<Vec<_>>()
    };
    let parts: Vec<_> = (0..DOMAINS).map(of).collect();
    let (mut rest, mut longest) = (found.as_slice(), None);
    for length in (1..=max_length.min(context.len())).rev() {
        let query = &context[context.len() - length..];
        let held: Vec<_> = parts.iter().map(|part| continuations(part, query)).collect();
        let total: f32 = held.iter().zip(weights).map(|(held, weight)| held.len() as f32 * weight).sum();
        if total == 0.0 || length == 1 && longest.is_some() {
            continue;
        }
        longest = longest.or(Some(length));
        let count = rest.iter().take_while(|sample| sample.length as usize == length).count();
        let (samples, others) = rest.split_at(count);
        rest = others;
        for (domain, (held, &weight)) in held.iter().zip(weights).enumerate() {
            let own: Vec<_> = samples.iter().filter(|sample| usize::from(sample.domain) == domain).collect();
            prop_assert_eq!(own.len(), wanted(held.len(), weight, total, max_samples));
            let counted: f32 = own.iter().map(|sample| sample.weight).sum();
            let all = held.len() as f32 * weight;
            prop_assert!(own.is_empty() || (counted - all).abs() < 1e-3 * (1.0 + all));
            let texts = follow(store, own.iter().map(|sample| sample.position), 40);
            prop_assert!(texts.iter().all(|text| held.contains(text)));
            prop_assert!(texts.len() < held.len() || texts == *held);
        }
        if total >= 2.0 * max_samples as f32 {
            break;
        }
    }
    prop_assert!(rest.is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn each_domain_is_sampled_by_itself(
        (vocab, documents) in corpus(),
        domains in prop::collection::vec(prop_oneof![9 => Just(0u8), 1 => Just(1), 1 => Just(2), 1 => Just(15)], 30),
        layout in layout(),
        end in any::<prop::sample::Index>(),
        limits in (1usize..10, 1usize..20),
        powers in prop::collection::vec(0i32..8, DOMAINS),
    ) {
        let stream: Vec<Token> = documents.concat();
        // more occurrences than are looked at are known by a part of them
        prop_assume!(!stream.is_empty() && stream.len() <= 256);
        let mut store = open(&documents, vocab, layout);
        set(&mut store, &documents, &domains);
        let weights = std::array::from_fn(|domain| 0.5f32.powi(powers[domain]));
        let context = &stream[..=end.index(stream.len())];
        let domains = numbers(&documents, &domains[..documents.len()]);
        if store.domains() > 1 {
            check(&store, (&documents, &domains), context, limits, &weights)?;
        }
    }
}

/// 3,000 documents of a large domain, and 300 of a small one among them, of the same tokens but the last.
fn drowned() -> Datastore {
    let domain = |n: u32| u8::from(n % 11 == 10);
    let documents: Vec<Vec<Token>> = (0..3300).map(|n| vec![7, 8, 9, 10 + u32::from(domain(n))]).collect();
    let domains: Vec<_> = (0..3300).map(domain).collect();
    let mut store = open(&documents, 20, (1, 1 << 20));
    set(&mut store, &documents, &domains);
    store
}

#[test]
fn what_there_is_too_much_of_to_look_at_is_known_by_a_part() {
    let store = drowned();
    let mut found = Vec::new();
    for large in [1.0, 0.01] {
        let mut weights = [1.0; DOMAINS];
        weights[0] = large;
        found.clear();
        store.matches_by_domain(&[7, 8, 9], 3, 64, &weights, &mut found);
        let of = |domain| found.iter().filter(move |found| found.length == 3 && found.domain == domain);
        assert!(of(1).count() >= 16, "{}", of(1).count());
        let [large_counts, small_counts] =
            [0, 1].map(|domain| of(domain).map(|found| found.weight).sum::<f32>());
        assert!((large_counts / large / 3000.0 - 1.0).abs() < 0.03, "{large_counts}");
        assert!((small_counts / 300.0 - 1.0).abs() < 0.1, "{small_counts}");
    }
}

#[test]
fn a_small_domain_that_counts_most_has_successors_of_its_own() {
    let mut store = drowned();
    let successors = |store: &Datastore, large: f32| {
        let mut weights = [1.0; DOMAINS];
        weights[0] = large;
        let mut found = Vec::new();
        store.successors_by_domain(9, &weights, &mut found);
        found
    };
    assert_eq!(successors(&store, 0.01).len(), 2); // they have not been read
    store.read_domains(&Progress::default()).unwrap();
    assert_eq!(successors(&store, 0.01), [(11, 1.0)]);
    assert_eq!(successors(&store, 0.2).len(), 2); // 600 others are more than 300
    assert_eq!(Datastore::union([&store]).map(|one| successors(&one, 0.01)).unwrap(), [(11, 1.0)]);
}

#[test]
fn what_is_dead_is_in_no_list() {
    let large = vec![vec![7, 8, 9, 10]; 3000];
    let small = (0..200).map(|n| vec![7, 8, 9, 11 + n % 2]);
    let documents: Vec<_> = large.into_iter().chain(small).collect();
    let dead: Vec<_> = documents.iter().map(|document| document[3] == 12).collect();
    let domains: Vec<_> = documents.iter().map(|document| u8::from(document[3] > 10)).collect();
    let folder = tempfile::tempdir().unwrap();
    let paths = write(folder.path(), &documents, 20, (1, 1 << 20));
    let open = || Datastore::open(&paths, Load::Ram).unwrap();
    let tombstones = folder.path().join("tombstones");
    write_tombstones(&Arc::new(open()), &dead, &tombstones, &Progress::default()).unwrap();
    let mut store = open();
    store.add_tombstones(0, &tombstones, &Progress::default()).unwrap();
    set(&mut store, &documents, &domains);
    store.read_domains(&Progress::default()).unwrap();
    let (mut weights, mut found, mut samples) = ([1.0; DOMAINS], Vec::new(), Vec::new());
    weights[0] = 0.01;
    store.successors_by_domain(9, &weights, &mut found);
    assert_eq!(found, [(11, 1.0)]);
    store.matches_by_domain(&[9], 1, 64, &weights, &mut samples);
    let texts = follow(&store, samples.iter().map(|sample| sample.position), 4);
    assert!(!texts.is_empty() && texts.iter().all(|text| text[0] < 12));
}

#[test]
fn small_files_are_domains_and_so_are_those_of_a_union() {
    let store = open(&[vec![1; 100], vec![1, 3]], 5, (2, 1 << 20));
    let one = open(&[vec![1, 4]], 5, (1, 1 << 20));
    let union = Datastore::union([&store, &one]).unwrap();
    assert_eq!([store.domains(), one.domains(), union.domains()], [2, 1, 3]);
    let mut found = Vec::new();
    union.matches_by_domain(&[3], 1, 64, &[1.0; DOMAINS], &mut found);
    union.matches_by_domain(&[4], 1, 64, &[1.0; DOMAINS], &mut found);
    assert_eq!(found.iter().map(|found| found.domain).collect::<Vec<_>>(), [1, 2]);
    // files of like sizes are none
    assert_eq!(open(&[vec![1; 9], vec![2; 9]], 5, (2, 1 << 20)).domains(), 1);
}

#[test]
fn domains_are_those_of_all_documents() {
    let mut store = open(&[vec![1; 40], vec![1, 3]], 5, (1, 1 << 20));
    let run = |documents, tokens, domain| DomainRun { documents, tokens, domain };
    let refused = [
        vec![],
        vec![vec![run(2, 42, 0)], vec![]],
        vec![vec![run(1, 40, 0)]],
        vec![vec![run(2, 41, 0)]],
        vec![vec![run(u64::MAX, 42, 0), run(3, 0, 1)]],
        vec![vec![run(1, 40, 0), run(1, 2, DOMAINS as u8)]],
    ];
    for domains in refused {
        assert!(matches!(store.set_domains(&domains), Err(Error::InvalidArgument(_))), "{domains:?}");
        assert_eq!(store.domains(), 1);
    }
    // counts of documents that are not those of the text are no harm
    for runs in [
        vec![run(0, 40, 0), run(2, 2, 3)],
        vec![run(2, 0, 15), run(0, 42, 0)],
        vec![run(1, 40, 0), run(1, 2, 15)],
    ] {
        store.set_domains(&[runs]).unwrap();
        store.read_domains(&Progress::default()).unwrap();
        let mut found = Vec::new();
        store.matches_by_domain(&[1], 1, 64, &[1.0; DOMAINS], &mut found);
        assert!(!found.is_empty());
    }
    assert_eq!(store.domains(), 2);
}
