//! What the fuzz targets have in common: what every draft must be, and a serving engine put to use.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use sssd_core::{Corpus, DraftTree, Limits, MAX_TOKEN, Token, TopK};
use sssd_engine::{Engine, Options, Plan, Record, Request, StateReader, Step};
use sssd_store::Datastore;
use xxhash_rust::xxh3::xxh3_64;

/// Memory of every engine that is fuzzed: bytes from outside must not make it use more.
pub const MAX_BYTES: usize = 16 << 20;

/// Nobody interrupts.
pub const GO_ON: fn() -> bool = || false;

/// Panics unless the tree is a draft as `docs/guarantees.md` (P2) promises it.
pub fn check_tree(engine: &Engine, tree: &DraftTree, limits: Limits) {
    let vocab = engine.options().vocab_size.unwrap_or(MAX_TOKEN + 1);
    let ends = &engine.options().end_tokens;
    let nodes = tree.len();
    assert!(nodes <= limits.max_nodes, "{nodes} nodes, {} allowed", limits.max_nodes);
    for length in [tree.parents.len(), tree.depths.len(), tree.probs.len(), tree.sources.len()] {
        assert_eq!(length, nodes, "arrays differ in length");
    }
    let mut children = vec![0.0; nodes + 1];
    for node in 0..nodes {
        let (token, parent, prob) = (tree.token_ids[node], tree.parents[node], tree.probs[node]);
        assert!(token < vocab, "token {token} of {vocab}");
        assert!(parent >= -1 && parent < node as i32, "parent {parent} of node {node}");
        assert!(prob.is_finite() && prob >= 0.0, "probability {prob}");
        let (depth, above) = match usize::try_from(parent) {
            Ok(parent) => {
                assert!(!ends.contains(&tree.token_ids[parent]), "something after an end token");
                (tree.depths[parent], tree.probs[parent])
            }
            Err(_) => (0, 1.0),
        };
        assert!(prob <= above * 1.0001, "{prob} below {above}");
        assert_eq!(tree.depths[node], depth + 1);
        assert!((depth as usize) < limits.max_depth, "node of depth {}", depth + 1);
        let sum: &mut f32 = &mut children[(parent + 1) as usize];
        *sum += prob;
        assert!(*sum <= above * 1.001 + 1e-6, "siblings of {sum} below {above}");
        for other in 0..node {
            assert!(tree.parents[other] != parent || tree.token_ids[other] != token, "siblings alike");
        }
    }
}

/// Gives back everything but what namespaces share, or panics.
pub fn check_memory(engine: &Engine) {
    let memory = engine.memory();
    assert_eq!(memory.used, memory.shared, "memory that nobody holds");
    assert!(memory.peak <= memory.limit, "{} bytes of {}", memory.peak, memory.limit);
}

/// Steps requests by one batch of as many tokens each, and returns their trees and whether each failed.
pub fn step(
    engine: &Engine,
    requests: &[Arc<Request>],
    tokens: &[Token],
    limits: Limits,
    total: Option<usize>,
) -> Vec<(DraftTree, bool)> {
    let step: Arc<Step> = engine.idle_step();
    let mut work = step.lock();
    (work.extend, work.draft, work.total_nodes) = (true, true, total);
    work.requests.extend(requests.iter().cloned());
    work.offsets.extend((0..=requests.len()).map(|index| index * tokens.len()));
    requests.iter().for_each(|_| work.tokens.extend(tokens));
    work.plans.extend(requests.iter().map(|_| Plan { min_nodes: 0, limits }));
    drop(work);
    engine.run(&step);
    let work = step.lock();
    let mut trees = Vec::new();
    work.trees(|_, tree| trees.push((tree.clone(), false)));
    work.failures().for_each(|failure| trees[failure.index].1 = true);
    drop(work);
    engine.put_back(step);
    trees
}

/// Begins, drafts, learns and finishes in a namespace, and checks what is drafted.
pub fn use_namespace(engine: &Engine, name: &str, prompt: &[Token]) {
    let limits = Limits { max_nodes: 64, max_depth: 12, min_prob: 0.0, chain: false };
    let Ok(request) = engine.begin(name, prompt, &[], None, &GO_ON) else { return };
    for round in 0..3 {
        let Ok(tree) = engine.draft(&request, limits, None) else { break };
        check_tree(engine, &tree, limits);
        let came: Vec<Token> = tree.token_ids.first().copied().into_iter().chain([prompt[round]]).collect();
        let ids: Vec<Token> = came.iter().flat_map(|&token| [token, prompt[0]]).collect();
        let probs = vec![0.4; ids.len()];
        if engine.extend(&request, &came, Some(TopK { k: 2, ids: &ids, probs: &probs }), &GO_ON).is_err() {
            break;
        }
    }
    let checked = request.with(|sequence| sequence.check());
    assert!(!matches!(checked, Ok(Err(_))), "{checked:?}");
    let _ = engine.finish(&request, &GO_ON);
}

/// What an engine has learned, as its saved file says it; the order of the table's entries does not matter.
pub fn learned(engine: &Engine, folder: &Path) -> Vec<String> {
    engine.save(folder, &GO_ON).unwrap();
    let mut reader = StateReader::open(folder, &GO_ON).unwrap();
    let mut records = vec![format!("{:?}", reader.identity())];
    let mut name = String::new();
    while let Some(record) = reader.next_record().unwrap() {
        records.push(match record {
            Record::Namespace { name: held, weights, .. } => {
                name = held;
                format!("{name:?} {:x}", xxh3_64(&weights))
            }
            record => format!("{name:?} {record:?}"),
        });
    }
    records.sort();
    records
}

/// Asks everything that a store answers; what it says must be of its vocabulary.
fn ask_store(store: &Datastore) {
    let vocab = store.vocab_size();
    let (mut matches, mut successors, mut window) = (Vec::new(), Vec::new(), [0; 40]);
    for context in [[0, 1, 3, 8, 0, 1], [8, 7, 6, 5, 4, 3], [99, 98, 50, 20, 9, 8]] {
        matches.clear();
        store.matches(&context, 6, 16, &mut matches);
        for found in &matches {
            assert!(found.weight >= 1.0 && (1..=6).contains(&found.length));
            let length = store.continuation(found.position, &mut window);
            assert!(window[..length].iter().all(|&token| token < vocab), "{window:?}");
        }
        for token in context {
            successors.clear();
            store.successors(token, &mut successors);
            assert!(successors.len() <= 32 && successors.iter().all(|&(token, _)| token < vocab));
            assert!(successors.iter().all(|&(_, share)| (0.0..=1.0).contains(&share)));
        }
    }
    for position in [0, 1, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        store.continuation(position, &mut window);
    }
    let _ = (store.count(&[1, 3]), store.occurrences(&[8], 100), store.verify());
}

/// Asks a store, and drafts from it.
pub fn use_store(store: Datastore) {
    ask_store(&store);
    let vocab = store.vocab_size();
    let options = Options {
        vocab_size: Some(vocab),
        store: Some(Arc::new(store)),
        max_bytes: MAX_BYTES,
        ..Options::default()
    };
    let engine = Engine::new(options).unwrap();
    use_namespace(&engine, "", &[0, 1, 3, 8, 0, 1, 3].map(|token| token % vocab));
    check_memory(&engine);
}
