//! How many nodes of each request's tree one verify pass should hold.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

/// Seconds of a verify pass by its size, for one batch size and context length.
#[derive(Clone, Debug, PartialEq)]
pub struct PassCosts {
    sizes: Vec<usize>,
    seconds: Vec<f64>,
    layout: Layout,
}

/// What the size of a pass counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Nodes of each row: every row of the pass is as wide as the widest.
    Padded,
    /// Nodes of the whole pass: rows lie end to end.
    Packed,
}

/// Why numbers are no costs of passes.
#[derive(Debug, Error, PartialEq)]
pub enum CostError {
    /// Not one time for each size.
    #[error("sizes and seconds must have the same length, at least 1, got {0} and {1}")]
    Lengths(usize, usize),
    /// Sizes do not rise from 0.
    #[error("sizes must rise from 0, got {1} at index {0}")]
    Sizes(usize, usize),
    /// A time that no pass takes, or less time for a larger pass.
    #[error("seconds must be finite, positive and not fall, got {1} at index {0}")]
    Seconds(usize, f64),
    /// A rate that is no rate.
    #[error("rate must be finite and not negative, got {0}")]
    Rate(f64),
}

impl PassCosts {
    /// Costs of the sizes that the verifier has ready; the first size is 0, a pass without drafts.
    pub fn new(sizes: Vec<usize>, seconds: Vec<f64>, layout: Layout) -> Result<Self, CostError> {
        if sizes.is_empty() || sizes.len() != seconds.len() {
            return Err(CostError::Lengths(sizes.len(), seconds.len()));
        }
        for (index, &size) in sizes.iter().enumerate() {
            if (index == 0 && size != 0) || (index > 0 && size <= sizes[index - 1]) {
                return Err(CostError::Sizes(index, size));
            }
        }
        let mut below = f64::MIN_POSITIVE;
        for (index, &time) in seconds.iter().enumerate() {
            if !(time.is_finite() && time >= below) {
                return Err(CostError::Seconds(index, time));
            }
            below = time;
        }
        Ok(Self { sizes, seconds, layout })
    }

    /// What the drafts of a pass of the size at `index` have to bring in, in tokens.
    fn price(&self, index: usize, rate: f64) -> f64 {
        (self.seconds[index] - self.seconds[0]) * rate
    }
}

/// What passes cost and what their time is worth: trees are as large as pays.
///
/// Maximises expected accepted tokens minus the rate times the seconds that they take beyond a pass without drafts.
/// With the throughput of decoding at large as the rate, the choices of all passes together maximise that throughput
/// (Dinkelbach's method for ratios). With at least the throughput without drafts, no pass is expected to do worse than
/// that.
#[derive(Clone, Debug)]
pub struct Sizing {
    costs: Arc<PassCosts>,
    rate: f64,
}

impl Sizing {
    /// `rate` is what a second is worth, in tokens; by default what so many requests decode in it without drafts.
    pub fn new(costs: Arc<PassCosts>, rate: Option<f64>, requests: usize) -> Result<Self, CostError> {
        let rate = rate.unwrap_or(requests as f64 / costs.seconds[0]);
        if !(rate.is_finite() && rate >= 0.0) {
            return Err(CostError::Rate(rate));
        }
        Ok(Self { costs, rate })
    }

    /// The number of nodes to verify of each tree, most probable first over all trees.
    pub fn allocate<'a>(&self, trees: &'a mut Allocation) -> &'a [usize] {
        trees.counts.clear();
        match self.costs.layout {
            Layout::Padded => self.allocate_padded(trees),
            Layout::Packed => self.allocate_packed(trees),
        }
        &trees.counts
    }

    /// The number of nodes to verify of the only tree.
    pub(crate) fn nodes(&self, probs: &[f32]) -> usize {
        let mut trees = Allocation::default();
        trees.push(probs);
        self.allocate(&mut trees)[0]
    }

    fn allocate_padded(&self, trees: &mut Allocation) {
        let PassCosts { sizes, .. } = &*self.costs;
        let Allocation { probs, trees, counts, .. } = trees;
        let widest = trees.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let (mut gain, mut best) = (0.0, (0.0, 0));
        for index in 1..sizes.len() {
            let (from, to) = (sizes[index - 1], sizes[index]);
            if from >= widest {
                break;
            }
            for tree in &*trees {
                let tree = &probs[tree.clone()];
                let more = &tree[from.min(tree.len())..to.min(tree.len())];
                gain += more.iter().map(|&prob| f64::from(prob)).sum::<f64>();
            }
            let value = gain - self.costs.price(index, self.rate);
            if value > best.0 {
                best = (value, to);
            }
        }
        counts.extend(trees.iter().map(|tree| tree.len().min(best.1)));
    }

    fn allocate_packed(&self, trees: &mut Allocation) {
        let PassCosts { sizes, .. } = &*self.costs;
        let Allocation { probs, trees, candidates, order, counts } = trees;
        let candidate = |row: usize, node: usize| {
            let prob = *probs[trees[row].clone()].get(node)?;
            Some(Candidate { prob, row, node })
        };
        let largest = sizes[sizes.len() - 1];
        order.clear();
        candidates.clear();
        candidates.extend((0..trees.len()).filter_map(|row| candidate(row, 0)));
        let (mut gain, mut best) = (0.0, (0.0, 0));
        let mut index = 1;
        while let Some(top) = candidates.pop() {
            if order.len() >= largest {
                break;
            }
            // even if all further nodes were as probable and free, none of them would help
            let most = gain + f64::from(top.prob) * (largest - order.len()) as f64;
            if most - self.costs.price(index, self.rate) <= best.0 {
                break;
            }
            order.push(top.row);
            gain += f64::from(top.prob);
            candidates.extend(candidate(top.row, top.node + 1));
            if order.len() == sizes[index] || candidates.is_empty() {
                let value = gain - self.costs.price(index, self.rate);
                if value > best.0 {
                    best = (value, order.len());
                }
                index += usize::from(order.len() == sizes[index]);
            }
        }
        counts.resize(trees.len(), 0);
        order[..best.1].iter().for_each(|&row| counts[row] += 1);
    }
}

