//! Within a source: prediction by partial matching over match lengths `k`,
//! `p_k(t) = (1 - e_k) c_k(t) / n_k + e_k p_{k-1}(t)`, with learned escapes `e_k`.

use crate::Token;
use crate::memory::push;
use crate::predictor::arena::{Candidate, Expansion, Tally, Voice, Vote};
use crate::predictor::overlay::Overlay;
use crate::predictor::weights::{EscapeCell, Model};
use crate::sources::feedback::{Distribution, FEEDBACK_ORDERS};
use crate::sources::{CLASSES, FEEDBACK, SAMPLED, SOURCES, STORE};

/// Class and cell of the escape of each context, source after source, longest first.
type Contexts = Vec<(u8, EscapeCell)>;

/// Turns votes into the probability that each sampled source gives each candidate. What the datastore's domains say is
/// noted in `voices`, if there are several.
pub fn blend(
    votes: &[Vote],
    tally: &Tally,
    model: &Overlay,
    candidates: &mut [Candidate],
    contexts: &mut Contexts,
    mut voices: Option<&mut Vec<Voice>>,
    expansion: &mut Expansion,
) {
    let mut values = [[0.0f32; CLASSES]; SAMPLED];
    for (source, values) in values.iter_mut().enumerate() {
        expansion.contexts[source] = contexts.len() as u32;
        if tally.held[source] != 0 {
            weigh_votes(source, tally, model, values, contexts);
        }
    }
    expansion.contexts[SAMPLED..].fill(contexts.len() as u32);
    let mut peaks = [0.0f32; SAMPLED];
    for vote in votes {
        let source = usize::from(vote.source);
        let prob = &mut candidates[vote.candidate as usize].probs[source];
        *prob += vote.weight * values[source][usize::from(vote.class)];
        if let Some(voices) = voices.as_deref_mut().filter(|_| source == STORE) {
            let Vote { candidate, weight, class, domain, .. } = *vote;
            push(voices, Voice { candidate, weight, class, domain });
        }
        peaks[source] = peaks[source].max(*prob);
    }
    for (source, peak) in peaks.into_iter().enumerate() {
        if let Some(longest) = tally.held[source].checked_ilog2() {
            expansion.gates[source] = Some(Model::gate_cell(source, longest as usize, peak));
        }
    }
}

/// What the vote of one occurrence of each class is worth.
fn weigh_votes(
    source: usize,
    tally: &Tally,
    model: &Overlay,
    values: &mut [f32; CLASSES],
    contexts: &mut Contexts,
) {
    let nested = SOURCES[source].nested;
    let (mut count, mut seen, mut rest) = (0.0, 0, 1.0);
    let mut left = tally.held[source];
    while let Some(class) = left.checked_ilog2().map(|class| class as usize) {
        left ^= 1 << class;
        count = if nested { count + tally.counts[source][class] } else { tally.counts[source][class] };
        seen += tally.distinct[source][class];
        let cell = Model::escape_cell(source, class, count, seen);
        let escape = model.escape(cell);
        if count < 1.0 {
            // not even one occurrence that counts whole: as much less to be trusted, and no lesson
            values[class] = rest * (1.0 - escape);
            rest *= 1.0 - count * (1.0 - escape);
            continue;
        }
        values[class] = rest * (1.0 - escape) / count;
        rest *= escape;
        push(contexts, (class as u8, cell));
    }
    // an occurrence of a longer context is one of every shorter context as well, and votes there too
    if nested {
        let (mut left, mut shorter) = (tally.held[source], 0.0);
        while left != 0 {
            let class = left.trailing_zeros() as usize;
            left &= left - 1;
            values[class] += shorter;
            shorter = values[class];
        }
    }
}

