//! The whole engine under shuttle: random interleavings of its threads, which find what deadlocks, is lost or is done
//! twice. Memory orders are no matter here (`tests/loom.rs` has those): every access is sequentially consistent.
#![cfg(model)]
#![allow(dead_code, clippy::unwrap_used)]

#[path = "../src/batch.rs"]
mod batch;
#[path = "../src/engine.rs"]
mod engine;
#[path = "../src/gate.rs"]
mod gate;
#[path = "../src/metrics.rs"]
mod metrics;
#[path = "../src/request.rs"]
mod request;
#[path = "../src/share.rs"]
mod share;
#[path = "../src/sizing/mod.rs"]
mod sizing;
#[path = "../src/state.rs"]
mod state;
#[path = "../src/thread_pool.rs"]
mod thread_pool;

mod sync {
    pub use shuttle::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockWriteGuard, atomic, mpsc};
    pub use std::sync::PoisonError;

    pub mod thread {
        pub use shuttle::thread::*;

        pub fn sleep(_: std::time::Duration) {
            yield_now();
        }
    }
}

use batch::Plan;
use engine::{Engine, Options};
use request::{Request, RequestError};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::thread;
use sssd_core::{DraftTree, Limits, Token};
use sync::Arc;

const LIMITS: Limits = Limits { max_nodes: 6, max_depth: 6, ..Limits::DEFAULT };

/// The gate is one for all tests.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Runs a model many times: `SSSD_MODEL_RUNS` as many as the quick test does.
fn check(runs: usize, model: impl Fn() + Clone + Send + Sync + 'static) {
    let _one = ONE_AT_A_TIME.lock().unwrap();
    let factor = std::env::var("SSSD_MODEL_RUNS").map_or(1, |factor| factor.parse().unwrap());
    let runs = runs * factor;
    let schedulers: [Box<dyn Scheduler + Send>; 2] =
        [Box::new(RandomScheduler::new(runs)), Box::new(PctScheduler::new(3, runs))];
    for scheduler in schedulers {
        let mut config = shuttle::Config::new();
        config.stack_size = 1 << 18;
        shuttle::Runner::new(scheduler, config).run(model.clone());
    }
}

fn engine(threads: usize) -> Engine {
    Engine::new(Options { threads, ..Options::default() }).unwrap()
}

/// Requests of which every other one has nothing to draft from, so that the rest get more of a shared budget.
fn begin(engine: &Engine, firsts: std::ops::Range<Token>) -> Vec<Arc<Request>> {
    let begin = |first: Token| {
        let prompt = if first.is_multiple_of(2) { &[1, 2, first, 3, 1, 2, first, 3][..] } else { &[first] };
        engine.begin("", prompt, &[], None, &|| false).unwrap()
    };
    firsts.map(begin).collect()
}

/// One step in which each request gets its own token.
fn step(
    engine: &Engine,
    requests: &[Arc<Request>],
    total: Option<usize>,
) -> (Vec<DraftTree>, Vec<RequestError>) {
    let step = engine.idle_step();
    let mut work = step.lock();
    (work.extend, work.draft, work.total_nodes) = (true, true, total);
    work.requests.extend(requests.iter().cloned());
    work.tokens.resize(requests.len(), 1);
    work.offsets.extend(0..=requests.len());
    work.plans.resize(requests.len(), Plan { min_nodes: 0, limits: LIMITS });
    drop(work);
    engine.run(&step);
    let work = step.lock();
    let mut trees = Vec::new();
    work.trees(|_, tree| trees.push(tree.clone()));
    let failures = work.failures().map(|failure| failure.error).collect();
    drop(work);
    engine.put_back(step);
    (trees, failures)
}

#[test]
fn steps_of_two_callers_are_what_they_are_alone() {
    check(600, || {
        let engine = Arc::new(engine(3));
        let callers: Vec<_> = [None, Some(12)]
            .into_iter()
            .map(|total| {
                let engine = Arc::clone(&engine);
                let alone = self::engine(1);
                let expected = step(&alone, &begin(&alone, 10..22), total).0;
                assert!(expected.iter().any(|tree| tree.len() > 1));
                thread::spawn(move || {
                    let _pass = gate::enter();
                    let requests = begin(&engine, 10..22);
                    assert_eq!(step(&engine, &requests, total), (expected, vec![]));
                    // fewer than wake a helper: one that is late may still come
                    assert_eq!(step(&engine, &requests[..3], None).1, []);
                })
            })
            .collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
    });
}

#[test]
fn requests_may_be_closed_and_indexed_while_a_step_runs() {
    check(600, || {
        let engine = Arc::new(engine(2));
        let mut requests = begin(&engine, 10..18);
        let prompt = vec![50, 1, 2, 50, 1];
        requests.push(engine.begin_in_background("", prompt, &[], None, &|| false).unwrap());
        let closing = Arc::clone(&requests[3]);
        let other = thread::spawn(move || closing.close());
        let (trees, failures) = step(&engine, &requests, None);
        assert!(failures.iter().all(|failure| *failure == RequestError::Closed) && failures.len() <= 1);
        assert!(!trees[8].is_empty());
        other.join().unwrap();
        assert!(requests[3].closed());
        requests.iter().for_each(|request| request.close());
        drop(requests);
        let shared = engine.memory().shared;
        while engine.memory().used > shared {
            // a helper lets go of the prompt that it indexed
            thread::yield_now();
        }
    });
}

#[test]
fn batches_that_look_at_several_requests_may_overlap() {
    check(600, || {
        let engine = Arc::new(engine(1));
        let requests = begin(&engine, 10..18);
        let callers: Vec<_> = [requests.clone(), requests.iter().rev().cloned().collect()]
            .into_iter()
            .map(|order| {
                let engine = Arc::clone(&engine);
                thread::spawn(move || assert_eq!(step(&engine, &order, None).1, []))
            })
            .collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        let both =
            |request: &Arc<Request>| request.with(|sequence| sequence.tokens().ends_with(&[1, 1])).unwrap();
        assert!(requests.iter().all(both));
    });
}

#[test]
fn prompts_are_indexed_without_further_calls() {
    check(100, || {
        let engine = engine(2);
        let begin = |length| engine.begin_in_background("", vec![1; length], &[], None, &|| false).unwrap();
        let requests = [begin(9000), begin(5)];
        let ready = |request: &Arc<Request>| request.with_ready(|_| ()).unwrap().is_some();
        while !requests.iter().all(ready) {
            thread::yield_now();
        }
    });
}

#[test]
fn nobody_is_inside_while_the_gate_is_closed() {
    check(2000, || {
        let inside = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let inside = Arc::clone(&inside);
                thread::spawn(move || {
                    for _ in 0..2 {
                        let _pass = gate::enter();
                        inside.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            gate::close();
            assert_eq!(inside.load(Ordering::SeqCst), 0);
            thread::yield_now();
            assert_eq!(inside.load(Ordering::SeqCst), 0);
            gate::open();
        }
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}
