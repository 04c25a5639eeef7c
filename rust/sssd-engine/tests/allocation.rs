//! A step allocates nothing once its buffers have grown.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sssd_core::{Limits, Token};
use sssd_engine::{
    CostCurve, DraftCost, Engine, Layout as Pass, Options, PassCosts, Plan, RuleOptions, Sizing, SizingRule,
    StepTimes,
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[allow(clippy::unwrap_used)]
/// A rule that has seen what steps without drafts take.
fn rule() -> SizingRule {
    let axes = [vec![1.0, 16.0], vec![1.0, 512.0], vec![0.0]];
    let draft = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };
    let curve = CostCurve::new(axes, vec![1.0, 1.1, 1.0, 1.1], Pass::Packed, Vec::new(), draft).unwrap();
    let rule = SizingRule::new(Arc::new(curve), None, RuleOptions::default());
    let plain = StepTimes {
        batch: 16,
        size: 0,
        context: 0.0,
        seconds: Some(1.0),
        prefill_tokens: 0,
        tokens: 16.0,
        draft_seconds: 0.0,
    };
    (0..2).for_each(|_| rule.observe(&plain));
    assert!(rule.begin_step().is_some());
    rule
}

#[test]
fn steps_allocate_nothing_after_a_while() {
    let sizing = |pass| {
        let seconds = (0..260).map(|size| 1.0 + 0.001 * f64::from(size)).collect();
        let costs = PassCosts::new((0..260).collect(), seconds, pass).unwrap();
        Sizing::Costs(Arc::new(costs), Some(100.0))
    };
    let plain = [(1, None, None), (2, None, None), (2, Some(160), None)];
    let sized = [(1, Pass::Padded), (1, Pass::Packed), (2, Pass::Packed)];
    let sized = sized.map(|(threads, pass)| (threads, None, Some(sizing(pass))));
    let ruled = (2, None, Some(Sizing::Rule(Arc::new(rule()))));
    let steps: Vec<_> = plain.into_iter().chain(sized).chain([ruled]).collect();
    for ((threads, total, sizing), chain) in steps.iter().flat_map(|step| [(step, false), (step, true)]) {
        let (threads, total) = (*threads, *total);
        let engine = Engine::new(Options { threads, ..Options::default() }).unwrap();
        let prompt: Vec<Token> = (0..1000).map(|i| i % 40).collect();
        let requests: Vec<_> =
            (0..16).map(|_| engine.begin("", &prompt, &[], None, &|| false).unwrap()).collect();
        let step = |extend: bool| {
            let step = engine.idle_step();
            let mut work = step.lock();
            (work.extend, work.draft, work.total_nodes) = (extend, true, total);
            work.sizing.clone_from(sizing);
            work.requests.extend(requests.iter().map(Arc::clone));
            work.offsets.extend(0..=requests.len());
            work.tokens.extend(requests.iter().map(|_| 7));
            let limits = Limits { max_nodes: 16, max_depth: 8, min_prob: 0.0, chain, ..Limits::DEFAULT };
            work.plans.extend(requests.iter().map(|_| Plan { min_nodes: 1, limits }));
            drop(work);
            engine.run(&step);
            engine.put_back(step);
        };
        // a request's own memory grows with its tokens, by and by; what it drafts with and the step do not
        (0..50).for_each(|_| step(true));
        (0..50).for_each(|_| step(false));
        // a helper that comes in for the first time gets memory to draft with
        let quiet = (0..5 * threads).any(|_| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            (0..100).for_each(|_| step(false));
            ALLOCATIONS.load(Ordering::Relaxed) == before
        });
        assert!(quiet, "{threads} threads, {total:?} nodes, {}", sizing.is_some());
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        (0..100).for_each(|_| step(true));
        let grown = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert!(grown <= 16 * 3, "{grown} allocations for 100 tokens of 16 requests");
    }
}
