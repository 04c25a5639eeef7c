//! How many nodes of each request's tree one verify pass should hold.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

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

    /// Seconds of a pass without drafts.
    pub fn plain_seconds(&self) -> f64 {
        self.seconds[0]
    }

    /// The number of nodes to verify of each request, most probable first over all requests.
    ///
    /// Maximises expected accepted tokens minus `rate` times the seconds that they take beyond a pass without
    /// drafts. `rate` is what a second is worth in tokens: with the throughput of decoding at large, the choices of
    /// all passes together maximise that throughput (Dinkelbach's method for ratios). With at least the throughput
    /// without drafts, no pass is expected to do worse than that.
    ///
    /// `probs` holds each tree's path probabilities, most probable first.
    pub fn allocate(&self, probs: &[&[f32]], rate: f64) -> Result<Vec<usize>, CostError> {
        if !(rate.is_finite() && rate >= 0.0) {
            return Err(CostError::Rate(rate));
        }
        Ok(match self.layout {
            Layout::Padded => self.allocate_padded(probs, rate),
            Layout::Packed => self.allocate_packed(probs, rate),
        })
    }

    /// What the drafts of a pass of the size at `index` have to bring in, in tokens.
    fn price(&self, index: usize, rate: f64) -> f64 {
        (self.seconds[index] - self.seconds[0]) * rate
    }

    fn allocate_padded(&self, probs: &[&[f32]], rate: f64) -> Vec<usize> {
        let widest = probs.iter().map(|row| row.len()).max().unwrap_or(0);
        let (mut gain, mut best) = (0.0, (0.0, 0));
        for index in 1..self.sizes.len() {
            let (from, to) = (self.sizes[index - 1], self.sizes[index]);
            if from >= widest {
                break;
            }
            for row in probs {
                gain +=
                    row[from.min(row.len())..to.min(row.len())].iter().map(|&p| f64::from(p)).sum::<f64>();
            }
            let value = gain - self.price(index, rate);
            if value > best.0 {
                best = (value, to);
            }
        }
        probs.iter().map(|row| row.len().min(best.1)).collect()
    }

    fn allocate_packed(&self, probs: &[&[f32]], rate: f64) -> Vec<usize> {
        let largest = self.sizes[self.sizes.len() - 1];
        let mut heap: BinaryHeap<Candidate> =
            (0..probs.len()).filter_map(|row| Candidate::of(probs, row, 0)).collect();
        let mut order = Vec::new();
        let (mut gain, mut best) = (0.0, (0.0, 0));
        let mut index = 1;
        while let Some(top) = heap.pop() {
            if order.len() >= largest {
                break;
            }
            // even if all further nodes were as probable and free, none of them would help
            let most = gain + f64::from(top.prob) * (largest - order.len()) as f64;
            if most - self.price(index, rate) <= best.0 {
                break;
            }
            order.push(top.row);
            gain += f64::from(top.prob);
            heap.extend(Candidate::of(probs, top.row, top.node + 1));
            if order.len() == self.sizes[index] || heap.is_empty() {
                let value = gain - self.price(index, rate);
                if value > best.0 {
                    best = (value, order.len());
                }
                index += usize::from(order.len() == self.sizes[index]);
            }
        }
        let mut counts = vec![0; probs.len()];
        for &row in &order[..best.1] {
            counts[row] += 1;
        }
        counts
    }
}

/// The most probable node of a row that is not taken yet.
struct Candidate {
    prob: f32,
    row: usize,
    node: usize,
}

impl Candidate {
    fn of(probs: &[&[f32]], row: usize, node: usize) -> Option<Self> {
        probs[row].get(node).map(|&prob| Self { prob, row, node })
    }
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

    #[test]
    fn nothing_is_drafted_where_nothing_pays() {
        for layout in [Layout::Padded, Layout::Packed] {
            let costs = costs(&[0, 1, 2], &[1.0, 2.0, 3.0], layout);
            assert_eq!(costs.allocate(&[&[0.9, 0.8], &[]], 1.0).unwrap(), [0, 0]);
            assert_eq!(costs.allocate(&[], 1.0).unwrap(), [0usize; 0]);
        }
    }

    #[test]
    fn a_step_that_does_not_pay_can_lead_to_one_that_does() {
        let costs = costs(&[0, 1, 4], &[1.0, 1.95, 2.0], Layout::Packed);
        assert_eq!(costs.allocate(&[&[0.9, 0.9, 0.9, 0.9]], 1.0).unwrap(), [4]);
    }

    #[test]
    fn the_most_probable_nodes_of_all_requests_come_first() {
        let costs = costs(&[0, 3], &[1.0, 1.5], Layout::Packed);
        assert_eq!(costs.allocate(&[&[0.9, 0.2], &[0.8, 0.7], &[0.1]], 1.0).unwrap(), [1, 2, 0]);
    }

    #[test]
    fn padding_is_filled() {
        let costs = costs(&[0, 2], &[1.0, 1.5], Layout::Padded);
        assert_eq!(costs.allocate(&[&[0.9, 0.2], &[0.0, 0.0], &[0.1]], 1.0).unwrap(), [2, 2, 1]);
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
        assert!(matches!(new(&[0], &[1.0]).unwrap().allocate(&[], f64::NAN), Err(CostError::Rate(_))));
    }
}
