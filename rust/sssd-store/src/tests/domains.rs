//! Samples by domain against a brute-force search of the documents.

use proptest::prelude::*;
use sssd_core::{Corpus, DOMAINS, Match, Token};

use super::oracle::{continuations, corpus, follow, layout, open};
use crate::{Datastore, DomainRun, Error};

/// Says which domain each document is of.
fn set(store: &mut Datastore, documents: &[Vec<Token>], domains: &[u8]) {
    let mut runs = documents
        .iter()
        .zip(domains)
        .map(|(document, &domain)| DomainRun { documents: 1, tokens: document.len() as u64, domain });
    let files: Vec<_> = store.files().map(|file| file.documents as usize).collect();
    let files: Vec<_> = files.into_iter().map(|count| runs.by_ref().take(count).collect()).collect();
    store.set_domains(&files).unwrap();
}

/// The samples that a domain with `seen` occurrences gets.
fn wanted(seen: usize, weight: f32, total: f32, limit: usize) -> usize {
    let by_weight = seen as f32 * weight * (limit as f32 / total).min(1.0);
    seen.min(by_weight.max(8.0 * weight).ceil() as usize)
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
            prop_assert!((counted - held.len() as f32 * weight).abs() < 1e-3 * (1.0 + counted));
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
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn each_domain_is_sampled_by_itself(
        (vocab, documents) in corpus(),
        domains in prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(2), Just(15)], 30),
        layout in layout(),
        end in any::<prop::sample::Index>(),
        limits in (1usize..10, 1usize..20),
        powers in prop::collection::vec(0i32..8, DOMAINS),
    ) {
        let stream: Vec<Token> = documents.concat();
        // more occurrences than are looked at are known by a part of them
        prop_assume!(!stream.is_empty() && stream.len() <= 512);
        let mut store = open(&documents, vocab, layout);
        set(&mut store, &documents, &domains);
        let weights = std::array::from_fn(|domain| 0.5f32.powi(powers[domain]));
        let context = &stream[..=end.index(stream.len())];
        let domains = &domains[..documents.len()];
        if store.domains() > 1 {
            check(&store, (&documents, domains), context, limits, &weights)?;
        }
    }
}

/// 3,000 documents of domain 0, and 30 of domain 1 among them, of the same tokens.
fn drowned() -> Datastore {
    let domain = |n: u32| u8::from(n % 101 == 100);
    let documents: Vec<Vec<Token>> = (0..3030).map(|n| vec![7, 8, 9, 10 + u32::from(domain(n))]).collect();
    let domains: Vec<_> = (0..3030).map(domain).collect();
    let mut store = open(&documents, 20, (1, 1 << 20));
    set(&mut store, &documents, &domains);
    store
}

#[test]
fn what_there_is_too_much_of_to_look_at_is_known_by_a_part() {
    let store = drowned();
    let mut found = Vec::new();
    for small in [1.0, 0.01] {
        let mut weights = [1.0; DOMAINS];
        weights[0] = small;
        found.clear();
        store.matches_by_domain(&[7, 8, 9], 3, 64, &weights, &mut found);
        let own: Vec<_> = found.iter().filter(|found| found.domain == 1).collect();
        assert!(own.len() >= 4, "{}", own.len());
        let counted = |domain: u8| {
            let own = found.iter().filter(|found| found.domain == domain && found.length == 3);
            own.map(|found| found.weight).sum::<f32>()
        };
        assert!((counted(0) / small / 3000.0 - 1.0).abs() < 0.02 && (15.0..60.0).contains(&counted(1)));
    }
}

#[test]
fn files_are_domains_and_so_are_those_of_a_union() {
    let documents = [vec![1, 2], vec![1, 3]];
    let store = open(&documents, 5, (2, 1 << 20));
    let one = open(&documents, 5, (1, 1 << 20));
    let union = Datastore::union([&store, &one]).unwrap();
    assert_eq!([store.domains(), one.domains(), union.domains()], [2, 1, 3]);
    let mut found = Vec::new();
    union.matches_by_domain(&[1], 1, 64, &[1.0; DOMAINS], &mut found);
    let mut held: Vec<_> = found.iter().map(|found| found.domain).collect();
    held.sort_unstable();
    assert_eq!(held, [0, 1, 2, 2]);
}

#[test]
fn domains_are_those_of_all_documents() {
    let mut store = open(&[vec![1, 2], vec![1, 3]], 5, (1, 1 << 20));
    let run = |documents, tokens, domain| DomainRun { documents, tokens, domain };
    let refused = [
        vec![],
        vec![vec![run(2, 4, 0)], vec![]],
        vec![vec![run(1, 2, 0)]],
        vec![vec![run(2, 3, 0)]],
        vec![vec![run(u64::MAX, 4, 0), run(3, 0, 1)]],
        vec![vec![run(1, 2, 0), run(1, 2, DOMAINS as u8)]],
    ];
    for domains in refused {
        assert!(matches!(store.set_domains(&domains), Err(Error::InvalidArgument(_))), "{domains:?}");
        assert_eq!(store.domains(), 1);
    }
    store.set_domains(&[vec![run(1, 2, 0), run(1, 2, 15)]]).unwrap();
    assert_eq!(store.domains(), DOMAINS);
}
