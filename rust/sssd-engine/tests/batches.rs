//! Batches against single calls, whatever the threads and whoever fails.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sssd_core::{Corpus, DraftTree, Limits, Match, Token};
use sssd_engine::{
    Allocation, Engine, Layout, Options, PassCosts, Plan, Request, RequestError, Sizing, Step,
};

const END: Token = 9;

fn options(threads: usize) -> Options {
    Options { end_tokens: vec![END], threads, ..Options::default() }
}

fn engine(threads: usize) -> Engine {
    Engine::new(options(threads)).unwrap()
}

fn engine_with(store: bool, threads: usize) -> Engine {
    let store: Option<Arc<dyn Corpus>> = if store { Some(Arc::new(Plenty)) } else { None };
    Engine::new(Options { store, ..options(threads) }).unwrap()
}

/// A corpus in which much follows everything, with few samples and long lists: some siblings are not worth a node, and
/// their sum is above 1 now and then.
struct Plenty;

impl Corpus for Plenty {
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
        let last = context.last().map_or(0, |&token| u64::from(token));
        let length = (last as usize % 3 + 1).min(context.len()).min(max_length) as u32;
        let samples = (last as usize + 1).min(max_samples) as u64;
        out.extend((0..samples).map(|n| Match {
            position: last * 5 + n * n,
            length,
            weight: 1.5,
            domain: 0,
        }));
    }

    fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        out.iter_mut().zip(position..).for_each(|(token, at)| *token = (at * at / 3 % 9) as Token);
        out.len()
    }

    fn successors(&self, token: Token, out: &mut Vec<(Token, f32)>) {
        let shares = [0.4, 0.2, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01];
        out.extend((0..9).zip(shares).map(|(n, share)| ((token * 2 + n) % 9, share)));
        out.extend((9..32).map(|n| (token + 10 * n, 0.003)));
    }
}

fn begin(engine: &Engine, prompt: &[Token]) -> Arc<Request> {
    engine.begin("", prompt, &[], None, &|| false).unwrap()
}

fn limits(max_nodes: usize) -> Limits {
    Limits { max_nodes, max_depth: 6, ..Limits::DEFAULT }
}

/// What one step is asked.
struct Ask<'a> {
    requests: &'a [Arc<Request>],
    tokens: &'a [Vec<Token>],
    plans: Vec<Plan>,
    total: Option<usize>,
    sizing: Option<Sizing>,
}

fn run(engine: &Engine, ask: &Ask) -> (Vec<DraftTree>, Vec<(usize, RequestError)>) {
    let step: Arc<Step> = engine.idle_step();
    let mut work = step.lock();
    (work.extend, work.draft) = (true, true);
    work.requests.extend(ask.requests.iter().cloned());
    work.offsets.push(0);
    for tokens in ask.tokens {
        work.tokens.extend(tokens);
        let end = work.tokens.len();
        work.offsets.push(end);
    }
    work.plans.extend(&ask.plans);
    work.total_nodes = ask.total;
    work.sizing.clone_from(&ask.sizing);
    drop(work);
    engine.run(&step);
    let work = step.lock();
    let mut trees = Vec::new();
    work.trees(|_, tree| trees.push(tree.clone()));
    let failures = work.failures().map(|failure| (failure.index, failure.error)).collect();
    drop(work);
    engine.put_back(step);
    (trees, failures)
}

/// What an engine has counted: nodes drafted and accepted, as metrics and as statistics have it. Ends its requests.
fn counted(engine: &Engine, requests: &[Arc<Request>]) -> [(u64, u64); 2] {
    requests.iter().for_each(|request| request.close());
    let stats = engine.namespace("").unwrap().stats();
    let sum = |each: fn(&sssd_core::SourceStats) -> u64| stats.sources.iter().map(each).sum();
    let metrics = engine.metrics();
    [
        (metrics.nodes.read().1, metrics.accepted.read().1),
        (sum(|source| source.drafted), sum(|source| source.accepted)),
    ]
}

fn weights(requests: &[Arc<Request>]) -> Vec<Vec<u8>> {
    requests
        .iter()
        .map(|request| request.with(|sequence| sequence.model().unwrap().to_bytes().unwrap()).unwrap())
        .collect()
}

