//! What a verify pass takes by batch size, width and context length.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::costs::{Layout, PassCosts};

/// More costs than this are not kept.
const MOST_KEPT: usize = 256;
/// What is shorter is no pass, and what is derived from it no number.
const LEAST_SECONDS: f64 = 1e-9;
/// No pass takes a day.
const MOST_SECONDS: f64 = 86_400.0;
/// No axis goes further.
const MOST_SIZE: f64 = (1_u64 << 40) as f64;
/// Sizes of packed passes up to here are all considered, and of larger ones so many.
const FINE_SIZES: usize = 1024;
const COARSE_SIZES: usize = 128;
/// The same for widths of padded passes.
const FINE_WIDTHS: usize = 64;
const COARSE_WIDTHS: usize = 64;

/// Seconds that drafting adds to a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DraftCost {
    /// Once per step in which anything is drafted.
    pub step: f64,
    /// Per request that is drafted for, on one thread.
    pub request: f64,
    /// Per node drafted, on one thread.
    pub node: f64,
    /// Requests drafted at a time.
    pub threads: usize,
}

/// Why numbers are no cost curve.
#[derive(Debug, Error, PartialEq)]
#[error("{0}")]
pub struct CurveError(String);

/// T(batch, width, context): a grid, monotone along every axis, linear between its points. Beyond them the last slope
/// goes on; before them the first value stands.
pub struct CostCurve {
    batches: Vec<f64>,
    tokens: Vec<f64>,
    contexts: Vec<f64>,
    /// By batch, then tokens, then context.
    seconds: Vec<f64>,
    layout: Layout,
    ready: Vec<usize>,
    draft: DraftCost,
    /// Costs that were asked for, by batch, context key and width.
    kept: Mutex<HashMap<(usize, i64, usize), Arc<PassCosts>>>,
}

impl CostCurve {
    /// `tokens` are those of each row or, where passes are packed, of the whole pass; `seconds` has one value for each
    /// batch, tokens and context, in this order. `ready` are the widths to choose from, or none where all are.
    pub fn new(
        axes: [Vec<f64>; 3],
        seconds: Vec<f64>,
        layout: Layout,
        ready: Vec<usize>,
        draft: DraftCost,
    ) -> Result<Self, CurveError> {
        let refuse = |message: &str| Err(CurveError(message.into()));
        for (name, axis, low) in
            [("batches", &axes[0], 1.0), ("tokens", &axes[1], 1.0), ("contexts", &axes[2], 0.0)]
        {
            check_axis(name, axis, low)?;
        }
        let [batches, tokens, contexts] = axes;
        if tokens[0] != 1.0 {
            return refuse("tokens must begin with 1, the step without drafts");
        }
        check_seconds(&seconds, [batches.len(), tokens.len(), contexts.len()])?;
        let rises = ready.windows(2).all(|pair| pair[0] < pair[1]);
        if !ready.is_empty() && (ready[0] != 1 || !rises) {
            return refuse("ready must be integers that rise from 1");
        }
        let times = [draft.step, draft.request, draft.node];
        if !times.iter().all(|time| (0.0..MOST_SECONDS).contains(time)) {
            return refuse("draft times must be numbers of seconds, not negative");
        }
        if !(1..=1 << 20).contains(&draft.threads) {
            return refuse("draft threads must be an integer of at least 1");
        }
        let kept = Mutex::default();
        Ok(Self { batches, tokens, contexts, seconds, layout, ready, draft, kept })
    }

    /// What drafting costs.
    pub fn draft(&self) -> &DraftCost {
        &self.draft
    }

    /// What sizes count.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The widths that are ready; none where all are.
    pub fn ready(&self) -> &[usize] {
        &self.ready
    }

    /// Seconds of a pass over `width` tokens (the mean, where rows differ) of each of `batch` requests.
    pub fn time(&self, batch: f64, width: f64, context: f64) -> f64 {
        let tokens = if self.layout == Layout::Packed { width * batch } else { width };
        let along_tokens = |b: usize, c: usize| {
            let plane = |t: usize| self.seconds[(b * self.tokens.len() + t) * self.contexts.len() + c];
            interpolate(&self.tokens, tokens, plane)
        };
        interpolate(&self.batches, batch, |b| interpolate(&self.contexts, context, |c| along_tokens(b, c)))
    }

    /// The widths to choose from, up to `max_width`: those ready, or a selection of all.
    pub fn widths(&self, max_width: usize) -> Vec<usize> {
        if !self.ready.is_empty() {
            let fit: Vec<_> = self.ready.iter().copied().take_while(|&width| width <= max_width).collect();
            return if fit.is_empty() { vec![1] } else { fit };
        }
        (1..=max_width.min(FINE_WIDTHS)).chain(beyond(FINE_WIDTHS, max_width, COARSE_WIDTHS)).collect()
    }

