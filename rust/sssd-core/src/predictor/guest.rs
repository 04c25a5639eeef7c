//! A draft from outside beside the sources: how far to trust it is learned from how its tokens fared.
//!
//! Three steps for each token that it names, each with few parameters, since a request has few outcomes:
//! 1. *calibration*: the share of such tokens that came true, by depth and by the probability that was given with the
//!    token (or by its rank among its siblings, if there was none), as in an adaptive probability map;
//! 2. *combination*: a logistic regression on the log-odds of that share and of what the sources say of the token,
//!    learned by Newton steps (logistic mixing, as context-mixing compressors do it);
//! 3. *switching*: between the sources' own probability and the combined one by how probable each held what came, as in
//!    Bayesian model averaging. A guest that knows nothing is soon without a voice.
//!
//! The other tokens share what is left in the proportions that the sources give them.

use crate::index::NONE;
use crate::predictor::weights::{PROBABILITIES, scale};

/// Depths that are told apart, and ranks among siblings.
const DEPTHS: usize = 4;
const RANKS: usize = 6;
const KNOWN: usize = DEPTHS * PROBABILITIES;
const CELLS: usize = KNOWN + DEPTHS * RANKS;
/// Outcomes that the start of a cell weighs, and the most that it remembers.
const PRIOR_COUNT: f32 = 3.0;
const MEMORY: f32 = 120.0;

/// One, the log-odds of the calibrated share, those of the sources, and how much probability they have left.
const FEATURES: usize = 4;
type Features = [f32; FEATURES];
/// What the regression starts with, and how much that weighs (as information).
const WEIGHTS: Features = [2.2, 1.0, 0.5, 0.0];
const PRECISION: Features = [1.2, 9.0, 18.0, 18.0];
/// What is left of the information after each outcome.
const FADING: f32 = 0.995;
/// Of the probability that the sources leave unsaid, what a token that they do not name gets of it.
const UNNAMED: f32 = 0.03;
/// The log-odds of the combination against the sources, which start even: at most, and what is left of them at each outcome.
const MOST_LEAD: f32 = 7.0;
const LEAD_FADING: f32 = 0.98;
#[derive(Clone, Copy)]
struct Cell {
    share: f32,
    count: f32,
}

/// How far a request's drafts from outside are to be trusted.
#[derive(Clone, Copy)]
pub struct Trust {
    cells: [Cell; CELLS],
    weights: Features,
    /// The information behind the weights beyond that of their start.
    information: [Features; FEATURES],
    lead: f32,
}

/// A token that the guest names after an expanded node, kept for learning.
#[derive(Clone, Copy)]
pub struct Heard {
    pub candidate: u32,
    cell: u16,
    features: Features,
    /// What the sources, and what the combination gave it.
    own: f32,
    combined: f32,
    /// What it was given.
    pub prob: f32,
}

impl Heard {
    /// Whether most of the token's probability is the guest's.
    pub fn carries(&self) -> bool {
        self.prob > 2.0 * self.own
    }
}

fn sigmoid(value: f32) -> f32 {
    1.0 / (1.0 + (-value).exp())
}

fn logit(prob: f32) -> f32 {
    let prob = prob.clamp(0.0005, 0.9995);
    (prob / (1.0 - prob)).ln()
}

fn dot(a: &Features, b: &Features) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Default for Trust {
    fn default() -> Self {
        let share = |cell: usize| {
            if cell < KNOWN {
                // the probability in the middle of the step
                let steps = (cell % PROBABILITIES) as f32 - 0.5 * PROBABILITIES as f32;
                let tail = 0.5 * 2f32.powf(-steps.abs());
                return if steps < 0.0 { tail } else { 1.0 - tail };
            }
            let (depth, rank) = ((cell - KNOWN) / RANKS, (cell - KNOWN) % RANKS);
            [0.5, 0.12, 0.06, 0.04, 0.02, 0.005][rank] + if rank == 0 { 0.05 * depth as f32 } else { 0.0 }
        };
        let cells = std::array::from_fn(|cell| Cell { share: share(cell), count: PRIOR_COUNT });
        Self { cells, weights: WEIGHTS, information: [[0.0; FEATURES]; FEATURES], lead: 0.0 }
    }
}

impl Trust {
    /// What a token is worth that the guest names at this depth, with this rank and, if it says so, probability; the
    /// sources give it `own`, and leave `rest` to tokens that they do not name.
    pub fn hear(&self, depth: u16, rank: usize, prob: Option<f32>, own: f32, rest: f32) -> Heard {
        let depth = usize::from(depth).min(DEPTHS - 1);
        let (cell, share) = match prob {
            Some(prob) => {
                let scale = scale(prob.clamp(1e-6, 1.0 - 1e-6));
                let (step, row) = (usize::from(scale as u8), depth * PROBABILITIES);
                let above = scale - step as f32;
                let [lower, upper] = [0, 1].map(|more| self.cells[row + step + more].share);
                (row + usize::from((scale + 0.5) as u8), lower * (1.0 - above) + upper * above)
            }
            None => {
                let cell = KNOWN + depth * RANKS + (rank + 1).ilog2().min(RANKS as u32 - 1) as usize;
                (cell, self.cells[cell].share)
            }
        };
        let named = own.max(UNNAMED * rest);
        let features = [1.0, logit(share), logit(named), logit(rest)];
        let combined = sigmoid(dot(&self.weights, &features));
        let prob = own + sigmoid(self.lead) * (combined - own);
        Heard { candidate: NONE, cell: cell as u16, features, own, combined, prob }
    }

