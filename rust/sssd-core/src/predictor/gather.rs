//! Where the evidence for what follows a node is looked up. Most samples come from the root: those of a node are its
//! parent's that agree with its token.

use crate::Token;
use crate::index::{Index, NONE};
use crate::predictor::arena::{Candidate, Sample, Scratch};
use crate::predictor::inputs::Inputs;
use crate::sources::feedback::{Distribution, FEEDBACK_ORDERS};
use crate::sources::{
    ALIGNED, Evidence, LOWER, LookedUp, MAX_LENGTH, NO_CLASS, REQUEST, SOURCES, lower, request,
};

/// Less probable nodes are not worth a look-up of short contexts. (At every node: +0.3 % at 64 nodes, 1.7 times the time;
/// at nodes of at least 0.02: +0.2 %, a tenth more time. A bound that follows `max_nodes` breaks the promise that trees
/// are prefixes of larger ones.)
const WORTH_LOWER: f32 = 0.04;
/// Class of matches that need no shorter contexts beside them.
const COPY: u8 = 7;
/// Tokens read from a corpus at first: most samples disagree early.
const FIRST_READ: usize = 4;

/// Less probable nodes of a guest are not worth a look-up in the corpora, and no draft has more of these look-ups.
const WORTH_LOOKUP: f32 = 0.1;
const LOOKUPS: usize = 2;

/// Looks up samples for the root, or short contexts for another node. Where a guest has left the samples (`astray`),
/// longer contexts are looked up anew.
pub fn samples(node: u32, candidates: &[Candidate], astray: bool, inputs: &Inputs, scratch: &mut Scratch) {
    if node == 0 {
        return root_samples(inputs, scratch);
    }
    if astray && scratch.origins[node as usize].samples == NONE {
        return astray_samples(node, candidates, inputs, scratch);
    }
    let class = candidates[node as usize].classes[REQUEST];
    let copied = class != NO_CLASS && class >= COPY;
    if scratch.origins[node as usize].lower != NONE && !copied {
        lower_samples(node, candidates, inputs.index, scratch);
    }
}

fn root_samples(inputs: &Inputs, scratch: &mut Scratch) {
    let end = inputs.index.tokens().len() as u32;
    request::occurrences(inputs.index, |position, length| {
        scratch.add_sample(0, Sample::in_request(REQUEST, position + 1, end, length as u16));
    });
    inputs.aligned.continuations(inputs.index, |at| {
        scratch.add_sample(0, Sample::in_request(ALIGNED, at.position, at.end, at.length));
    });
    corpora_samples(0, &inputs.index.tokens()[inputs.predicted..], inputs, scratch);
}

/// Looks the end of a context up in all corpora, for a node.
fn corpora_samples(node: u32, context: &[Token], inputs: &Inputs, scratch: &mut Scratch) {
    for (source, row) in SOURCES.iter().enumerate().filter(|(_, row)| row.looked_up == LookedUp::Root) {
        if let (&Evidence::Corpus { longest, samples }, Some(corpus)) = (&row.evidence, inputs.corpus(source))
        {
            let context = &context[context.len().saturating_sub(longest)..];
            let mut matches = std::mem::take(&mut scratch.matches);
            matches.clear();
            if corpus.domains() > 1 {
                let weights = inputs.calibration.domains.weights();
                corpus.matches_by_domain(context, longest, samples, weights, &mut matches);
            } else {
                corpus.matches(context, longest, samples, &mut matches);
            }
            for found in &matches {
                let mut sample = Sample::in_corpus(source, found);
                sample.read_on(&mut scratch.read, corpus, FIRST_READ);
                scratch.add_sample(node, sample);
            }
            scratch.matches = matches;
        }
    }
}

fn astray_samples(node: u32, candidates: &[Candidate], inputs: &Inputs, scratch: &mut Scratch) {
    let mut context = [0; MAX_LENGTH];
    let path = newest_first(node, candidates, inputs);
    let known = context.iter_mut().zip(path).map(|(to, from)| *to = from).count();
    request::occurrences_of(inputs.index, &context[..known], |position, length| {
        let end = inputs.index.tokens().len() as u32;
        scratch.add_sample(node, Sample::in_request(REQUEST, position + 1, end, length as u16));
    });
    if candidates[node as usize].path >= WORTH_LOOKUP && scratch.lookups < LOOKUPS {
        scratch.lookups += 1;
        context[..known].reverse();
        corpora_samples(node, &context[..known], inputs, scratch);
    }
}

