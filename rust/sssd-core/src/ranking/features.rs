//! What the ranking stage looks at. Whoever changes what a feature means counts the network's version up.

use crate::index::NONE;
use crate::predictor::arena::{Candidate, Expansion, Tally};
use crate::predictor::inputs::Inputs;
use crate::ranking::bilinear::Said;
use crate::ranking::network::{OF_CANDIDATE, OF_NODE};
use crate::ranking::numbers::ln;
use crate::sources::{self, NO_CLASS, REQUEST, STORE};

/// Of a candidate and each source: its probability, and the class of its longest context.
const PROBS: usize = 0;
const CLASSES: usize = PROBS + sources::COUNT;
/// Its probability, whether the request holds it and how far back, how frequent it is in the corpus, whether it stands
/// for all that are no candidates, whether it repeats the node's token, and the log-bilinear score.
const PROB: usize = CLASSES + sources::COUNT;
const OCCURS: usize = PROB + 1;
const AGO: usize = PROB + 2;
const FREQUENCY: usize = PROB + 3;
const NONE_OF_THEM: usize = PROB + 4;
const REPEATS: usize = PROB + 5;
const SCORE: usize = PROB + 6;
const _: () = assert!(OF_CANDIDATE == PROB + 7);

/// Of a node and each source: its best probability, its weight in the mixture, and what it has lately given to what came
/// true.
const PEAKS: usize = 0;
const WEIGHTS: usize = PEAKS + sources::COUNT;
const LUCK: usize = WEIGHTS + sources::COUNT;
/// Depth, probability, age of the output, votes behind the longest match in request and datastore, and the sum of the
/// candidates' probabilities.
const DEPTH: usize = LUCK + sources::COUNT;
const PATH: usize = DEPTH + 1;
const AGE: usize = DEPTH + 2;
const REQUEST_VOTES: usize = DEPTH + 3;
const STORE_VOTES: usize = DEPTH + 4;
const TOTAL: usize = DEPTH + 5;
const _: () = assert!(OF_NODE == DEPTH + 6);

/// Something of each source.
pub type BySource = [f32; sources::COUNT];

/// The node whose candidates are ranked, and what they were made from.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    pub owner: Candidate,
    pub expansion: &'a Expansion,
    pub tally: &'a Tally,
    pub inputs: &'a Inputs<'a>,
}

/// A shifted logarithm of a probability, about -2 to 1.
#[inline(always)]
fn log_prob(prob: f32) -> f32 {
    ln(prob + 0.002) * 0.5 + 1.0
}

/// Those of probabilities by source, where the source says anything.
#[inline(always)]
fn log_probs(node: &Node, probs: &BySource) -> BySource {
    let mut logs = [0.0; sources::COUNT];
    for (source, (log, &prob)) in logs.iter_mut().zip(probs).enumerate() {
        // none below that of 0, nor a branch
        let says = f32::from(node.expansion.speaks >> source & 1);
        *log = log_prob(prob.max(0.0)) * says;
    }
    logs
}

/// The node's features, which all its candidates share: `peaks` are the best probabilities, `total` the sum of all.
#[inline(always)]
pub fn of_node(node: &Node, peaks: &BySource, total: f32) -> [f32; OF_NODE] {
    let Node { owner, inputs, expansion, tally, .. } = node;
    let mut row = [0.0; OF_NODE];
    row[PEAKS..WEIGHTS].copy_from_slice(&log_probs(node, peaks));
    for source in 0..sources::COUNT {
        row[WEIGHTS + source] = expansion.weights[source] * 2.0;
        row[LUCK + source] = inputs.calibration.luck()[source] * 2.0 - 0.5;
    }
    let votes = |source: usize| {
        tally.held[source].checked_ilog2().map_or(0.0, |class| tally.counts[source][class as usize])
    };
    row[DEPTH] = ln(1.0 + f32::from(owner.depth)) * 0.5;
    row[PATH] = ln(owner.path.max(1e-4)) * 0.2;
    row[AGE] = ln(1.0 + inputs.age as f32) * 0.2;
    row[REQUEST_VOTES] = ln(1.0 + votes(REQUEST)) * 0.5;
    row[STORE_VOTES] = ln(1.0 + votes(STORE)) * 0.3;
    row[TOTAL] = total.min(1.0);
    row
}

/// The logarithm of a candidate's probability so far, `prob`, and the candidate's features: `said` is what the tables say
/// of it.
#[inline(always)]
pub fn of_candidate(node: &Node, candidate: &Candidate, prob: f32, said: Said) -> (f32, [f32; OF_CANDIDATE]) {
    let mut row = [0.0; OF_CANDIDATE];
    row[PROBS..CLASSES].copy_from_slice(&log_probs(node, &candidate.probs));
    for (place, &class) in row[CLASSES..PROB].iter_mut().zip(&candidate.classes) {
        *place = if class == NO_CLASS { 0.0 } else { 0.2 + f32::from(class) * 0.1 };
    }
    let base = ln(prob.max(1e-4));
    row[PROB] = base * 0.25 + 0.5;
    let index = node.inputs.index;
    let newest = index.newest(0, &[candidate.token]);
    if newest != NONE {
        row[OCCURS] = 1.0;
        row[AGO] = ln((index.tokens().len() - newest as usize).max(1) as f32) * 0.15;
    }
    // files may say anything, numbers that are none included
    #[allow(clippy::manual_clamp)]
    let bounded = |value: f32| value.max(-2.0).min(2.0);
    row[FREQUENCY] = bounded(said.share * 0.1 + 0.8);
    row[REPEATS] = f32::from(u8::from(candidate.token == node.owner.token));
    row[SCORE] = bounded(said.score * 0.4);
    (base, row)
}

/// The same of all that are no candidates: `left` is their probability so far, `rest` what each source leaves them.
#[inline(always)]
pub fn of_none(node: &Node, left: f32, rest: &BySource) -> (f32, [f32; OF_CANDIDATE]) {
    let mut row = [0.0; OF_CANDIDATE];
    row[PROBS..CLASSES].copy_from_slice(&log_probs(node, rest));
    let base = ln(left);
    row[NONE_OF_THEM] = 1.0;
    row[PROB] = base * 0.25 + 0.5;
    (base, row)
}
