//! The system refuses memory at one place after the other of a scripted life: each call ends with an error or does what
//! it is for, and what it was asked to change is changed or not.
//!
//! Refused are allocations of which a caller, a file or a text chooses the size. What is left out takes a few pages at
//! most, for which no call of the standard library can say that there are none.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sssd_core::{Limits, Token, TopK};
use sssd_engine::{Engine, Options, Plan, Request, RequestError, StateError, StateReader};

/// Smaller ones are not refused.
const LARGE: usize = (8 << 10) + 1;

/// Large allocations before one is refused; all of them once it has wrapped.
static LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);
static REFUSED: AtomicUsize = AtomicUsize::new(0);

struct Refusing;

impl Refusing {
    fn refuses(size: usize) -> bool {
        let refused = size >= LARGE
            && LEFT
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    if left == usize::MAX { None } else { Some(left.wrapping_sub(1)) }
                })
                .is_ok_and(|left| left == 0);
        REFUSED.fetch_add(usize::from(refused), Ordering::Relaxed);
        refused
    }
}

// SAFETY: what the system allocator promises, or null
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if Self::refuses(layout.size()) { null_mut() } else { unsafe { System.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if Self::refuses(layout.size()) { null_mut() } else { unsafe { System.alloc_zeroed(layout) } }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if Self::refuses(size) { null_mut() } else { unsafe { System.realloc(pointer, layout, size) } }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

fn text(count: u32) -> Vec<Token> {
    (0..count).map(|n| n.wrapping_mul(n) / 7 % 5000).collect()
}

/// Whether an error is the one to expect.
fn is_full(failure: &RequestError) -> bool {
    matches!(failure, RequestError::Memory(_))
}

fn check(request: &Request) {
    // the check takes memory itself
    let left = LEFT.swap(usize::MAX, Ordering::Relaxed);
    match request.with(|sequence| sequence.check()) {
        Ok(sound) => assert_eq!(sound, Ok(())),
        Err(failure) => assert!(is_full(&failure), "{failure}"),
    }
    LEFT.store(left, Ordering::Relaxed);
}

fn act(done: Result<(), RequestError>) {
    if let Err(failure) = done {
        assert!(is_full(&failure), "{failure}");
    }
}

fn live(folder: &std::path::Path, prompt: &[Token], ids: &[Token], probs: &[f32]) {
    let never = &|| false;
    let options = Options { live_bytes: 1 << 24, soft_bytes: 1 << 24, ..Options::default() };
    let Ok(engine) = Engine::new(options) else { return };
    let top = TopK { k: 8, ids, probs };
    let mut requests: Vec<Arc<Request>> = Vec::new();
    for namespace in ["", "a"] {
        match engine.begin(namespace, prompt, &prompt[..1000], None, never) {
            Ok(request) => requests.push(request),
            Err(failure) => assert!(is_full(&failure), "{failure}"),
        }
    }
    for request in requests.clone() {
        for _ in 0..3 {
            act(engine.draft(&request, Limits::nodes(64), None).map(drop));
            let length = request.with(|sequence| sequence.tokens().len()).unwrap_or(0);
            let done = engine.extend(&request, &prompt[..ids.len() / 8], Some(top), never);
            let more = request.with(|sequence| sequence.tokens().len()).unwrap_or(0) - length;
            assert_eq!(more, if done.is_ok() { ids.len() / 8 } else { 0 });
            act(done);
        }
        match engine.fork(&request) {
            Ok(fork) => requests.push(fork),
            Err(failure) => assert!(is_full(&failure), "{failure}"),
        }
        act(request.truncate(1000, never));
        requests.iter().for_each(|request| check(request));
    }
    let step = engine.idle_step();
    let mut work = step.lock();
    work.requests.extend(requests.iter().cloned());
    work.draft = true;
    work.plans.resize(requests.len(), Plan { min_nodes: 0, limits: Limits::nodes(32) });
    drop(work);
    engine.run(&step);
    step.lock().failures().for_each(|failure| assert!(is_full(&failure.error), "{}", failure.error));
    engine.put_back(step);
    requests.iter().for_each(|request| act(engine.finish(request, never)));
    let state = |done: Result<(), StateError>| match done {
        Ok(()) => true,
        Err(failure) => {
            assert!(matches!(failure, StateError::Memory(_)), "{failure}");
            false
        }
    };
    if state(engine.save(folder, never)) {
        match StateReader::open(folder, never) {
            Ok(mut reader) => _ = state(engine.restore(&mut reader, never)),
            Err(failure) => _ = state(Err(failure)),
        }
    }
    drop(requests);
    let memory = engine.memory();
    assert_eq!(memory.used, memory.shared);
}

#[test]
fn every_allocation_of_a_life_may_fail() {
    // made once for the process
    drop(Engine::new(Options::default()));
    let (folder, prompt) = (tempfile::tempdir().unwrap(), text(6_000));
    let (ids, probs) = (text(8 * 200), vec![0.1; 8 * 200]);
    let mut places = 0;
    loop {
        LEFT.store(places, Ordering::Relaxed);
        let before = REFUSED.load(Ordering::Relaxed);
        live(folder.path(), &prompt, &ids, &probs);
        LEFT.store(usize::MAX, Ordering::Relaxed);
        if REFUSED.load(Ordering::Relaxed) == before {
            break;
        }
        places += 1;
    }
    assert!(places > 60, "only {places} places were met");
}
