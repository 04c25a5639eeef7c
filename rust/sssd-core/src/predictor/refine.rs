//! After mixing: the share of tokens with such a probability and such support that came true, in general and in this
//! request.

use crate::index::NONE;
use crate::predictor::arena::{Candidate, Expansion};
use crate::predictor::inputs::Inputs;
use crate::predictor::mix;
use crate::predictor::support::Occurrence;
use crate::sources::{LOWER, NO_CLASS, REQUEST};

/// Below this mixed probability nothing is refined, and nothing learned about refining.
pub const LEAST_REFINED: f32 = 0.003;

/// Gives the children of a node of probability `above` their own: mixed, refined, corrected, and scaled so that they sum
/// to at most their parent's.
pub fn refine(children: &mut [Candidate], above: f32, expansion: &Expansion, inputs: &Inputs) {
    let mut total = 0.0;
    for candidate in &mut *children {
        candidate.mixed = mix::mixed(candidate, &expansion.weights);
        candidate.path = candidate.mixed;
        if candidate.mixed >= LEAST_REFINED {
            candidate.occurrence = occurrence(candidate, inputs);
            let support = candidate.support(expansion.speaks);
            candidate.refined = inputs.model.refine(support.row(), candidate.mixed);
            candidate.path = inputs.calibration.correct(support.kind(), candidate.refined);
        }
        total += candidate.path;
    }
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
        newest => Occurrence::ago(inputs.index.tokens().len() - newest as usize),
    }
}
