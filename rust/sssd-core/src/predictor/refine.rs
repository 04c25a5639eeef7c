//! After mixing: the share of tokens with such a probability and such support that came true, in general and in this
//! request.

use crate::index::NONE;
use crate::predictor::arena::{Candidate, Expansion};
use crate::predictor::inputs::Inputs;
use crate::predictor::mix;
use crate::predictor::support::Occurrence;
use crate::sources::{LOWER, NO_CLASS, REQUEST, request};

/// Below this mixed probability nothing is refined, and nothing learned about refining.
pub const LEAST_REFINED: f32 = 0.003;

/// Gives the children of a node their probabilities at the node: mixed, refined and, if `corrects`, corrected. Returns
/// their sum.
pub fn refine(children: &mut [Candidate], expansion: &Expansion, inputs: &Inputs, corrects: bool) -> f32 {
    let mut total = 0.0;
    for candidate in children {
        candidate.mixed = mix::mixed(candidate, &expansion.weights);
        candidate.path = candidate.mixed;
        if candidate.mixed >= LEAST_REFINED {
            candidate.occurrence = occurrence(candidate, inputs);
            let support = candidate.support(expansion.speaks);
            candidate.refined = inputs.model.refine(support.row(), candidate.mixed);
            candidate.path = if corrects {
                inputs.calibration.correct(support.kind(), candidate.refined)
            } else {
                candidate.refined
            };
        }
        total += candidate.path;
    }
    total
}

/// Makes probabilities at a node, which sum to `total`, those of paths: parts of the node's, `above`, and at most all of
/// it.
pub fn scale(children: &mut [Candidate], above: f32, total: f32) {
    let scale = above / total.max(1.0);
    children.iter_mut().for_each(|candidate| candidate.path *= scale);
}

/// How recently a token occurred in the request, if no context of the request speaks for it.
fn occurrence(candidate: &Candidate, inputs: &Inputs) -> Occurrence {
    if candidate.classes[REQUEST] != NO_CLASS || candidate.classes[LOWER] != NO_CLASS {
        return Occurrence::Never;
    }
    match inputs.index.newest(0, &[candidate.token]) {
        NONE => Occurrence::Never,
        newest if newest < request::earliest(inputs.index, 1) => Occurrence::Never,
        newest => Occurrence::ago(inputs.index.tokens().len() - newest as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::inputs::tests::Parts;
    use crate::sources::{STORE, SUCCESSORS};

    fn refined(probs: &[f32], above: f32, tokens: &[u32]) -> Vec<Candidate> {
        let parts = Parts::new(tokens);
        let mut expansion = Expansion { speaks: 1 << SUCCESSORS | 1 << STORE, ..Expansion::default() };
        expansion.weights[SUCCESSORS] = 1.0;
        let mut children: Vec<_> = (0..)
            .zip(probs)
            .map(|(token, &prob)| {
                let mut child = Candidate::new(token, 0, 1);
                (child.probs[SUCCESSORS], child.classes[SUCCESSORS]) = (prob, 0);
                child
            })
            .collect();
        let total = refine(&mut children, &expansion, &parts.inputs(), true);
        scale(&mut children, above, total);
        children
    }

    #[test]
    fn siblings_sum_to_at_most_their_parent() {
        let children = refined(&[0.9; 8], 0.5, &[]);
        assert!((children.iter().map(|child| child.path).sum::<f32>() - 0.5).abs() < 1e-6);
        // of few the sum is left as it is
        let one = refined(&[0.2], 0.5, &[]);
        assert!(one[0].path < 0.5 && (one[0].path - 0.5 * refined(&[0.2], 1.0, &[])[0].path).abs() < 1e-7);
    }

    #[test]
    fn the_improbable_keeps_its_probability() {
        let children = refined(&[LEAST_REFINED * 0.9, 0.3], 1.0, &[]);
        assert_eq!((children[0].path, children[0].refined), (children[0].mixed, 0.0));
        assert!(children[1].refined > 0.0);
    }

    #[test]
    fn tokens_that_the_request_holds_are_known_by_their_distance() {
        let text: Vec<u32> =
            [1].into_iter().chain(vec![9; 600]).chain([2]).chain(vec![9; 100]).chain([3, 9]).collect();
        let children = refined(&[0.2; 4], 1.0, &text);
        let ago: Vec<_> = children.iter().map(|child| child.occurrence as usize).collect();
        assert_eq!(
            ago,
            [Occurrence::Never, Occurrence::Long, Occurrence::Recent, Occurrence::Just].map(|o| o as usize)
        );
    }
}
