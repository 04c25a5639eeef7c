//! The most probable tokens and their probabilities from logits, in one pass over the vocabulary.
//!
//! The loops are written so that the compiler makes vector instructions of them: independent lanes, no branches. They
//! are compiled once for every processor and once more for those with AVX2, which [`Arch`] chooses between. Fused
//! multiplications are left out, so the results are the same bits on both.

use std::f32::consts::LOG2_E;

use pulp::{Arch, NullaryFnOnce};

use crate::TOP_K;

/// Logits that are looked at together: they stay in the first cache between the search for the largest and the sum.
const PIECE: usize = 512;
/// Sums side by side. Each takes `PIECE / LANES` numbers, few enough for single precision.
const LANES: usize = 32;

/// Adding it leaves the nearest integer, plus the bias of exponents, in the lowest bits of the sum.
const TO_EXPONENT: f32 = 12_582_912.0 + 127.0;
/// 2^f for f from -0.5 to 0.5, highest power first; relative error below 2e-7.
#[allow(clippy::approx_constant)]
const POWERS: [f32; 6] = [0.001_326_472_5, 0.009_671_513, 0.055_507_336, 0.240_222_42, 0.693_147, 1.0];

/// The `ids.len()` most probable tokens under `logits`, at most [`TOP_K`], most probable and first of equals first, and
/// their probabilities, whose sum is at most 1.
///
/// Where logits are no distribution, because one is NaN or infinite or all are minus infinity, probabilities are 0. The
/// first NaN comes first then, as it does for the argmax of numpy and torch.
///
/// # Panics
/// If `ids` are more than [`TOP_K`] or than there are logits, or `probs` not as many.
pub fn top_k(logits: &[f32], ids: &mut [i64], probs: &mut [f32]) {
    assert!(ids.len() <= TOP_K.min(logits.len()) && probs.len() == ids.len());
    let mut best = Best { k: ids.len(), ..Best::default() };
    let (largest, sum) = Arch::new().dispatch(Search { logits, best: &mut best });
    best.fill_up();
    if !sum.is_finite() || sum <= 0.0 {
        best.no_distribution(logits);
        probs.fill(0.0);
    } else {
        let prob = |value: f32| ((f64::from(value) - f64::from(largest)).exp() / sum) as f32;
        probs.iter_mut().zip(&best.values).for_each(|(to, &value)| *to = prob(value).min(1.0));
        // rounding may lift the sum above 1
        let total = probs.iter().sum::<f32>().max(1.0);
        probs.iter_mut().for_each(|prob| *prob /= total);
    }
    ids.iter_mut().zip(&best.ids).for_each(|(to, &id)| *to = id as i64);
}

/// The largest logits seen, in falling order.
#[derive(Default)]
struct Best {
    k: usize,
    count: usize,
    values: [f32; TOP_K],
    ids: [usize; TOP_K],
}

impl Best {
    /// What a logit must exceed to be among them.
    #[inline(always)]
    fn least(&self) -> f32 {
        if self.count < self.k { f32::NEG_INFINITY } else { self.values[self.k - 1] }
    }

    #[inline(always)]
    fn offer(&mut self, id: usize, value: f32) {
        self.count = (self.count + 1).min(self.k);
        let mut place = self.count - 1;
        while place > 0 && self.values[place - 1] < value {
            (self.values[place], self.ids[place]) = (self.values[place - 1], self.ids[place - 1]);
            place -= 1;
        }
        (self.values[place], self.ids[place]) = (value, id);
    }

    /// Adds the first tokens that are not there, for want of possible ones.
    fn fill_up(&mut self) {
        let mut id = 0;
        while self.count < self.k {
            if !self.ids[..self.count].contains(&id) {
                self.offer(id, f32::NEG_INFINITY);
            }
            id += 1;
        }
    }

    fn no_distribution(&mut self, logits: &[f32]) {
        let Some(nan) = logits.iter().position(|value| value.is_nan()) else { return };
        if self.k > 0 {
            let place = self.ids[..self.k].iter().position(|&id| id == nan).unwrap_or(self.k - 1);
            self.ids[..=place].rotate_right(1);
            self.ids[0] = nan;
        }
    }
}

struct Search<'a> {
    logits: &'a [f32],
    best: &'a mut Best,
}

impl NullaryFnOnce for Search<'_> {
    type Output = (f32, f64);

    /// The largest logit and the sum of the exponentials of all, each less the largest.
    #[inline(always)]
    fn call(self) -> (f32, f64) {
        let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0);
        for (index, piece) in self.logits.chunks(PIECE).enumerate() {
            let most = max_of(piece);
            if self.best.k > 0 && most > self.best.least() {
                search(self.best, index * PIECE, piece);
            }
            if most > largest {
                sum *= (f64::from(largest) - f64::from(most)).exp();
                largest = most;
            }
            if largest > f32::NEG_INFINITY {
                sum += sum_of(piece, largest);
            } else if piece.iter().any(|value| value.is_nan()) {
                sum = f64::NAN;
            }
        }
        (largest, sum)
    }
}

