//! How many nodes of each request's tree one verify pass should hold.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;

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

    /// Costs that are known to be sound.
    pub(super) fn trusted(sizes: Vec<usize>, seconds: Vec<f64>, layout: Layout) -> Self {
        debug_assert!(Self::new(sizes.clone(), seconds.clone(), layout).is_ok(), "{sizes:?} {seconds:?}");
        Self { sizes, seconds, layout }
    }

    /// The sizes to choose from.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Seconds of each size.
    pub fn seconds(&self) -> &[f64] {
        &self.seconds
    }

    /// Tokens per second of so many requests without drafts.
    pub fn plain_rate(&self, requests: usize) -> f64 {
        requests as f64 / self.seconds[0]
    }

    /// Seconds of the pass that holds so many nodes, beyond one without drafts.
    pub(super) fn extra(&self, size: usize) -> f64 {
        let index = self.sizes.partition_point(|&held| held < size).min(self.sizes.len() - 1);
        self.seconds[index] - self.seconds[0]
    }

    /// Whether sizes count the nodes of each row or of the pass.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What the drafts of a pass of the size at `index` have to bring in, in tokens.
    fn price(&self, index: usize, rate: f64) -> f64 {
        (self.seconds[index] - self.seconds[0]) * rate
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

    /// The number of trees.
    pub fn len(&self) -> usize {
        self.trees.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.trees.is_empty()
    }

    /// The number of nodes that were given to each tree last.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Each tree's path probabilities, and how many of its nodes were given out last.
    pub(super) fn given(&self) -> impl Iterator<Item = (&[f32], usize)> {
        let trees = self.trees.iter().map(|tree| &self.probs[tree.clone()]);
        trees.zip(self.counts.iter().copied())
    }

    /// The number of nodes to verify of each tree, most probable first over all trees, where a second is worth `rate`
    /// tokens, which is not negative.
    pub fn allocate(&mut self, costs: &PassCosts, rate: f64) -> &[usize] {
        self.counts.clear();
        match costs.layout {
            Layout::Padded => self.allocate_padded(costs, rate),
            Layout::Packed => self.allocate_packed(costs, rate),
        }
        &self.counts
    }

    fn allocate_padded(&mut self, costs: &PassCosts, rate: f64) {
        let sizes = &costs.sizes;
        let Self { probs, trees, counts, .. } = self;
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
            let value = gain - costs.price(index, rate);
            if value > best.0 {
                best = (value, to);
            }
        }
        counts.extend(trees.iter().map(|tree| tree.len().min(best.1)));
    }

    fn allocate_packed(&mut self, costs: &PassCosts, rate: f64) {
        let sizes = &costs.sizes;
        let Self { probs, trees, candidates, order, counts } = self;
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
            if most - costs.price(index, rate) <= best.0 {
                break;
            }
            order.push(top.row);
            gain += f64::from(top.prob);
            candidates.extend(candidate(top.row, top.node + 1));
            if order.len() == sizes[index] || candidates.is_empty() {
                let value = gain - costs.price(index, rate);
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
        trees.allocate(&costs, rate);
        trees.clear();
        probs.iter().for_each(|probs| trees.push(probs));
        trees.allocate(&costs, rate).to_vec()
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
    }
}
