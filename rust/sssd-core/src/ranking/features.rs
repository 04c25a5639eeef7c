//! What the ranking stage looks at. Whoever changes what a feature means counts the network's version up.

use crate::index::NONE;
use crate::predictor::arena::{Candidate, Expansion, Tally};
use crate::predictor::inputs::Inputs;
use crate::ranking::bilinear::LogBilinear;
use crate::ranking::network::{FEATURES, Seen};
use crate::sources::{self, NO_CLASS, REQUEST, STORE};

/// Of each source: its probability for the candidate, the class of its longest context, its best probability, its
/// weight in the mixture, and what it has lately given to what came true.
const PROBS: usize = 0;
const CLASSES: usize = PROBS + sources::COUNT;
const PEAKS: usize = CLASSES + sources::COUNT;
const WEIGHTS: usize = PEAKS + sources::COUNT;
const LUCK: usize = WEIGHTS + sources::COUNT;
/// Of the node: depth, probability, age of the output, votes behind the longest match in request and datastore, and the
/// sum of its candidates' probabilities.
const DEPTH: usize = LUCK + sources::COUNT;
const PATH: usize = DEPTH + 1;
const AGE: usize = DEPTH + 2;
const REQUEST_VOTES: usize = DEPTH + 3;
const STORE_VOTES: usize = DEPTH + 4;
const TOTAL: usize = DEPTH + 5;
/// Of the candidate: its probability, whether the request holds it and how far back, how frequent it is in the corpus,
/// whether it stands for all that are no candidates, whether it repeats the node's token, and the log-bilinear score.
const PROB: usize = DEPTH + 6;
const OCCURS: usize = DEPTH + 7;
const AGO: usize = DEPTH + 8;
const FREQUENCY: usize = DEPTH + 9;
const NONE_OF_THEM: usize = DEPTH + 10;
const REPEATS: usize = DEPTH + 11;
const SCORE: usize = DEPTH + 12;
const _: () = assert!(FEATURES == DEPTH + 13);

/// The node whose candidates are ranked, and what they were made from.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    pub owner: Candidate,
    pub expansion: &'a Expansion,
    pub tally: &'a Tally,
    pub inputs: &'a Inputs<'a>,
    pub tables: &'a dyn LogBilinear,
}

/// A shifted logarithm of a probability, about -2 to 1.
#[inline(always)]
fn log_prob(prob: f32) -> f32 {
    ln(prob + 0.002) * 0.5 + 1.0
}

/// The natural logarithm of a positive number, off by at most 0.008.
#[inline(always)]
pub fn ln(value: f32) -> f32 {
    let bits = value.to_bits();
    let exponent = (bits >> 23) as f32 - 127.0;
    let mantissa = f32::from_bits(bits & 0x7f_ffff | 0x3f80_0000) - 1.0;
    (exponent + mantissa * (1.3465 - 0.3465 * mantissa)) * std::f32::consts::LN_2
}

/// The node's features, which all its candidates share.
#[inline(always)]
pub fn of_node(node: &Node, children: &[Candidate], total: f32, seen: &mut Seen) {
    let Node { owner, inputs, expansion, tally, .. } = node;
    let mut peaks = [0.0f32; sources::COUNT];
    for child in children {
        peaks.iter_mut().zip(&child.probs).for_each(|(peak, &prob)| *peak = peak.max(prob));
    }
    for (source, peak) in peaks.into_iter().enumerate() {
        if expansion.speaks >> source & 1 != 0 {
            seen.add(PEAKS + source, log_prob(peak));
            seen.add(WEIGHTS + source, expansion.weights[source] * 2.0);
        }
        seen.add(LUCK + source, inputs.calibration.luck()[source] * 2.0 - 0.5);
    }
    let votes = |source: usize| {
        tally.held[source].checked_ilog2().map_or(0.0, |class| tally.counts[source][class as usize])
    };
    seen.add(DEPTH, ln(1.0 + f32::from(owner.depth)) * 0.5);
    seen.add(PATH, ln(owner.path.max(1e-4)) * 0.2);
    seen.add(AGE, ln(1.0 + inputs.age as f32) * 0.2);
    seen.add(REQUEST_VOTES, ln(1.0 + votes(REQUEST)) * 0.5);
    seen.add(STORE_VOTES, ln(1.0 + votes(STORE)) * 0.3);
    seen.add(TOTAL, total.min(1.0));
}

/// A candidate's own, `prob` being its probability so far and `score` the log-bilinear one. Returns the logarithm of
/// `prob`.
#[inline(always)]
pub fn of_candidate(node: &Node, candidate: &Candidate, prob: f32, score: f32, seen: &mut Seen) -> f32 {
    let Node { inputs, expansion, .. } = node;
    for source in 0..sources::COUNT {
        if expansion.speaks >> source & 1 != 0 {
            seen.add(PROBS + source, log_prob(candidate.probs[source]));
        }
        if candidate.classes[source] != NO_CLASS {
            seen.add(CLASSES + source, 0.2 + f32::from(candidate.classes[source]) * 0.1);
        }
    }
    let base = ln(prob.max(1e-4));
    seen.add(PROB, base * 0.25 + 0.5);
    let newest = inputs.index.newest(0, &[candidate.token]);
    if newest != NONE {
        seen.add(OCCURS, 1.0);
        seen.add(AGO, ln((inputs.index.tokens().len() - newest as usize).max(1) as f32) * 0.15);
    }
    // files may say anything, numbers that are none included
    #[allow(clippy::manual_clamp)]
    let bounded = |value: f32| value.max(-2.0).min(2.0);
    seen.add(FREQUENCY, bounded(node.tables.bias(candidate.token).1 * 0.1 + 0.8));
    if candidate.token == node.owner.token {
        seen.add(REPEATS, 1.0);
    }
    seen.add(SCORE, bounded(score * 0.4));
    base
}

/// Those of all that are no candidates: `left` is their probability so far, `rest` what each source leaves them.
#[inline(always)]
pub fn of_none(node: &Node, left: f32, rest: &[f32; sources::COUNT], seen: &mut Seen) -> f32 {
    for (source, &rest) in rest.iter().enumerate() {
        if node.expansion.speaks >> source & 1 != 0 {
            seen.add(PROBS + source, log_prob(rest.max(0.0)));
        }
    }
    let base = ln(left);
    seen.add(NONE_OF_THEM, 1.0);
    seen.add(PROB, base * 0.25 + 0.5);
    base
}
