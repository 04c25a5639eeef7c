//! Namespaces, what is saved of them, memory, counters, and prompts that are indexed in the background.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use sssd_core::{Corpus, Limits, Match, Model, Token, TopK};
use sssd_engine::{Engine, Options, Plan, Request, RequestError};

const TEXT: [Token; 9] = [11, 12, 13, 14, 15, 16, 17, 18, 19];

fn learning() -> Engine {
    Engine::new(Options { live_bytes: 1 << 16, soft_bytes: 1 << 14, ..Options::default() }).unwrap()
}

fn begin(engine: &Engine, namespace: &str, prompt: &[Token]) -> Arc<Request> {
    engine.begin(namespace, prompt, &[], None, || false).unwrap().unwrap()
}

/// Has a namespace learn from everything that there is to learn from.
fn teach(engine: &Engine, namespace: &str) {
    for prompt in [&TEXT[..], &TEXT[..3]] {
        let request = begin(engine, namespace, prompt);
        for token in [14, 15, 16, 17] {
            engine.draft(&request, Limits::nodes(8), None).unwrap();
            engine.extend(&request, &[token], Some(TopK { k: 1, ids: &[77], probs: &[0.9] })).unwrap();
        }
        engine.finish(&request).unwrap();
    }
}

fn weights(engine: &Engine, namespace: &str) -> Vec<u8> {
    engine.namespace(namespace).unwrap().model().to_bytes()
}

#[test]
fn a_namespace_begins_with_nothing_that_another_has_learned() {
    let (engine, untaught) = (learning(), Model::default().to_bytes());
    for name in ["", "a"] {
        teach(&engine, name);
        assert_ne!(weights(&engine, name), untaught);
        assert!(engine.namespace(name).unwrap().live_len().0 > 0);
    }
    for name in ["A", "a ", "ä", "a\0", "aa"] {
        let namespace = engine.namespace(name).unwrap();
        assert_eq!(namespace.model().to_bytes(), untaught, "{name:?}");
        assert_eq!((namespace.live_len(), namespace.feedback_entries().len()), ((0, 0), 0), "{name:?}");
    }
    let names: Vec<_> = engine.namespaces().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["", "A", "a", "a\0", "a ", "aa", "ä"]);
}

#[test]
fn what_was_learned_is_restored_exactly_and_takes_the_place_of_what_was_there() {
    let engine = learning();
    for name in ["", "a"] {
        teach(&engine, name);
    }
    let state = engine.state();
    for namespace in &state.namespaces {
        assert!(namespace.documents.iter().any(|document| document.1 > 0), "some text was of use");
        assert!(!namespace.feedback.is_empty());
    }
    let other = learning();
    begin(&other, "a", &[1, 2, 3, 4, 5]);
    teach(&other, "a");
    assert!(other.restore(engine.state()).unwrap());
    assert_eq!(other.state(), state);
}

#[test]
fn time_to_live_counts_from_when_a_namespace_was_last_seen_in_use() {
    let ttl = Duration::from_secs(1);
    let engine = Engine::new(Options { namespace_ttl: Some(ttl), ..Options::default() }).unwrap();
    let request = begin(&engine, "long", &TEXT);
    drop(begin(&engine, "short", &TEXT));
    sleep(ttl + ttl / 10);
    assert_eq!(engine.namespaces().len(), 2, "the default one, and the one in use");
    drop(request);
    assert!(engine.find_namespace("long").is_some());
    assert!(engine.find_namespace("short").is_none());
}

#[test]
fn time_to_live_counts_from_the_end_of_the_last_request_if_nobody_has_looked_since() {
    let ttl = Duration::from_millis(500);
    let engine = Engine::new(Options { namespace_ttl: Some(ttl), ..Options::default() }).unwrap();
    let request = begin(&engine, "long", &TEXT);
    sleep(ttl + ttl / 5);
    drop(request);
    assert!(engine.namespaces().iter().any(|info| info.name == "long"));
    sleep(ttl + ttl / 5);
    assert!(engine.find_namespace("long").is_none());
}

#[test]
fn whoever_interrupts_a_long_prompt_leaves_nothing() {
    let engine = learning();
    let mut asked = 0;
    let prompt: Vec<Token> = (0..3 << 16).collect();
    let begun = engine.begin("", &prompt, &[], None, || {
        asked += 1;
        asked == 2
    });
    assert!(begun.unwrap().is_none());
    assert_eq!(asked, 2);
    let memory = engine.memory();
    assert_eq!(memory.used, memory.shared);
}