/// The sizes that trees get from a heap of their nodes.
fn shares(trees: &[DraftTree], plans: &[Plan], total: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> =
        trees.iter().zip(plans).map(|(tree, plan)| plan.min_nodes.min(tree.len())).collect();
    while sizes.iter().sum::<usize>() < total {
        let next = (0..trees.len()).filter(|&i| sizes[i] < trees[i].len());
        let prob = |&i: &usize| trees[i].probs[sizes[i]];
        // the first of equals
        let Some(best) = next.rev().max_by(|a, b| prob(a).total_cmp(&prob(b))) else { break };
        sizes[best] += 1;
    }
    sizes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_batch_is_what_single_calls_are(
        threads in 1usize..4,
        store: bool,
        prompts in prop::collection::vec(prop::collection::vec(0u32..9, 1..120), 1..24),
        outputs in prop::collection::vec(prop::collection::vec(prop::collection::vec(0u32..9, 0..6), 24), 1..6),
        budget in 0usize..24,
        chain: bool,
    ) {
        let limits = |nodes| Limits { chain, ..limits(nodes) };
        let (together, alone) = (engine_with(store, threads), engine_with(store, 1));
        let requests: Vec<_> = prompts.iter().map(|prompt| begin(&together, prompt)).collect();
        let twins: Vec<_> = prompts.iter().map(|prompt| begin(&alone, prompt)).collect();
        for tokens in &outputs {
            let plans = vec![Plan { min_nodes: 0, limits: limits(budget) }; requests.len()];
            let ask = Ask { requests: &requests, tokens: &tokens[..requests.len()], plans, total: None, sizing: None };
            let (trees, failures) = run(&together, &ask);
            prop_assert!(failures.is_empty());
            for ((twin, tokens), tree) in twins.iter().zip(tokens).zip(&trees) {
                alone.extend(twin, tokens, None, &|| false).unwrap();
                prop_assert_eq!(&alone.draft(twin, limits(budget), None).unwrap(), tree);
            }
        }
        prop_assert_eq!(weights(&requests), weights(&twins));
    }

    #[test]
    fn a_shared_budget_goes_to_the_most_probable_nodes(
        threads in 1usize..3,
        store: bool,
        prompts in prop::collection::vec(prop::collection::vec(0u32..9, 1..120), 1..16),
        outputs in prop::collection::vec(prop::collection::vec(prop::collection::vec(0u32..9, 0..6), 16), 1..5),
        bounds in prop::collection::vec((0usize..4, 0usize..40), 16),
        total in 64usize..200,
    ) {
        let (together, alone) = (engine_with(store, threads), engine_with(store, 1));
        let requests: Vec<_> = prompts.iter().map(|prompt| begin(&together, prompt)).collect();
        let twins: Vec<_> = prompts.iter().map(|prompt| begin(&alone, prompt)).collect();
        let plans: Vec<_> = bounds[..requests.len()]
            .iter()
            .map(|&(min_nodes, max_nodes)| Plan { min_nodes, limits: limits(max_nodes) })
            .collect();
        for tokens in &outputs {
            let tokens = &tokens[..requests.len()];
            let ask = Ask { requests: &requests, tokens, plans: plans.clone(), total: Some(total), sizing: None };
            let (trees, failures) = run(&together, &ask);
            prop_assert!(failures.is_empty());
            let mut whole = Vec::new();
            for ((twin, tokens), plan) in twins.iter().zip(tokens).zip(&plans) {
                alone.extend(twin, tokens, None, &|| false).unwrap();
                whole.push(alone.draft(twin, plan.limits, None).unwrap());
            }
            let sizes = shares(&whole, &plans, total);
            prop_assert!(trees.iter().map(DraftTree::len).sum::<usize>() <= total);
            for (at, tree) in trees.iter().enumerate() {
                prop_assert_eq!(tree.len(), sizes[at]);
                // and what is learned is what is learned from a draft of that size
                if sizes[at] < whole[at].len() {
                    whole[at] = alone.draft(&twins[at], limits(sizes[at]), None).unwrap();
                }
                prop_assert_eq!(tree, &whole[at]);
            }
        }
        prop_assert_eq!(weights(&requests), weights(&twins));
    }

    /// Trees that are sized by what passes cost are those of so many nodes, teach what those teach, and count as
    /// those; and a single call is a batch of one.
    #[test]
    fn trees_are_as_large_as_pays(
        threads in 1usize..3,
        store: bool,
        padded: bool,
        prompts in prop::collection::vec(prop::collection::vec(0u32..9, 1..120), 1..6),
        outputs in prop::collection::vec(prop::collection::vec(prop::collection::vec(0u32..9, 0..6), 6), 1..5),
        min_nodes in 0usize..3,
        max_nodes in 0usize..40,
        per_node in prop::sample::select(vec![0.0, 0.05, 0.2, 0.6, 3.0]),
        chain: bool,
    ) {
        let limits = |nodes| Limits { chain, ..limits(nodes) };
        let layout = if padded { Layout::Padded } else { Layout::Packed };
        let costs = PassCosts::new((0..60).collect(), (0..60).map(|n| 1.0 + per_node * f64::from(n)).collect(), layout);
        let count = prompts.len();
        let sizing = Sizing::Costs(Arc::new(costs.unwrap()), Some(1.0));
        let (together, alone, cut) = (engine_with(store, threads), engine_with(store, 1), engine_with(store, 1));
        let [requests, twins, cuts] = [&together, &alone, &cut]
            .map(|engine| prompts.iter().map(|prompt| begin(engine, prompt)).collect::<Vec<_>>());
        let mut verified = 0;
        for tokens in &outputs {
            let tokens = &tokens[..count];
            let plans = vec![Plan { min_nodes, limits: limits(max_nodes) }; count];
            let ask = Ask { requests: &requests, tokens, plans, total: None, sizing: Some(sizing.clone()) };
            let (trees, failures) = run(&together, &ask);
            prop_assert!(failures.is_empty());
            let (mut whole, mut allocation) = (Vec::new(), Allocation::default());
            for (twin, tokens) in cuts.iter().zip(tokens) {
                cut.extend(twin, tokens, None, &|| false).unwrap();
                whole.push(cut.draft(twin, limits(max_nodes), None).unwrap());
                allocation.push(&whole[whole.len() - 1].probs);
            }
            let sizes = sizing.allocate(0.0, &mut allocation, &mut []);
            for (at, tree) in trees.iter().enumerate() {
                let size = sizes[at].max(min_nodes.min(whole[at].len()));
                prop_assert_eq!(tree, &whole[at].first(size));
                // whoever verifies less than was drafted says so
                cuts[at].with(|sequence| sequence.cut_draft(size)).unwrap();
                alone.extend(&twins[at], &tokens[at], None, &|| false).unwrap();
                let sizing = (count == 1 && min_nodes == 0).then_some(&sizing);
                let most = if size < whole[at].len() && sizing.is_none() { size } else { max_nodes };
                prop_assert_eq!(tree, &alone.draft(&twins[at], limits(most), sizing).unwrap());
                verified += tree.len() as u64;
            }
        }
        prop_assert_eq!(weights(&requests), weights(&twins));
        prop_assert_eq!(weights(&requests), weights(&cuts));
        let [metrics, stats] = counted(&together, &requests);
        prop_assert_eq!(metrics, stats);
        prop_assert!(metrics.1 <= metrics.0 && metrics.0 <= verified);
        prop_assert_eq!([counted(&alone, &twins), counted(&cut, &cuts)], [[metrics; 2]; 2]);
    }
}

