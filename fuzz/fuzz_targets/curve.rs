//! Cost curves of any numbers: refused, or a curve whose passes have finite times that do not fall, and a rule that
//! goes by it and learns from any times without coming to draft more than it may.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sssd_engine::{Allocation, CostCurve, DraftCost, Layout, RuleOptions, Sizing, SizingRule, StepTimes};

#[derive(Arbitrary, Debug)]
struct Numbers {
    /// Differences, so that most axes rise.
    axes: [Vec<u16>; 3],
    odd_axes: Option<[Vec<f64>; 3]>,
    seconds: Vec<u16>,
    odd_seconds: Option<Vec<f64>>,
    ready: Vec<u8>,
    packed: bool,
    draft: [f64; 3],
    odd_draft: bool,
    threads: u8,
    max_nodes: u16,
    steps: Vec<(u8, u16, f64, f64, u16)>,
    probs: Vec<u16>,
}

fn rising(start: f64, steps: &[u16]) -> Vec<f64> {
    let mut at = start;
    let next = steps.iter().take(12).map(|&step| {
        at += f64::from(step) + 1.0;
        at
    });
    std::iter::once(start).chain(next).collect()
}

/// A grid that rises along every axis.
fn grid(axes: &[Vec<f64>; 3], steps: &[u16]) -> Vec<f64> {
    let step = |at: usize| f64::from(steps.get(at % steps.len().max(1)).copied().unwrap_or(1)) * 1e-6;
    let sum = |from: usize, count: usize| -> f64 { (0..count).map(|at| step(from + at)).sum() };
    let mut out = Vec::new();
    for b in 0..axes[0].len() {
        for t in 0..axes[1].len() {
            out.extend((0..axes[2].len()).map(|c| 1e-4 + sum(0, b) + sum(13, t) + sum(29, c)));
        }
    }
    out
}

fn curve(numbers: &Numbers) -> Option<CostCurve> {
    let layout = if numbers.packed { Layout::Packed } else { Layout::Padded };
    let plain = [(1.0, 0), (1.0, 1), (0.0, 2)].map(|(start, axis)| rising(start, &numbers.axes[axis]));
    let axes = numbers.odd_axes.clone().unwrap_or(plain);
    let seconds = numbers.odd_seconds.clone().unwrap_or_else(|| grid(&axes, &numbers.seconds));
    let mut ready = vec![1];
    for &step in numbers.ready.iter().take(8) {
        ready.push(ready[ready.len() - 1] + usize::from(step));
    }
    if numbers.ready.is_empty() {
        ready.clear();
    }
    let [step, request, node] =
        if numbers.odd_draft { numbers.draft } else { numbers.draft.map(|time| (time.abs() % 1.0).min(0.5)) };
    let cost = DraftCost { step, request, node, threads: usize::from(numbers.threads) };
    CostCurve::new(axes, seconds, layout, ready, cost).ok()
}

fn check(curve: &CostCurve, max_nodes: usize) {
    for batch in [1, 3, 64, 1000] {
        for context in [0.0, 100.0, 1e6] {
            let costs = curve.costs(batch, context, max_nodes + 1);
            assert_eq!(costs.sizes()[0], 0);
            assert!(costs.sizes().is_sorted_by(|a, b| a < b));
            assert!(costs.seconds().iter().all(|time| time.is_finite() && *time > 0.0));
            assert!(costs.seconds().is_sorted());
            assert!(costs.plain_rate(batch).is_finite());
        }
    }
}

fuzz_target!(|numbers: Numbers| {
    let Some(curve) = curve(&numbers) else { return };
    let max_nodes = usize::from(numbers.max_nodes) % 1025;
    check(&curve, max_nodes);
    let curve = Arc::new(curve);
    let rule = Arc::new(SizingRule::new(Arc::clone(&curve), Some(max_nodes), RuleOptions::default()));
    let mut probs: Vec<f32> = numbers.probs.iter().take(64).map(|&prob| f32::from(prob) / 65536.0).collect();
    probs.sort_by(|a, b| b.total_cmp(a));
    let sizings = [Sizing::Curve(curve, max_nodes, None), Sizing::Rule(Arc::clone(&rule))];
    for &(batch, size, seconds, draft_seconds, tokens) in numbers.steps.iter().take(40) {
        let mut paces = [Some(rule.pace()), None];
        let mut limits = sssd_core::Limits { max_nodes, ..Default::default() };
        for sizing in &sizings {
            sizing.begin_step(std::iter::once((&mut limits, &mut paces[0])));
            assert!(limits.max_nodes <= max_nodes);
            let mut trees = Allocation::default();
            trees.push(&probs[..probs.len().min(limits.max_nodes)]);
            trees.push(&[]);
            let counts = sizing.allocate(f64::from(size), &mut trees, &mut paces).to_vec();
            assert!(counts[0] <= limits.max_nodes && counts[1] == 0, "{counts:?}");
        }
        let (batch, size, context) = (usize::from(batch), usize::from(size), f64::from(size));
        let tokens = f64::from(tokens);
        let (seconds, prefill_tokens) = (Some(seconds).filter(|_| size % 7 > 0), size % 5 / 4);
        rule.observe(&StepTimes { batch, size, context, seconds, prefill_tokens, tokens, draft_seconds });
        assert!(rule.speedup().is_finite() && rule.speedup() >= 0.0, "{}", rule.speedup());
        assert!((0.0..=1.0).contains(&rule.min_prob()), "{}", rule.min_prob());
    }
});