/// Blends what the target held probable after contexts of several lengths, and what it lately held probable anywhere
/// (`recent`, most probable first), which counts as a context of no tokens.
pub fn blend_feedback(
    found: &[Option<Distribution>; FEEDBACK_ORDERS.len()],
    recent: &[(Token, f32)],
    model: &Overlay,
    said: &mut Vec<(Token, f32, u8)>,
    contexts: &mut Contexts,
    expansion: &mut Expansion,
) {
    let (start, first) = (said.len(), contexts.len());
    let mut rest = 1.0;
    let mut blend =
        |class: u8, cell: EscapeCell, total: f32, tokens: &mut dyn Iterator<Item = (Token, f32)>| {
            let escape = model.escape(cell);
            for (token, prob) in tokens {
                let value = rest * (1.0 - escape) * prob / total;
                match said[start..].iter_mut().find(|held| held.0 == token) {
                    Some(held) => held.1 += value,
                    None => push(said, (token, value, class)),
                }
            }
            rest *= escape;
            push(contexts, (class, cell));
        };
    for (class, known) in found.iter().enumerate().rev() {
        if let Some(known) = known {
            let cell = Model::feedback_cell(class + 1, known.writes, known.probs[0]);
            blend(class as u8 + 1, cell, known.probs.iter().sum(), &mut known.tokens());
        }
    }
    if let Some(&(_, peak)) = recent.first() {
        let total: f32 = recent.iter().map(|held| held.1).sum();
        let cell = Model::feedback_cell(0, (total * 16.0) as u8, peak / total);
        blend(0, cell, total, &mut recent.iter().copied());
    }
    expansion.said = (start as u32, said.len() as u32);
    expansion.contexts[FEEDBACK + 1] = contexts.len() as u32;
    if let Some(&(class, _)) = contexts.get(first) {
        let peak = said[start..].iter().map(|&(_, prob, _)| prob).fold(0.0, f32::max);
        expansion.gates[FEEDBACK] = Some(Model::gate_cell(FEEDBACK, usize::from(class), peak));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::overlay::tests::shipped;
    use crate::sources::{LIVE, REQUEST};

    /// The probabilities of two tokens: one was seen twice after a context of class 3 and once after class 1, the other
    /// once after class 1.
    fn blended(source: usize) -> ([f32; 2], Expansion, Contexts) {
        let mut tally = Tally::default();
        (tally.counts[source][3], tally.distinct[source][3]) = (2.0, 1);
        (tally.counts[source][1], tally.distinct[source][1]) = (2.0, 1);
        tally.held[source] = 0b1010;
        let vote = |candidate, class| Vote { candidate, weight: 1.0, source: source as u8, class, domain: 0 };
        let votes = [vote(0, 3), vote(0, 3), vote(0, 1), vote(1, 1)];
        let mut candidates = [Candidate::new(5, 0, 1), Candidate::new(6, 0, 1)];
        let (mut contexts, mut expansion) = (Vec::new(), Expansion::default());
        blend(&votes, &tally, &shipped(0), &mut candidates, &mut contexts, None, &mut expansion);
        (candidates.map(|candidate| candidate.probs[source]), expansion, contexts)
    }

    #[test]
    fn longer_contexts_come_first_and_pass_on_what_escapes() {
        let model = shipped(0);
        for source in [REQUEST, LIVE, STORE] {
            let (probs, expansion, contexts) = blended(source);
            let nested = source != STORE;
            let count = if nested { 4.0 } else { 2.0 };
            let cells = [Model::escape_cell(source, 3, 2.0, 1), Model::escape_cell(source, 1, count, 2)];
            assert_eq!(contexts, [(3, cells[0]), (1, cells[1])]);
            let [long, short] = cells.map(|cell| model.escape(cell));
            let votes_of_first = if nested { 3.0 } else { 1.0 };
            let first = (1.0 - long) + long * (1.0 - short) * votes_of_first / count;
            assert!((probs[0] - first).abs() < 1e-6, "{source}: {probs:?}");
            assert!((probs[1] - long * (1.0 - short) / count).abs() < 1e-6);
            assert!((probs.iter().sum::<f32>() - (1.0 - long * short)).abs() < 1e-6);
            assert_eq!(expansion.gates[source], Some(Model::gate_cell(source, 3, probs[0])));
        }
    }

    #[test]
    fn less_than_an_occurrence_is_worth_as_much_less_and_teaches_nothing() {
        let mut tally = Tally::default();
        (tally.counts[STORE][3], tally.distinct[STORE][3], tally.held[STORE]) = (0.25, 1, 0b1010);
        (tally.counts[STORE][1], tally.distinct[STORE][1]) = (2.0, 1);
        let vote =
            |candidate, class, weight| Vote { candidate, weight, source: STORE as u8, class, domain: 1 };
        let votes = [vote(0, 3, 0.25), vote(1, 1, 2.0)];
        let mut candidates = [Candidate::new(5, 0, 1), Candidate::new(6, 0, 1)];
        let (mut contexts, mut voices, mut expansion) = (Vec::new(), Vec::new(), Expansion::default());
        let model = shipped(0);
        blend(&votes, &tally, &model, &mut candidates, &mut contexts, Some(&mut voices), &mut expansion);
        let [long, short] = [(3, 0.25, 1), (1, 2.0, 2)]
            .map(|(class, count, seen)| Model::escape_cell(STORE, class, count, seen));
        let held = 0.25 * (1.0 - model.escape(long));
        let [first, second] = [0, 1].map(|at| candidates[at].probs[STORE]);
        assert!((first - held).abs() < 1e-6);
        assert!((second - (1.0 - held) * (1.0 - model.escape(short))).abs() < 1e-6);
        assert_eq!(contexts, [(1, short)]);
        let said: Vec<_> = voices.iter().map(|v| (v.candidate, v.class, v.domain, v.weight)).collect();
        assert_eq!(said, [(0, 3, 1, 0.25), (1, 1, 1, 2.0)]);
    }

    #[test]
    fn feedback_is_blended_in_the_same_way_and_recent_tokens_come_last() {
        let model = shipped(0);
        let known = |ids: [Token; 2], probs: [f32; 2]| {
            let mut known = Distribution { writes: 3, ..Distribution::default() };
            known.ids[..2].copy_from_slice(&ids);
            known.probs[..2].copy_from_slice(&probs);
            Some(known)
        };
        let found = [known([1, 2], [0.5, 0.3]), None, known([2, 3], [0.6, 0.2]), None];
        let (mut said, mut contexts, mut expansion) = (vec![(9, 0.1, 0)], Vec::new(), Expansion::default());
        blend_feedback(&found, &[(4, 0.5)], &model, &mut said, &mut contexts, &mut expansion);
        let cells = [
            Model::feedback_cell(3, 3, 0.6),
            Model::feedback_cell(1, 3, 0.5),
            Model::feedback_cell(0, 8, 1.0),
        ];
        assert_eq!(contexts, [(3, cells[0]), (1, cells[1]), (0, cells[2])]);
        let [a, b, c] = cells.map(|cell| model.escape(cell));
        let expected = [
            (2, (1.0 - a) * 0.75 + a * (1.0 - b) * 0.375, 3),
            (3, (1.0 - a) * 0.25, 3),
            (1, a * (1.0 - b) * 0.625, 1),
            (4, a * b * (1.0 - c), 0),
        ];
        assert_eq!((expansion.said, said.len()), ((1, 5), 5));
        for (found, expected) in said[1..].iter().zip(expected) {
            assert_eq!((found.0, found.2), (expected.0, expected.2));
            assert!((found.1 - expected.1).abs() < 1e-6);
        }
    }
}