/// A corpus that panics for contexts that end with 8.
struct Mine;

impl Corpus for Mine {
    fn matches(&self, context: &[Token], _: usize, _: usize, _: &mut Vec<Match>) {
        assert!(context.last() != Some(&8), "stepped on a mine");
    }

    fn continuation(&self, _: u64, _: &mut [Token]) -> usize {
        0
    }

    fn successors(&self, _: Token, _: &mut Vec<(Token, f32)>) {}
}

#[test]
fn a_panic_ends_one_request_and_no_other() {
    std::panic::set_hook(Box::new(|_| {}));
    for threads in [1, 3] {
        let engine = Engine::new(Options { store: Some(Arc::new(Mine)), ..options(threads) }).unwrap();
        let requests: Vec<_> = (0..32).map(|_| begin(&engine, &[1, 2, 3, 1, 2])).collect();
        let used = engine.memory().used;
        let mut tokens = vec![vec![3]; 32];
        tokens[5] = vec![8];
        tokens[30] = vec![8];
        let plans = vec![Plan { min_nodes: 0, limits: limits(4) }; 32];
        let ask = Ask { requests: &requests, tokens: &tokens, plans, total: None, sizing: None };
        let (trees, failures) = run(&engine, &ask);
        assert_eq!(failures.iter().map(|failure| failure.0).collect::<Vec<_>>(), [5, 30]);
        assert!(matches!(&failures[0].1, RequestError::Failed(why) if why.contains("mine")));
        assert!(trees.iter().enumerate().all(|(i, tree)| tree.is_empty() == [5, 30].contains(&i)));
        // the memory of what failed is given back, and the others go on
        assert!(engine.memory().used < used + 32 * 100_000);
        let (trees, failures) = run(&engine, &ask);
        assert_eq!(failures.len(), 2);
        assert!(!trees[0].is_empty());
        assert_eq!(engine.finish(&requests[5], &|| false), Err(failures[0].1.clone()));
        requests.iter().for_each(|request| request.close());
        assert_eq!(engine.memory().used, engine.memory().shared);
    }
}