fn lower_samples(node: u32, candidates: &[Candidate], index: &Index, scratch: &mut Scratch) {
    let own = &candidates[node as usize];
    let above = &candidates[own.parent as usize];
    let before = candidates.get(above.parent as usize).map_or(Token::MAX, |before| before.token);
    let newest = scratch.origins[node as usize].lower;
    let end = index.tokens().len() as u32;
    lower::occurrences(index, own.depth, newest, [own.token, above.token, before], |position, length| {
        scratch.add_sample(node, Sample::in_request(LOWER, position + 1, end, length as u16));
    });
}

/// Where the short context of a child with this probability begins to be looked up: nowhere, if it is not worth it.
/// Asked for when the child becomes a candidate, so that the processor fetches the place before it is needed.
pub fn newest_lower(child: &Candidate, above: Token, index: &Index) -> u32 {
    if child.path >= WORTH_LOWER { lower::newest(index, child.depth, child.token, above) } else { NONE }
}

/// The tokens of a node's context: its own, those of its path, those of the text.
pub fn newest_first<'a>(
    mut node: u32,
    candidates: &'a [Candidate],
    inputs: &Inputs<'a>,
) -> impl Iterator<Item = Token> + 'a {
    let path = std::iter::from_fn(move || {
        // the root is the sequence's last token
        let candidate = candidates.get(node as usize).filter(|_| node != 0)?;
        node = candidate.parent;
        Some(candidate.token)
    });
    path.chain(inputs.index.tokens()[inputs.predicted..].iter().rev().copied())
}

/// Lists what follows `token` in the datastore, if there is one.
pub fn successors(token: Token, inputs: &Inputs, out: &mut Vec<(Token, f32)>) {
    out.clear();
    let Some(store) = inputs.store else { return };
    if store.domains() > 1 {
        store.successors_by_domain(token, inputs.calibration.domains.weights(), out);
    } else {
        store.successors(token, out);
    }
}

/// What the target held probable after the ends of a node's context, by their number of tokens.
pub fn feedback(
    node: u32,
    candidates: &[Candidate],
    inputs: &Inputs,
) -> [Option<Distribution>; FEEDBACK_ORDERS.len()] {
    let mut found = [None; FEEDBACK_ORDERS.len()];
    inputs.feedback.find(newest_first(node, candidates, inputs), &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::inputs::tests::Parts;

    fn expanded(parts: &Parts, path: f32, class: u8) -> Vec<(u32, u16)> {
        let mut scratch = Scratch::default();
        let mut candidates = vec![Candidate::new(5, NONE, 0), Candidate::new(6, 0, 1)];
        (candidates[1].path, candidates[1].classes[REQUEST]) = (path, class);
        scratch.start();
        let lower = newest_lower(&candidates[1], 5, &parts.index);
        scratch.origins.push(crate::predictor::arena::Origin { samples: NONE, lower });
        samples(1, &candidates, false, &parts.inputs(), &mut scratch);
        scratch.samples.iter().map(|sample| (sample.cursor, sample.length)).collect()
    }

    #[test]
    fn short_contexts_are_looked_up_where_they_are_worth_it_and_new() {
        // 6 after 5 is on the node's path; 6 after 4 and at the start is not
        let parts = Parts::new(&[6, 1, 5, 6, 2, 4, 6, 3, 5]);
        assert_eq!(expanded(&parts, WORTH_LOWER, NO_CLASS), [(7, 1), (1, 1)]);
        assert_eq!(expanded(&parts, WORTH_LOWER, COPY - 1), [(7, 1), (1, 1)]);
        assert_eq!(expanded(&parts, WORTH_LOWER, COPY), []);
        assert_eq!(expanded(&parts, WORTH_LOWER * 0.99, NO_CLASS), []);
    }

    #[test]
    fn the_root_has_what_followed_the_end_of_the_context() {
        let parts = Parts::new(&[1, 2, 3, 9, 2, 3, 8, 3]);
        let mut scratch = Scratch::default();
        scratch.start();
        samples(0, &[Candidate::new(3, NONE, 0)], false, &parts.inputs(), &mut scratch);
        let found: Vec<_> = scratch.samples.iter().map(|sample| (sample.cursor, sample.length)).collect();
        assert_eq!(found, [(6, 1), (3, 1)]);
    }
}
