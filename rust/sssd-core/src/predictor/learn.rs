//! Learning from the token that the target produced after an expanded node.

use crate::Token;
use crate::predictor::arena::{Arena, Candidate, Expansion};
use crate::predictor::correct::Calibration;
use crate::predictor::mix;
use crate::predictor::overlay::Overlay;
use crate::predictor::refine::LEAST_REFINED;
use crate::sources::{FEEDBACK, NO_CLASS};

/// Learns from `token`, which came after the node with this expansion, in an output of `age` tokens. Returns the
/// candidate for it, if there was one.
pub fn learn(
    token: Token,
    expansion: &Expansion,
    arena: &Arena,
    age: usize,
    model: &mut Overlay,
    calibration: &mut Calibration,
) -> Option<u32> {
    let (first, end) = expansion.children;
    let children = &arena.candidates[first as usize..end as usize];
    let truth = children.iter().position(|child| child.token == token);
    learn_escapes(token, truth.map(|at| &children[at]), expansion, arena, model);
    if let Some(truth) = truth.map(|at| &children[at]).filter(|truth| truth.mixed > 0.0) {
        mix::gradients(truth, expansion).for_each(|(cell, gradient)| model.learn_gate(cell, gradient));
    }
    for candidate in children.iter().filter(|candidate| candidate.mixed >= LEAST_REFINED) {
        let support = candidate.support(expansion.speaks);
        let came_true = candidate.token == token;
        model.learn_refinement(support.row(), candidate.mixed, came_true);
        let error = calibration.note(support.kind(), candidate.refined, came_true);
        model.learn_age(age, support.kind(), error);
    }
    calibration.learn();
    if let Some(at) = truth {
        let (start, end) = expansion.voices;
        calibration.domains.learn(&arena.voices[start as usize..end as usize], first + at as u32);
    }
    calibration.note_sources(expansion.speaks, truth.map(|at| &children[at].probs));
    truth.map(|at| first + at as u32)
}

/// Of each source, only down to the longest context that held the truth: shorter ones were not asked.
fn learn_escapes(
    token: Token,
    truth: Option<&Candidate>,
    expansion: &Expansion,
    arena: &Arena,
    model: &mut Overlay,
) {
    let said = &arena.said[expansion.said.0 as usize..expansion.said.1 as usize];
    for (source, bounds) in expansion.contexts.windows(2).enumerate() {
        // what is not worth a node may still have been said
        let held = match source {
            FEEDBACK => said.iter().find(|said| said.0 == token).map_or(NO_CLASS, |said| said.2),
            _ => truth.map_or(NO_CLASS, |truth| truth.classes[source]),
        };
        for &(class, cell) in &arena.contexts[bounds[0] as usize..bounds[1] as usize] {
            let escaped = held == NO_CLASS || held < class;
            model.learn_escape(cell, escaped);
            if !escaped {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::overlay::tests::shipped;
    use crate::predictor::weights::Model;
    use crate::sources::{REQUEST, STORE};

    /// Two candidates, 5 and 6, the first with contexts of classes 4 and 2 in the request.
    fn expanded() -> (Arena, Expansion, [crate::predictor::weights::EscapeCell; 3]) {
        let mut arena = Arena::default();
        arena.candidates.extend([Candidate::new(1, 0, 0), Candidate::new(5, 0, 1), Candidate::new(6, 0, 1)]);
        let cells = [4, 2, 1].map(|class| Model::escape_cell(REQUEST, class, 3.0, 2));
        arena.contexts.extend([(4, cells[0]), (2, cells[1]), (1, cells[2])]);
        let mut expansion = Expansion { children: (1, 3), ..Expansion::default() };
        expansion.contexts[1..].fill(3);
        (expansion.gates[REQUEST], expansion.gates[STORE]) =
            (Some(Model::gate_cell(REQUEST, 4, 0.6)), Some(Model::gate_cell(STORE, 2, 0.3)));
        (expansion.weights[REQUEST], expansion.weights[STORE], expansion.speaks) = (0.5, 0.5, 0b101);
        for (candidate, (class, probs)) in
            arena.candidates[1..].iter_mut().zip([(2, [0.6, 0.1]), (4, [0.2, 0.7])])
        {
            candidate.classes[REQUEST] = class;
            (candidate.probs[REQUEST], candidate.probs[STORE]) = (probs[0], probs[1]);
            candidate.mixed = mix::mixed(candidate, &expansion.weights);
            candidate.refined = candidate.mixed;
        }
        (arena, expansion, cells)
    }

    fn learned(token: Token) -> (Option<u32>, [f32; 3], [f32; 2], [f32; 2]) {
        let (arena, expansion, cells) = expanded();
        let (before, mut model, mut calibration) =
            (shipped(usize::MAX), shipped(usize::MAX), Calibration::default());
        calibration.start(&before.ages(0));
        let followed = learn(token, &expansion, &arena, 0, &mut model, &mut calibration);
        let gates = [expansion.gates[REQUEST], expansion.gates[STORE]];
        let refined = |model: &Overlay, at: usize| {
            let candidate = &arena.candidates[at];
            model.refine(candidate.support(expansion.speaks).row(), candidate.mixed)
        };
        (
            followed,
            cells.map(|cell| model.escape(cell) - before.escape(cell)),
            gates.map(|gate| gate.map_or(0.0, |cell| model.gate(cell) - before.gate(cell))),
            [1, 2].map(|at| refined(&model, at) - refined(&before, at)),
        )
    }

    #[test]
    fn escapes_are_learned_down_to_the_context_that_held_the_truth() {
        // it followed the context of class 2: the longer one escaped, the shorter was not asked
        let [long, held, shorter] = learned(5).1;
        assert!(long > 0.0 && held < 0.0 && shorter == 0.0);
        let [long, held, shorter] = learned(6).1;
        assert!(long < 0.0 && held == 0.0 && shorter == 0.0);
        assert!(learned(9).1.iter().all(|&change| change > 0.0));
    }

    #[test]
    fn gates_move_towards_who_gave_the_truth_more() {
        let [request, store] = learned(5).2;
        assert!(request > 0.0 && store < 0.0);
        let [request, store] = learned(6).2;
        assert!(request < 0.0 && store > 0.0);
        assert_eq!(learned(9).2, [0.0; 2]);
    }

    #[test]
    fn refinements_move_towards_the_outcome() {
        let [five, six] = learned(5).3;
        assert!(five > 0.0 && six < 0.0);
        assert_eq!((learned(5).0, learned(6).0, learned(9).0), (Some(1), Some(2), None));
        assert!(learned(9).3.iter().all(|&change| change < 0.0));
    }
}