/// The trees of a pass, and what each gets of it. Its memory is used again.
#[derive(Default)]
pub struct Allocation {
    /// Path probabilities of all trees, most probable first in each, and where each tree has its own.
    probs: Vec<f32>,
    trees: Vec<Range<usize>>,
    candidates: BinaryHeap<Candidate>,
    /// Whose nodes were taken.
    order: Vec<usize>,
    counts: Vec<usize>,
}

impl Allocation {
    /// Forgets all trees.
    pub fn clear(&mut self) {
        self.probs.clear();
        self.trees.clear();
    }

    /// Adds a tree by its path probabilities, most probable first.
    pub fn push(&mut self, probs: &[f32]) {
        let start = self.probs.len();
        self.probs.extend_from_slice(probs);
        self.trees.push(start..self.probs.len());
    }
}

/// The most probable node of a row that is not taken yet.
struct Candidate {
    prob: f32,
    row: usize,
    node: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.prob.total_cmp(&other.prob).then(other.row.cmp(&self.row))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(sizes: &[usize], seconds: &[f64], layout: Layout) -> PassCosts {
        PassCosts::new(sizes.to_vec(), seconds.to_vec(), layout).unwrap()
    }

    fn allocate(costs: PassCosts, probs: &[&[f32]], rate: f64) -> Vec<usize> {
        let mut trees = Allocation::default();
        // what it held before is forgotten
        trees.push(&[1.0; 9]);
        let sizing = Sizing::new(Arc::new(costs), Some(rate), 0).unwrap();
        sizing.allocate(&mut trees);
        trees.clear();
        probs.iter().for_each(|probs| trees.push(probs));
        sizing.allocate(&mut trees).to_vec()
    }

    #[test]
    fn nothing_is_drafted_where_nothing_pays() {
        for layout in [Layout::Padded, Layout::Packed] {
            let costs = costs(&[0, 1, 2], &[1.0, 2.0, 3.0], layout);
            assert_eq!(allocate(costs.clone(), &[&[0.9, 0.8], &[]], 1.0), [0, 0]);
            assert_eq!(allocate(costs, &[], 1.0), [0usize; 0]);
        }
    }

    #[test]
    fn a_step_that_does_not_pay_can_lead_to_one_that_does() {
        let costs = costs(&[0, 1, 4], &[1.0, 1.95, 2.0], Layout::Packed);
        assert_eq!(allocate(costs.clone(), &[&[0.9, 0.9, 0.9, 0.9]], 1.0), [4]);
    }

    #[test]
    fn the_most_probable_nodes_of_all_requests_come_first() {
        let costs = costs(&[0, 3], &[1.0, 1.5], Layout::Packed);
        assert_eq!(allocate(costs.clone(), &[&[0.9, 0.2], &[0.8, 0.7], &[0.1]], 1.0), [1, 2, 0]);
    }

    #[test]
    fn padding_is_filled() {
        let costs = costs(&[0, 2], &[1.0, 1.5], Layout::Padded);
        assert_eq!(allocate(costs.clone(), &[&[0.9, 0.2], &[0.0, 0.0], &[0.1]], 1.0), [2, 2, 1]);
    }

    #[test]
    fn absurd_numbers_are_refused() {
        let new = |sizes: &[usize], seconds: &[f64]| {
            PassCosts::new(sizes.to_vec(), seconds.to_vec(), Layout::Packed)
        };
        assert_eq!(new(&[], &[]), Err(CostError::Lengths(0, 0)));
        assert_eq!(new(&[1], &[1.0]), Err(CostError::Sizes(0, 1)));
        assert_eq!(new(&[0, 2, 2], &[1.0; 3]), Err(CostError::Sizes(2, 2)));
        assert_eq!(new(&[0, 1], &[2.0, 1.0]), Err(CostError::Seconds(1, 1.0)));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(new(&[0], &[bad]), Err(CostError::Seconds(0, _))));
        }
        let costs = Arc::new(new(&[0], &[1.0]).unwrap());
        for bad in [-1.0, f64::NAN, f64::INFINITY] {
            let sizing = Sizing::new(Arc::clone(&costs), Some(bad), 1);
            assert!(matches!(sizing, Err(CostError::Rate(_))));
        }
    }
}