#[test]
fn prompts_are_indexed_in_the_background() {
    let prompt: Vec<Token> = (0..200_000u64).map(|i| (i * i % 4999) as Token).collect();
    for threads in [1, 2] {
        let engine = Engine::new(Options { end_tokens: vec![], ..options(threads) }).unwrap();
        let request = engine.begin_in_background("", prompt.clone(), &[], None, &|| false).unwrap();
        if threads > 1 {
            let start = Instant::now();
            while request.with_ready(|_| ()).unwrap().is_none() && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(request.with_ready(|_| ()).unwrap().is_some());
        } else {
            assert!(engine.draft(&request, limits(8), None).unwrap().is_empty());
        }
        engine.extend(&request, &[prompt[0]], None, &|| false).unwrap();
        let twin = engine.begin("", &prompt, &[], None, &|| false).unwrap();
        engine.extend(&twin, &[prompt[0]], None, &|| false).unwrap();
        assert_eq!(engine.draft(&request, limits(64), None), engine.draft(&twin, limits(64), None));
        drop((request, twin));
        // the helper lets go of the request a moment after it is ready
        let start = Instant::now();
        while engine.memory().used > engine.memory().shared && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(engine.memory().used, engine.memory().shared);
    }
}

#[test]
fn namespaces_keep_to_themselves_and_end() {
    let options =
        Options { live_bytes: 1 << 20, namespace_ttl: Some(Duration::from_millis(200)), ..options(1) };
    let engine = Engine::new(options).unwrap();
    let begin =
        |namespace: &str, prompt: &[Token]| engine.begin(namespace, prompt, &[], None, &|| false).unwrap();
    engine.finish(&begin("a", &[1, 2, 3, 4, 5]), &|| false).unwrap();
    let drafted =
        |namespace: &str| engine.draft(&begin(namespace, &[1, 2, 3]), limits(8), None).unwrap().len();
    assert!(drafted("a") > 0);
    assert_eq!((drafted("b"), drafted("")), (0, 0));
    let running = begin("a", &[1]);
    std::thread::sleep(Duration::from_millis(400));
    let names = || engine.namespaces().into_iter().map(|info| info.name).collect::<Vec<_>>();
    assert_eq!(names(), ["", "a"], "b had no request for its time to live");
    drop(running);
    assert!(engine.remove_namespace("a") && !engine.remove_namespace("a"));
    assert_eq!(drafted("a"), 0, "what was learned is gone");
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(names(), [""]);
    assert_eq!(engine.memory().used, engine.memory().shared);
}

/// Helpers that come late, after the step that called them, find a step of another size in the same buffers.
#[test]
fn late_helpers_do_nothing_twice() {
    let engine = engine(4);
    std::thread::scope(|scope| {
        for callers in 0..3 {
            let engine = &engine;
            scope.spawn(move || {
                let requests: Vec<_> = (0..24).map(|_| begin(engine, &[1, 2, 3])).collect();
                let mut lengths = [3; 24];
                for round in 0..3000 {
                    let count = 8 + (round * 7 + callers) % 17;
                    let plans = vec![Plan { min_nodes: 0, limits: limits(2) }; count];
                    let tokens = vec![vec![round as Token % 9]; count];
                    let total = (round % 2 == 0).then_some(20);
                    let ask =
                        Ask { requests: &requests[..count], tokens: &tokens, plans, total, sizing: None };
                    assert!(run(engine, &ask).1.is_empty());
                    lengths[..count].iter_mut().for_each(|length| *length += 1);
                    let held =
                        requests.iter().map(|request| request.with(|sequence| sequence.tokens().len()));
                    assert!(held.map(Result::unwrap).eq(lengths), "round {round}");
                }
            });
        }
    });
}
