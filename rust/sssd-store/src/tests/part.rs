//! Stores of which only part is in memory: what is there is used, and nothing else is read.

use proptest::prelude::*;
use sssd_core::{Corpus, Match, Token};

use super::build;
use crate::format::PAGE;
use crate::{BuildOptions, Datastore};

const VOCAB: u32 = 300;
/// Small ones, so that a small file has many.
const PAGE_BITS: u32 = 6;

fn file(documents: &[Vec<Token>], segment_symbols: u64) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    build(&path, BuildOptions::new(VOCAB), Some(segment_symbols), documents);
    std::fs::read(path).unwrap()
}

/// SplitMix64.
fn hash(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

type Answers = (Vec<(Match, Vec<Token>)>, Vec<(Token, f32)>);

fn ask(store: &Datastore, context: &[Token], max_samples: usize) -> Answers {
    let (mut matches, mut successors) = (Vec::new(), Vec::new());
    store.matches(context, 8, max_samples, &mut matches);
    store.successors(*context.last().unwrap(), &mut successors);
    let read = |found: Match| {
        let mut out = vec![0; 20];
        let length = store.continuation(found.position, &mut out);
        out.truncate(length);
        (found, out)
    };
    (matches.into_iter().map(read).collect(), successors)
}

fn documents() -> impl Strategy<Value = Vec<Vec<Token>>> {
    let token = prop_oneof![6 => 0u32..3, 1 => 0..VOCAB];
    prop::collection::vec(prop::collection::vec(token, 0..300), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn only_what_is_in_memory_is_read(
        documents in documents(),
        segments in prop_oneof![Just(1u64 << 20), 400u64..2000],
        ends in prop::collection::vec(any::<prop::sample::Index>(), 12),
        percent in 0u64..=100,
        seed in any::<u64>(),
        max_samples in 1usize..40,
    ) {
        let stream = documents.concat();
        prop_assume!(!stream.is_empty());
        let whole = file(&documents, segments);
        let resident = |page: usize| hash(seed ^ page as u64) % 100 < percent;
        let mut torn = whole.clone();
        let checksums_at = u64::from_le_bytes(whole[104..112].try_into().unwrap()) as usize;
        for at in (PAGE as usize..checksums_at).filter(|at| !resident(at >> PAGE_BITS)) {
            torn[at] = hash(at as u64) as u8;
        }
        let all = Datastore::from_bytes("all", whole.clone()).unwrap();
        let part = Datastore::from_part(whole.clone(), PAGE_BITS, resident).unwrap();
        let torn = Datastore::from_part(torn, PAGE_BITS, resident).unwrap();
        let warm = Datastore::from_part(whole, PAGE_BITS, |_| true).unwrap();
        for end in ends {
            let end = end.index(stream.len());
            let context = &stream[end.saturating_sub(9)..=end];
            let (found, successors) = ask(&part, context, max_samples);
            // no page that is not in memory has any say
            prop_assert_eq!(ask(&torn, context, max_samples), (found.clone(), successors));
            // and what is found occurs
            for (found, rest) in &found {
                let query = &context[context.len() - found.length as usize..];
                let known = all.occurrences(query, usize::MAX).unwrap();
                prop_assert!(known.contains(&found.position), "{} tokens", found.length);
                prop_assert!(found.weight >= 1.0);
                let mut out = [0; 20];
                let length = all.continuation(found.position, &mut out);
                prop_assert!(out[..length].starts_with(rest));
            }
            prop_assert_eq!(ask(&warm, context, max_samples), ask(&all, context, max_samples));
        }
    }
}

#[test]
fn most_of_what_is_known_is_found_with_most_of_it_in_memory() {
    let stream: Vec<Token> = (0..60_000).map(|at| (hash(at) as u32 % 40).pow(2) % 211).collect();
    let documents: Vec<_> = stream.chunks(500).map(<[Token]>::to_vec).collect();
    let whole = file(&documents, 1 << 20);
    let field = |at: usize| u64::from_le_bytes(whole[at..at + 8].try_into().unwrap()) as usize;
    // where text and suffixes end, and begins what is read before anything else
    let preferred = field(field(120) + 64) >> PAGE_BITS;
    let resident = |page: usize| page >= preferred || hash(page as u64) % 10 < 7;
    let (all, part) = (
        Datastore::from_bytes("all", whole.clone()).unwrap(),
        Datastore::from_part(whole.clone(), PAGE_BITS, resident).unwrap(),
    );
    let count = |store: &Datastore| -> usize {
        (10..stream.len()).step_by(97).map(|end| ask(store, &stream[end - 8..end], 16).0.len()).sum()
    };
    let (all, part) = (count(&all), count(&part));
    assert!(part * 2 > all && part < all, "{part} of {all} samples with 7 tenths of the pages");
}
