//! Corrects a request's probabilities by how they came true so far in this request.
//!
//! The learned tables know the average request; this is what is special about one: a few biases on the log-odds,
//! each moved by Newton steps on the logistic loss from a prior at 0, so that a handful of outcomes already counts.

use crate::predictor::domains::Domains;
use crate::predictor::support::KINDS;
use crate::predictor::weights::{PROBABILITIES, scale};
use crate::sources;

/// Knots along the scale of probabilities; between them the bias is interpolated.
const KNOTS: usize = 8;
const STEP: f32 = (KNOTS - 1) as f32 / PROBABILITIES as f32;
/// Information (in outcomes of variance 1) that the prior weighs.
const KNOT_PRIOR: f32 = 1.0;
const KIND_PRIOR: f32 = 6.0;
/// What is left of the old information after each outcome, and the furthest bias.
const FADING: f32 = 0.998;
const LIMIT: f32 = 2.5;
/// What a source gives to the tokens that come, before there are any, and how fast that follows them.
const FIRST_LUCK: f32 = 0.3;
const LUCK_RATE: f32 = 0.03;

#[derive(Clone, Copy)]
struct Bias {
    value: f32,
    /// The value less half its variance, since the exponential of noise is above 1 in the mean.
    centred: f32,
    /// exp(centred), to correct without logarithms; of a kind, exp of its part of [`Calibration::sums`].
    odds: f32,
    information: f32,
    /// Of outcomes not yet accounted for.
    gradient: f32,
    pending: f32,
}

const NEUTRAL: Bias =
    Bias { value: 0.0, centred: 0.0, odds: 1.0, information: 0.0, gradient: 0.0, pending: 0.0 };

/// The biases: one per knot of the probability, and one per kind of evidence.
#[derive(Clone)]
pub struct Calibration {
    knots: [Bias; KNOTS],
    kinds: [Bias; KINDS],
    /// What the model and this request together said of each kind at the last draft.
    sums: [f32; KINDS],
    /// What each source has lately given to the tokens that came.
    luck: [f32; sources::COUNT],
    /// Which of the datastore's domains its text is like.
    pub domains: Domains,
}

impl Default for Calibration {
    fn default() -> Self {
        let luck = [FIRST_LUCK; sources::COUNT];
        Self {
            knots: [NEUTRAL; KNOTS],
            kinds: [NEUTRAL; KINDS],
            sums: [0.0; KINDS],
            luck,
            domains: Domains::default(),
        }
    }
}

/// The knot below a probability, and how far it lies towards the next one.
fn position(prob: f32) -> (usize, f32) {
    let at = scale(prob) * STEP;
    let knot = usize::from(at as u8);
    (knot, at - knot as f32)
}

impl Calibration {
    /// Sets what the model says of each kind, before a draft.
    pub fn start(&mut self, biases: &[f32]) {
        self.domains.start();
        for ((sum, kind), bias) in self.sums.iter_mut().zip(&mut self.kinds).zip(biases) {
            let new = kind.centred + bias;
            // most kinds have nothing new to say
            if *sum != new {
                (*sum, kind.odds) = (new, new.exp());
            }
        }
    }

    /// The corrected probability of a token with this kind of evidence.
    #[inline]
    pub fn correct(&self, kind: usize, prob: f32) -> f32 {
        let (knot, above) = position(prob);
        let knots = self.knots[knot].odds * (1.0 - above) + self.knots[knot + 1].odds * above;
        let odds = prob * knots * self.kinds[kind].odds;
        odds / (1.0 - prob + odds)
    }

    /// Notes the outcome of a probability as it was before correction. Returns the error of the corrected one.
    pub fn note(&mut self, kind: usize, prob: f32, came_true: bool) -> f32 {
        let corrected = self.correct(kind, prob);
        let error = f32::from(u8::from(came_true)) - corrected;
        let variance = corrected * (1.0 - corrected);
        let (knot, above) = position(prob);
        let [lower, upper] = &mut self.knots[knot..knot + 2] else { return error };
        for (bias, share) in [(lower, 1.0 - above), (upper, above), (&mut self.kinds[kind], 1.0)] {
            bias.gradient += share * error;
            bias.pending += share * variance;
        }
        error
    }

