//! Between sources: a softmax over learned gates, and the probability of a token as their weighted mean.

use crate::Token;
use crate::predictor::arena::{Candidate, Expansion, Origin, TokenTable, child};
use crate::predictor::overlay::Overlay;
use crate::predictor::weights::{GateCell, Model};
use crate::sources;

/// Tokens of a list (successors, feedback) become candidates from this probability of their path on. The bound must not
/// follow `max_nodes`: a sibling that is left out is missing from the sum by which the others are scaled, so a node's
/// probability would depend on how many are drafted.
const WORTH_OFFERING: f32 = 0.0006;

/// The gate of a source that lists tokens, most probable first; nothing if it lists none.
pub fn list_gate(source: usize, list: &[(Token, f32)]) -> Option<GateCell> {
    list.first().map(|&(_, peak)| Model::gate_cell(source, 0, peak))
}

/// Gives each source its weight, over those that have anything to say.
pub fn weigh(model: &Overlay, expansion: &mut Expansion) {
    let Expansion { gates, weights, speaks, .. } = expansion;
    for (source, gate) in gates.iter().enumerate() {
        *speaks |= u8::from(gate.is_some()) << source;
    }
    // alone a source has all the weight, as most do
    if speaks.is_power_of_two() {
        weights[speaks.trailing_zeros() as usize] = 1.0;
        return;
    }
    let mut total = 0.0;
    for (weight, gate) in weights.iter_mut().zip(gates) {
        if let &mut Some(cell) = gate {
            *weight = model.gate(cell).exp();
            total += *weight;
        }
    }
    weights.iter_mut().for_each(|weight| *weight /= total.max(f32::MIN_POSITIVE));
}

/// How the weights would have to move for `truth` to be more probable: by posterior less prior share of each source.
pub fn gradients<'a>(
    truth: &'a Candidate,
    expansion: &'a Expansion,
) -> impl Iterator<Item = (GateCell, f32)> + 'a {
    let shares = truth.probs.iter().zip(&expansion.weights);
    let gates = expansion.gates.iter().zip(shares);
    gates.filter_map(|(gate, (prob, weight))| gate.map(|cell| (cell, weight * prob / truth.mixed - weight)))
}

/// The source that contributes most to a candidate's probability.
pub fn carrier(candidate: &Candidate, weights: &[f32; sources::COUNT]) -> u8 {
    let parts = candidate.probs.iter().zip(weights).map(|(prob, weight)| prob * weight);
    let best = parts.enumerate().fold((0, 0.0), |best, part| if part.1 > best.1 { part } else { best });
    best.0 as u8
}

/// The probability of a candidate over all sources.
#[inline]
pub fn mixed(candidate: &Candidate, weights: &[f32; sources::COUNT]) -> f32 {
    let parts = candidate.probs.iter().zip(weights);
    parts.map(|(prob, weight)| prob * weight).sum::<f32>().min(1.0)
}

/// The children of a node in the making.
pub struct Children<'a> {
    pub node: u32,
    pub candidates: &'a mut Vec<Candidate>,
    pub origins: &'a mut Vec<Origin>,
    pub table: &'a mut TokenTable,
}

/// Adds what a source lists after a node: token, probability and class. What is not there yet becomes a candidate if it
/// is worth it; `weight` is the source's.
pub fn offer(
    source: usize,
    weight: f32,
    list: impl Iterator<Item = (Token, f32, u8)>,
    children: &mut Children,
) {
    let Children { node, candidates, origins, table } = children;
    let reach = candidates[*node as usize].path * weight;
    for (token, prob, class) in list {
        let child = if reach * prob >= WORTH_OFFERING {
            child(*node, token, candidates, origins, table)
        } else if let Ok(child) = table.find(token, candidates) {
            child
        } else {
            continue;
        };
        let candidate = &mut candidates[child as usize];
        candidate.classes[source] = class;
        candidate.probs[source] = prob;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::overlay::tests::shipped;
    use crate::sources::{FEEDBACK, NO_CLASS, REQUEST, STORE, SUCCESSORS};

    #[test]
    fn weights_are_a_softmax_over_those_who_speak() {
        let (mut model, mut expansion) = (shipped(usize::MAX), Expansion::default());
        let cells = [Model::gate_cell(REQUEST, 3, 0.5), Model::gate_cell(STORE, 2, 0.9)];
        (expansion.gates[REQUEST], expansion.gates[STORE]) = (Some(cells[0]), Some(cells[1]));
        let odds = |model: &Overlay| (model.gate(cells[0]) - model.gate(cells[1])).exp();
        weigh(&model, &mut expansion);
        assert!((expansion.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((expansion.weights[REQUEST] / expansion.weights[STORE] / odds(&model) - 1.0).abs() < 1e-5);
        assert_eq!((expansion.speaks, expansion.weights[SUCCESSORS]), (0b101, 0.0));
        // who gave the truth more than the mean gains, who gave it less loses
        let mut truth = Candidate::new(1, 0, 1);
        (truth.probs[REQUEST], truth.probs[STORE]) = (0.8, 0.1);
        truth.mixed = mixed(&truth, &expansion.weights);
        let before = odds(&model);
        let moves: Vec<_> = gradients(&truth, &expansion).collect();
        assert!(moves[0].1 > 0.0 && (moves[0].1 + moves[1].1).abs() < 1e-6);
        moves.iter().for_each(|&(cell, gradient)| model.learn_gate(cell, gradient));
        assert!(odds(&model) > before);
        assert_eq!(carrier(&truth, &[0.1, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0]), STORE as u8);
    }

    #[test]
    fn lists_add_to_candidates_and_make_those_worth_it() {
        let (mut candidates, mut origins, mut table) =
            (vec![Candidate::new(1, 0, 0)], Vec::new(), TokenTable::default());
        candidates[0].path = 0.5;
        table.clear();
        let mut children =
            Children { node: 0, candidates: &mut candidates, origins: &mut origins, table: &mut table };
        offer(FEEDBACK, 0.2, [(7, 0.4, 3)].into_iter(), &mut children);
        let improbable = WORTH_OFFERING / (0.5 * 0.2) * 0.99;
        offer(
            SUCCESSORS,
            0.2,
            [(8, 0.3, 0), (7, improbable, 0), (9, improbable, 0)].into_iter(),
            &mut children,
        );
        let found: Vec<_> =
            candidates[1..].iter().map(|child| (child.token, child.depth, child.probs[SUCCESSORS])).collect();
        assert_eq!(found, [(7, 1, improbable), (8, 1, 0.3)]);
        assert_eq!((candidates[1].classes[FEEDBACK], candidates[2].classes[FEEDBACK]), (3, NO_CLASS));
    }
}