#[inline(always)]
fn search(best: &mut Best, start: usize, piece: &[f32]) {
    for (index, chunk) in piece.chunks(LANES).enumerate() {
        let least = best.least();
        if chunk.iter().fold(false, |any, &value| any | (value > least)) {
            for (lane, &value) in chunk.iter().enumerate() {
                if value > best.least() {
                    best.offer(start + index * LANES + lane, value);
                }
            }
        }
    }
}

/// The largest of the numbers that are any.
#[inline(always)]
fn max_of(piece: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = piece.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &value| larger(most, value))
}

#[inline(always)]
fn sum_of(piece: &[f32], largest: f32) -> f64 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = piece.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += exp(chunk[lane] - largest);
        }
    }
    let rest = rest.iter().map(|&value| exp(value - largest));
    lanes.iter().copied().chain(rest).map(f64::from).sum()
}

/// e^x for x up to 0; 2^-126 stands for less.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let power = x * LOG2_E;
    // so written that NaN stays
    let power = if power < -126.0 { -126.0 } else { power };
    let rounded = power + TO_EXPONENT;
    let fraction = power - (rounded - TO_EXPONENT);
    let scaled = POWERS[1..].iter().fold(POWERS[0], |sum, coefficient| sum * fraction + coefficient);
    scaled * f32::from_bits(rounded.to_bits() << 23)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(logits: &[f32], k: usize) -> (Vec<i64>, Vec<f32>) {
        let (mut ids, mut probs) = (vec![-1; k], vec![-1.0; k]);
        top_k(logits, &mut ids, &mut probs);
        (ids, probs)
    }

    #[test]
    fn exponentials_are_exact_to_a_few_bits() {
        for step in 0..870_000 {
            let x = step as f32 * -1e-4;
            let (ours, right) = (f64::from(exp(x)), f64::from(x).exp());
            // x itself, scaled in single precision, is off by a few parts in 1e8 of its size
            assert!((ours / right - 1.0).abs() < 3e-7 + 1.2e-7 * f64::from(-x), "{x}: {ours} {right}");
        }
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn equals_come_in_the_order_of_their_ids() {
        let mut logits = vec![0.0; 3000];
        for id in [2999, 700, 31, 1500] {
            logits[id] = 5.0;
        }
        assert_eq!(run(&logits, 6).0, [31, 700, 1500, 2999, 0, 1]);
        assert_eq!(run(&[0.5; 100], 3).0, [0, 1, 2]);
    }

    #[test]
    fn logits_that_are_no_distribution_have_no_probabilities() {
        let infinite = f32::NEG_INFINITY;
        assert_eq!(run(&[infinite; 3], 2), (vec![0, 1], vec![0.0, 0.0]));
        assert_eq!(run(&[1.0, f32::INFINITY, 2.0], 2), (vec![1, 2], vec![0.0, 0.0]));
        for nan in [0, 1, 2] {
            let mut logits = [3.0, 4.0, infinite];
            logits[nan] = f32::NAN;
            let (ids, probs) = run(&logits, 2);
            assert_eq!((ids[0], &probs[..]), (nan as i64, &[0.0, 0.0][..]));
            assert_ne!(ids[1], ids[0]);
        }
        assert_eq!(run(&[infinite, f32::NAN], 2).0, [1, 0]);
        let (ids, probs) = run(&[infinite, 2.0, infinite], 3);
        assert_eq!((ids, probs), (vec![1, 0, 2], vec![1.0, 0.0, 0.0]));
    }

    #[test]
    fn nothing_is_asked_or_there() {
        assert_eq!(run(&[], 0), (vec![], vec![]));
        assert_eq!(run(&[1.0, 2.0], 0), (vec![], vec![]));
        assert_eq!(run(&[1.0], 1), (vec![0], vec![1.0]));
    }

    proptest! {
        /// Against sorting and sums in double precision.
        #[test]
        fn tokens_and_probabilities_are_right(logits in prop::collection::vec(prop_oneof![
            8 => -30.0..30.0_f32, 1 => (-4..4).prop_map(|step| step as f32), 1 => Just(f32::NEG_INFINITY)
        ], 1..2000), k in 0..=TOP_K) {
            let k = k.min(logits.len());
            let (ids, probs) = run(&logits, k);
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            prop_assert_eq!(&ids, &order[..k].iter().map(|&id| id as i64).collect::<Vec<_>>());
            let largest = f64::from(logits[order[0]]);
            let sum: f64 = logits.iter().map(|&value| (f64::from(value) - largest).exp()).sum();
            for (&id, &prob) in ids.iter().zip(&probs) {
                let right = (f64::from(logits[id as usize]) - largest).exp() / sum;
                let right = if largest > f64::NEG_INFINITY { right } else { 0.0 };
                prop_assert!((f64::from(prob) - right).abs() <= 1e-6 * right + 1e-37);
            }
            prop_assert!(probs.iter().sum::<f32>() <= 1.0 + 1e-6);
        }
    }
}