#[test]
fn a_prompt_in_the_background_comes_piece_by_piece_and_in_order() {
    let engine = learning();
    let prompt: Vec<Token> = (0..10_000).collect();
    // no other thread is there to index it: each draft does a piece
    let request = engine.begin_in_background("", prompt.clone(), &[], None).unwrap();
    assert_eq!(engine.draft(&request, Limits::nodes(8), None).unwrap().len(), 0);
    assert_eq!([(); 3].map(|()| request.fill()), [false, true, true]);
    request.with(|sequence| assert_eq!(sequence.tokens(), prompt)).unwrap();
    let charged = engine.memory().used - engine.memory().shared;
    request.with(|sequence| assert_eq!(charged, sequence.charged_bytes())).unwrap();
}

#[test]
fn a_prompt_that_does_not_fit_ends_its_request_and_gives_everything_back() {
    let options = Options { max_bytes: 1 << 20, ..Options::default() };
    let engine = Engine::new(options).unwrap();
    let request = engine.begin_in_background("", (0..50_000).collect(), &[], None).unwrap();
    assert!(matches!(request.with(|_| ()), Err(RequestError::Memory(_))));
    assert!(request.closed());
    let memory = engine.memory();
    assert_eq!((memory.used, memory.refused), (memory.shared, 1));
}

/// Nobody may ask it for what follows 13.
struct Trap;

impl Corpus for Trap {
    fn matches(&self, context: &[Token], _: usize, _: usize, _: &mut Vec<Match>) {
        assert_ne!(context.last(), Some(&13));
    }

    fn continuation(&self, _: u64, _: &mut [Token]) -> usize {
        0
    }

    fn successors(&self, _: Token, _: &mut Vec<(Token, f32)>) {}
}

#[test]
fn what_happens_is_counted_once() {
    let engine = Engine::new(Options { store: Some(Arc::new(Trap)), ..Options::default() }).unwrap();
    let request = begin(&engine, "", &[1, 2, 1]);
    let fork = engine.fork(&request).unwrap();
    engine.extend(&request, &[2, 1, 2], None).unwrap();
    engine.finish(&request).unwrap();
    engine.finish(&request).unwrap();
    engine.extend(&fork, &[13], None).unwrap();
    assert!(matches!(engine.draft(&fork, Limits::nodes(8), None), Err(RequestError::Failed(_))));
    let counted = |counter: fn(&sssd_engine::Metrics) -> &std::sync::atomic::AtomicU64| {
        counter(engine.metrics()).load(Ordering::Relaxed)
    };
    assert_eq!(counted(|metrics| &metrics.begun), 2);
    assert_eq!(counted(|metrics| &metrics.finished), 1);
    assert_eq!(counted(|metrics| &metrics.failed), 1);
    assert_eq!(counted(|metrics| &metrics.tokens), 4);
}

#[test]
fn a_request_that_is_there_twice_is_found() {
    let engine = learning();
    let requests = [1, 2].map(|token| begin(&engine, "", &[token]));
    let step = engine.idle_step();
    let mut work = step.lock();
    work.requests.extend(requests.iter().cloned());
    assert_eq!(work.repeated(), None);
    assert_eq!(work.repeated(), None, "an earlier batch does not count");
    work.requests.push(Arc::clone(&requests[0]));
    assert_eq!(work.repeated(), Some(2));
}

#[test]
fn what_went_wrong_in_a_step_is_not_said_of_the_next() {
    let engine = learning();
    let drafted = |request: &Arc<Request>| {
        let step = engine.idle_step();
        let mut work = step.lock();
        work.draft = true;
        work.requests.push(Arc::clone(request));
        work.plans.push(Plan { min_nodes: 0, limits: Limits::nodes(8) });
        drop(work);
        engine.run(&step);
        let failures = step.lock().failures().count();
        engine.put_back(step);
        failures
    };
    let (closed, open) = (begin(&engine, "", &TEXT), begin(&engine, "", &TEXT));
    closed.close();
    assert_eq!([drafted(&closed), drafted(&open), drafted(&closed)], [1, 0, 1]);
}