    /// Notes what each source that says anything has given to the token that came.
    pub fn note_sources(&mut self, speaks: u8, probs: Option<&[f32; sources::COUNT]>) {
        for (source, luck) in self.luck.iter_mut().enumerate().filter(|(source, _)| speaks >> source & 1 != 0)
        {
            *luck += LUCK_RATE * (probs.map_or(0.0, |probs| probs[source]) - *luck);
        }
    }

    /// What each source has lately given to the tokens that came.
    pub fn luck(&self) -> &[f32; sources::COUNT] {
        &self.luck
    }

    /// Learns from the outcomes noted.
    pub fn learn(&mut self) {
        for knot in self.knots.iter_mut().filter(|knot| knot.pending > 0.0) {
            knot.learn(KNOT_PRIOR);
            knot.odds = knot.centred.exp();
        }
        // those of kinds stay as they are until the next draft
        for kind in self.kinds.iter_mut().filter(|kind| kind.pending > 0.0) {
            kind.learn(KIND_PRIOR);
        }
    }
}

impl Bias {
    /// Learns from the outcomes noted.
    fn learn(&mut self, prior: f32) {
        self.information = (self.information * FADING).max(prior) + self.pending;
        self.value = (self.value + self.gradient / self.information).clamp(-LIMIT, LIMIT);
        self.centred = self.value - 0.5 * (self.information - prior) / self.information.powi(2);
        (self.gradient, self.pending) = (0.0, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> Calibration {
        let mut calibration = Calibration::default();
        calibration.start(&[0.0; KINDS]);
        calibration
    }

    #[test]
    fn nothing_is_corrected_before_there_are_outcomes() {
        let calibration = started();
        for prob in [0.003, 0.1, 0.5, 0.9, 0.999] {
            assert!((calibration.correct(4, prob) - prob).abs() < 1e-6);
        }
    }

    #[test]
    fn what_the_model_says_of_a_kind_moves_its_odds() {
        let mut calibration = Calibration::default();
        let mut biases = [0.0; KINDS];
        biases[4] = 2f32.ln();
        calibration.start(&biases);
        assert!((calibration.correct(4, 0.5) - 2.0 / 3.0).abs() < 1e-6);
        assert!((calibration.correct(3, 0.5) - 0.5).abs() < 1e-6);
        // as of the last draft
        calibration.start(&[0.0; KINDS]);
        assert!((calibration.correct(4, 0.5) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn outcomes_move_probabilities_of_that_size_and_kind_towards_them() {
        for came_true in [false, true] {
            let mut calibration = started();
            for _ in 0..200 {
                calibration.note(4, 0.3, came_true);
                calibration.learn();
            }
            calibration.start(&[0.0; KINDS]);
            let moved = |kind: usize, prob: f32| {
                (calibration.correct(kind, prob) - prob) * if came_true { 1.0 } else { -1.0 }
            };
            assert!(moved(4, 0.3) > 0.2);
            assert!(moved(4, 0.3) > moved(5, 0.3) && moved(5, 0.3) > moved(5, 0.9).abs());
        }
    }

    #[test]
    fn the_error_is_that_of_the_corrected_probability() {
        let mut calibration = started();
        assert!((calibration.note(2, 0.25, true) - 0.75).abs() < 1e-6);
        assert!((calibration.note(2, 0.25, false) + 0.25).abs() < 1e-6);
    }

    #[test]
    fn true_probabilities_are_left_as_they_are() {
        let mut calibration = started();
        for n in 0..4000 {
            calibration.start(&[0.0; KINDS]);
            calibration.note(4, 0.25, n % 4 == 0);
            calibration.learn();
        }
        assert!((calibration.correct(4, 0.25) - 0.25).abs() < 0.02);
    }
}