    /// Learns whether a token came.
    pub fn learn(&mut self, heard: &Heard, came: bool) {
        let outcome = f32::from(u8::from(came));
        let cell = &mut self.cells[usize::from(heard.cell)];
        cell.count = (cell.count + 1.0).min(MEMORY);
        cell.share += (outcome - cell.share) / cell.count;
        let said = |prob: f32| (if came { prob } else { 1.0 - prob }).max(0.01).ln();
        let gain = said(heard.combined) - said(heard.own);
        self.lead = (self.lead * LEAD_FADING + gain).clamp(-MOST_LEAD, MOST_LEAD);
        self.learn_weights(&heard.features, outcome);
    }

    fn learn_weights(&mut self, features: &Features, outcome: f32) {
        let prob = sigmoid(dot(&self.weights, features));
        let (error, variance) = (outcome - prob, prob * (1.0 - prob));
        for (row, &a) in self.information.iter_mut().zip(features) {
            for (value, &b) in row.iter_mut().zip(features) {
                *value = *value * FADING + variance * a * b;
            }
        }
        let mut system = self.information;
        for (at, prior) in PRECISION.into_iter().enumerate() {
            system[at][at] += prior;
        }
        let step = solve(system, features.map(|feature| feature * error));
        for ((weight, step), start) in self.weights.iter_mut().zip(step).zip(WEIGHTS) {
            *weight = (*weight + step.clamp(-1.0, 1.0)).clamp(start - 8.0, start + 8.0);
        }
    }

    /// Moves towards what a request has learned since it started from `base`, by a quarter of the way.
    pub fn merge(&mut self, base: &Self, learned: &Self) {
        for ((own, before), after) in self.cells.iter_mut().zip(&base.cells).zip(&learned.cells) {
            if before.count != after.count || before.share != after.share {
                own.share += (after.share - own.share) / 4.0;
                own.count = after.count.min(MEMORY / 4.0).max(own.count);
            }
        }
        for (own, after) in self.weights.iter_mut().zip(&learned.weights) {
            *own += (after - *own) / 4.0;
        }
        for (own, after) in self.information.iter_mut().zip(&learned.information) {
            own.iter_mut().zip(after).for_each(|(own, after)| *own += (after - *own) / 4.0);
        }
        self.lead += (learned.lead - self.lead) / 4.0;
    }
}

/// Solves a system that is symmetric and positive definite, without pivots.
fn solve(mut system: [Features; FEATURES], mut values: Features) -> Features {
    for at in 0..FEATURES {
        let pivot = system[at];
        for row in at + 1..FEATURES {
            let factor = system[row][at] / pivot[at];
            for (value, above) in system[row].iter_mut().zip(pivot) {
                *value -= factor * above;
            }
            values[row] -= factor * values[at];
        }
    }
    for at in (0..FEATURES).rev() {
        let known: f32 = (at + 1..FEATURES).map(|column| system[at][column] * values[column]).sum();
        values[at] = (values[at] - known) / system[at][at];
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(trust: &Trust, prob: Option<f32>, own: f32) -> Heard {
        trust.hear(0, 0, prob, own, 0.3)
    }

    #[test]
    fn a_guest_that_knows_nothing_loses_its_voice() {
        let mut trust = Trust::default();
        let before = heard(&trust, Some(0.9), 0.05).prob;
        for _ in 0..30 {
            let said = heard(&trust, Some(0.9), 0.05);
            trust.learn(&said, false);
        }
        let after = heard(&trust, Some(0.9), 0.05).prob;
        assert!(before > 0.5 && after < 0.06, "{before} {after}");
        // and does not spoil what the sources say
        let own = heard(&trust, Some(0.9), 0.6).prob;
        assert!(own > 0.3, "{own}");
    }

    #[test]
    fn a_guest_that_is_right_is_believed_whatever_it_said() {
        for prob in [None, Some(0.3), Some(0.99)] {
            let mut trust = Trust::default();
            for _ in 0..60 {
                let said = heard(&trust, prob, 0.02);
                trust.learn(&said, true);
            }
            assert!(heard(&trust, prob, 0.02).prob > 0.9);
        }
    }

    #[test]
    fn agreement_counts() {
        let trust = Trust::default();
        let probs = [0.001, 0.1, 0.5, 0.9].map(|own| heard(&trust, Some(0.5), own).prob);
        assert!(probs.is_sorted() && probs[3] > 0.9, "{probs:?}");
    }

    #[test]
    fn systems_are_solved() {
        let system = [[4.0, 1.0, 0.5, 0.0], [1.0, 3.0, 0.2, 0.1], [0.5, 0.2, 2.0, 0.3], [0.0, 0.1, 0.3, 1.0]];
        let found = solve(system, [1.0, 2.0, 3.0, 4.0]);
        for (row, value) in system.iter().zip([1.0, 2.0, 3.0, 4.0]) {
            assert!((dot(row, &found) - value).abs() < 1e-4);
        }
    }

    #[test]
    fn merging_moves_what_was_learned() {
        let base = Trust::default();
        let (mut learned, mut shared) = (base, base);
        for _ in 0..20 {
            let said = heard(&learned, Some(0.9), 0.05);
            learned.learn(&said, false);
        }
        shared.merge(&base, &learned);
        let probs = [base, shared, learned].map(|trust| heard(&trust, Some(0.9), 0.05).prob);
        assert!(probs[0] > probs[1] && probs[1] > probs[2], "{probs:?}");
    }
}