    /// Numbers of nodes to choose from: of each row, or of the whole pass where it is packed.
    pub fn sizes(&self, batch: usize, max_width: usize) -> Vec<usize> {
        if self.layout == Layout::Padded {
            return self.widths(max_width).into_iter().map(|width| width - 1).collect();
        }
        let most = batch.saturating_mul(max_width.saturating_sub(1)).min(1 << 40);
        (0..=most.min(FINE_SIZES)).chain(beyond(FINE_SIZES, most, COARSE_SIZES)).collect()
    }

    /// Seconds of a pass of `size` nodes.
    pub fn size_time(&self, batch: usize, size: f64, context: f64) -> f64 {
        let nodes = if self.layout == Layout::Packed { size / batch as f64 } else { size };
        self.time(batch as f64, 1.0 + nodes, context)
    }

    /// The part of the curve that one step chooses from, kept for contexts within a few percent.
    pub fn costs(&self, batch: usize, context: f64, max_width: usize) -> Arc<PassCosts> {
        let key = (batch, context_key(context), max_width);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept.get(&key) {
            return Arc::clone(known);
        }
        let sizes = self.sizes(batch, max_width);
        let context = context_of(key.1);
        let seconds = sizes.iter().map(|&size| self.size_time(batch, size as f64, context)).collect();
        let costs = Arc::new(PassCosts::trusted(sizes, rising(seconds), self.layout));
        if kept.len() >= MOST_KEPT {
            kept.clear();
        }
        kept.insert(key, Arc::clone(&costs));
        costs
    }
}

fn check_axis(name: &str, axis: &[f64], low: f64) -> Result<(), CurveError> {
    if axis.is_empty() {
        return Err(CurveError(format!("{name} must be a list of numbers")));
    }
    let within = axis.iter().all(|value| (low..MOST_SIZE).contains(value));
    if !within || axis.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(CurveError(format!("{name} must rise from at least {low}")));
    }
    Ok(())
}

fn check_seconds(seconds: &[f64], shape: [usize; 3]) -> Result<(), CurveError> {
    if Some(seconds.len()) != shape.iter().try_fold(1_usize, |product, &length| product.checked_mul(length)) {
        let held = seconds.len();
        return Err(CurveError(format!(
            "seconds must have the shape {shape:?} of the axes, got {held} numbers"
        )));
    }
    if !seconds.iter().all(|time| (LEAST_SECONDS..MOST_SECONDS).contains(time)) {
        return Err(CurveError("seconds must be at least a nanosecond and less than a day".into()));
    }
    let strides = [shape[1] * shape[2], shape[2], 1];
    for (stride, length) in strides.into_iter().zip(shape) {
        let falls =
            |index: usize| (index / stride) % length + 1 < length && seconds[index + stride] < seconds[index];
        if (0..seconds.len()).any(falls) {
            let advice = "fit() makes them monotone";
            return Err(CurveError(format!("seconds must not fall with batch, width or context; {advice}")));
        }
    }
    Ok(())
}

/// Values on an axis, `values(i)` at point `i`, linear in between.
fn interpolate(axis: &[f64], at: f64, values: impl Fn(usize) -> f64) -> f64 {
    let index = axis.partition_point(|&point| point <= at).saturating_sub(1);
    let index = index.min(axis.len().saturating_sub(2));
    if index + 1 == axis.len() {
        return values(index);
    }
    let share = ((at - axis[index]) / (axis[index + 1] - axis[index])).max(0.0);
    if share == 0.0 {
        return values(index);
    }
    let low = values(index);
    low + share * (values(index + 1) - low)
}

/// At most `count` numbers above `from` up to `to`, each larger than the one before by the same factor.
fn beyond(from: usize, to: usize, count: usize) -> Vec<usize> {
    if to <= from {
        return Vec::new();
    }
    let ratio = to as f64 / from as f64;
    let step = |i: usize| (from as f64 * ratio.powf(i as f64 / (count - 1) as f64)) as usize;
    let mut sizes: Vec<_> = (1..count - 1).map(step).filter(|&size| size > from && size < to).collect();
    sizes.push(to);
    sizes.dedup();
    sizes
}

/// Rounding may make a sum of products fall by a bit.
fn rising(mut seconds: Vec<f64>) -> Vec<f64> {
    for index in 1..seconds.len() {
        seconds[index] = seconds[index].max(seconds[index - 1]);
    }
    seconds
}

/// The same number for contexts within a few percent.
pub(super) fn context_key(context: f64) -> i64 {
    (8.0 * (context + 64.0).log2()).round_ties_even() as i64
}

