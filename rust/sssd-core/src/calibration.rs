//! Corrects a request's probabilities by how they came true so far in this request.
//!
//! The learned tables know the average request; this is what is special about one: a few biases on the log-odds,
//! each moved by Newton steps on the logistic loss from a prior at 0, so that a handful of outcomes already counts.

use crate::model::{KINDS, PROBABILITIES, scale};

/// Knots along the scale of probabilities; between them the bias is interpolated.
const KNOTS: usize = 8;
const STEP: f32 = (KNOTS - 1) as f32 / PROBABILITIES as f32;
/// Information (in outcomes of variance 1) that the prior weighs.
const KNOT_PRIOR: f32 = 1.0;
const KIND_PRIOR: f32 = 6.0;
/// What is left of the old information after each outcome, and the furthest bias.
const FADING: f32 = 0.998;
const LIMIT: f32 = 2.5;

#[derive(Clone, Copy)]
struct Bias {
    value: f32,
    /// The value less half its variance, since the exponential of noise is above 1 in the mean.
    centred: f32,
    /// exp(centred), to correct without logarithms.
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
    /// exp of what the model and this request say of each kind.
    odds: [f32; KINDS],
}

impl Default for Calibration {
    fn default() -> Self {
        Self { knots: [NEUTRAL; KNOTS], kinds: [NEUTRAL; KINDS], odds: [1.0; KINDS] }
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
        for ((odds, kind), bias) in self.odds.iter_mut().zip(&self.kinds).zip(biases) {
            *odds = (kind.centred + bias).exp();
        }
    }

    /// The corrected probability of a token with this kind of evidence.
    pub fn correct(&self, kind: usize, prob: f32) -> f32 {
        let (knot, above) = position(prob);
        let knots = self.knots[knot].odds * (1.0 - above) + self.knots[knot + 1].odds * above;
        let odds = prob * knots * self.odds[kind];
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

    /// Learns from the outcomes noted.
    pub fn learn(&mut self) {
        let knots = self.knots.iter_mut().map(|bias| (bias, KNOT_PRIOR));
        let kinds = self.kinds.iter_mut().map(|bias| (bias, KIND_PRIOR));
        for (bias, prior) in knots.chain(kinds).filter(|(bias, _)| bias.pending > 0.0) {
            bias.information = (bias.information * FADING).max(prior) + bias.pending;
            bias.value = (bias.value + bias.gradient / bias.information).clamp(-LIMIT, LIMIT);
            bias.centred = bias.value - 0.5 * (bias.information - prior) / bias.information.powi(2);
            bias.odds = bias.centred.exp();
            (bias.gradient, bias.pending) = (0.0, 0.0);
        }
    }
}