/// The context in the middle of those with this key.
fn context_of(key: i64) -> f64 {
    ((key as f64 / 8.0).exp2() - 64.0).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAFT: DraftCost = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };

    fn curve(layout: Layout, ready: &[usize]) -> CostCurve {
        let axes = [vec![1.0, 4.0], vec![1.0, 9.0], vec![0.0, 100.0]];
        let seconds = vec![1.0, 2.0, 3.0, 4.0, 2.0, 3.0, 5.0, 7.0];
        CostCurve::new(axes, seconds, layout, ready.to_vec(), DRAFT).unwrap()
    }

    #[test]
    fn it_is_linear_between_points_and_goes_on_beyond() {
        let curve = curve(Layout::Padded, &[]);
        assert_eq!(curve.time(1.0, 1.0, 0.0), 1.0);
        assert_eq!(curve.time(1.0, 5.0, 0.0), 2.0);
        assert_eq!(curve.time(1.0, 17.0, 0.0), 5.0);
        assert_eq!(curve.time(2.5, 1.0, 50.0), 2.0);
        assert_eq!(curve.time(0.5, 0.0, 0.0), 1.0);
        assert_eq!(curve.time(4.0, 9.0, 200.0), 9.0);
    }

    #[test]
    fn packed_passes_count_the_tokens_of_all() {
        let curve = curve(Layout::Packed, &[]);
        assert_eq!(curve.time(4.0, 2.25, 0.0), 5.0);
        assert_eq!(curve.size_time(4, 5.0, 0.0), 5.0);
    }

    #[test]
    fn sizes_are_those_ready_or_a_selection() {
        assert_eq!(curve(Layout::Padded, &[1, 5, 9]).sizes(3, 8), [0, 4]);
        assert_eq!(curve(Layout::Padded, &[1, 5]).sizes(1, 0), [0]);
        let padded = curve(Layout::Padded, &[]).widths(1000);
        let packed = curve(Layout::Packed, &[]).sizes(64, 1000);
        for (sizes, first, most) in [(padded, 1, 1000), (packed, 0, 64 * 999)] {
            assert_eq!((sizes[0], sizes[sizes.len() - 1]), (first, most));
            assert!(sizes.windows(2).all(|pair| pair[0] < pair[1]) && sizes.len() < 1200);
        }
        assert!(curve(Layout::Packed, &[]).sizes(usize::MAX, usize::MAX).len() < 1200);
    }

    #[test]
    fn costs_are_kept_for_similar_contexts() {
        let curve = curve(Layout::Padded, &[]);
        let costs = curve.costs(1, 1000.0, 8);
        assert!(Arc::ptr_eq(&costs, &curve.costs(1, 1001.0, 8)));
        assert!(!Arc::ptr_eq(&costs, &curve.costs(1, 1500.0, 8)));
        (0..2000).for_each(|batch| _ = curve.costs(1 + batch, 1000.0, 8));
        assert!(curve.kept.lock().unwrap().len() <= MOST_KEPT);
    }

    #[test]
    fn absurd_numbers_are_refused() {
        let axes = [vec![1.0], vec![1.0, 2.0], vec![0.0]];
        let new = |axes: &[Vec<f64>; 3], seconds: &[f64], ready: &[usize], draft| {
            let made = CostCurve::new(axes.clone(), seconds.to_vec(), Layout::Padded, ready.to_vec(), draft);
            made.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(new(&axes, &[1.0, 2.0], &[], DRAFT), "");
        for (seconds, message) in [
            (&[1.0][..], "shape"),
            (&[2.0, 1.0], "fall"),
            (&[0.0, 1.0], "nanosecond"),
            (&[5.5e-309, 1.0], "nanosecond"),
            (&[1.0, f64::NAN], "day"),
        ] {
            assert!(new(&axes, seconds, &[], DRAFT).contains(message), "{seconds:?}");
        }
        assert!(new(&axes, &[1.0, 2.0], &[2], DRAFT).contains("ready"));
        assert!(new(&axes, &[1.0, 2.0], &[1, 1], DRAFT).contains("ready"));
        for draft in [
            DraftCost { step: -1.0, ..DRAFT },
            DraftCost { node: f64::NAN, ..DRAFT },
            DraftCost { threads: 0, ..DRAFT },
        ] {
            assert!(new(&axes, &[1.0, 2.0], &[], draft).contains("draft"));
        }
        for (at, bad) in [(0, vec![]), (0, vec![0.5]), (1, vec![2.0, 3.0]), (2, vec![f64::INFINITY])] {
            let mut axes = axes.clone();
            axes[at] = bad;
            assert_ne!(new(&axes, &[1.0, 2.0], &[], DRAFT), "");
        }
    }
}
