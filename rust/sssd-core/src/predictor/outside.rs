//! What comes from outside at a node: another drafter's tokens, and which tokens are allowed.

use crate::Token;
use crate::allowed::{ALLOWED_ROOT, Allowed, FEW};
use crate::given::{GIVEN_ROOT, Given};
use crate::index::NONE;
use crate::memory::push;
use crate::predictor::arena::{Candidate, Expansion, TokenTable, child};
use crate::predictor::guest::{Heard, Trust};
use crate::predictor::inputs::Inputs;
use crate::predictor::mix::Children;

/// Siblings never sum to more.
const MOST: f32 = 0.998;
/// Of the tokens that a guest names at a place, the first so many are heard.
const SIBLINGS: usize = 64;
/// The probability of what must not be drafted: below every floor.
const NEVER: f32 = -1.0;

/// Finds the node's place in the draft and among the rules that were given.
pub fn find_place(
    node: u32,
    candidates: &[Candidate],
    expansions: &[Expansion],
    inputs: &Inputs,
    expansion: &mut Expansion,
) {
    if let Some(given) = inputs.outside.given {
        expansion.guest = place(given, node, candidates, expansions);
    }
    if let Some(allowed) = inputs.outside.allowed {
        expansion.allowed = ALLOWED_ROOT;
        let candidate = &candidates[node as usize];
        if node != 0
            && let Some(parent) = candidates.get(candidate.parent as usize)
        {
            let above = expansions.get(parent.expansion as usize).map_or(NONE, |above| above.allowed);
            expansion.allowed = allowed.next(above, candidate.token);
        }
    }
}

/// Makes candidates of the tokens that the guest names, and of those that are allowed where these are few.
pub fn offer(inputs: &Inputs, expansion: &Expansion, children: &mut Children) {
    let Children { node, candidates, origins, table } = children;
    let mut add = |token| _ = child(*node, token, candidates, origins, table);
    if let Some(given) = inputs.outside.given {
        named(given, expansion.guest).for_each(&mut add);
    }
    if let Some(allowed) = inputs.outside.allowed {
        allowed.few(expansion.allowed).for_each(&mut add);
    }
}

/// Gives the children of a node of probability `above`, which are those from `start` on, what the guest makes of them, and
/// takes away what is not allowed.
pub fn weigh(
    inputs: &Inputs,
    (start, above): (usize, f32),
    candidates: &mut [Candidate],
    table: &TokenTable,
    heard: &mut Vec<Heard>,
    expansion: &mut Expansion,
) {
    if let Some(given) = inputs.outside.given {
        let first = heard.len() as u32;
        mix(given, expansion.guest, inputs.trust, (start, above), candidates, table, heard);
        expansion.heard = (first, heard.len() as u32);
    }
    if let Some(allowed) = inputs.outside.allowed {
        filter(allowed, expansion.allowed, above, &mut candidates[start..]);
    }
}

/// The guest's place at a node: after its parent's.
fn place(given: &Given, node: u32, candidates: &[Candidate], expansions: &[Expansion]) -> u32 {
    let candidate = &candidates[node as usize];
    match candidates.get(candidate.parent as usize).filter(|_| node != 0) {
        None => GIVEN_ROOT,
        Some(parent) => match expansions.get(parent.expansion as usize) {
            Some(above) if above.guest != NONE => given.child(above.guest, candidate.token),
            _ => NONE,
        },
    }
}

/// The tokens that the guest names at its place, to become candidates.
fn named(given: &Given, place: u32) -> impl Iterator<Item = Token> + '_ {
    given.children(place).take(SIBLINGS).map(|(token, _)| token)
}

/// Mixes what the guest names after a node of probability `above` into its children from `start` on.
fn mix(
    given: &Given,
    place: u32,
    trust: &Trust,
    (start, above): (usize, f32),
    candidates: &mut [Candidate],
    table: &TokenTable,
    heard: &mut Vec<Heard>,
) {
    let first = heard.len();
    let total: f32 =
        candidates[start..].iter().map(|child| child.path).sum::<f32>() / above.max(f32::MIN_POSITIVE);
    let rest = (1.0 - total).max(0.0);
    let (mut named, mut claimed) = (0.0, 0.0);
    for (rank, (token, prob)) in given.children(place).take(SIBLINGS).enumerate() {
        let Ok(at) = table.find(token, candidates) else { continue };
        let child = &candidates[at as usize];
        let own = (child.path / above.max(f32::MIN_POSITIVE)).min(1.0);
        let prob = given.has_probs().then_some(prob);
        let mut said = trust.hear(child.depth - 1, rank, prob, own, rest);
        said.candidate = at;
        named += own;
        claimed += said.prob;
        push(heard, said);
    }
    let fit = (MOST / claimed).min(1.0);
    let others = (1.0 - claimed * fit).max(0.0) / (1.0 - named).max(1e-3);
    candidates[start..].iter_mut().for_each(|child| child.path *= others);
    for said in &mut heard[first..] {
        said.prob *= fit;
        candidates[said.candidate as usize].path = said.prob * above;
    }
    // what was rounded, and what the sources gave beyond one
    let total: f32 = candidates[start..].iter().map(|child| child.path).sum();
    if total > above {
        candidates[start..].iter_mut().for_each(|child| child.path *= above / total);
    }
}

/// Leaves the children that are allowed, each with its probability given that no other token comes.
fn filter(allowed: &Allowed, place: u32, above: f32, children: &mut [Candidate]) {
    let Some(count) = allowed.count(place) else { return };
    let (mut held, mut lost) = (0.0, 0.0);
    for child in &mut *children {
        if allowed.allows(place, child.token) {
            held += child.path;
        } else {
            lost += child.path;
            child.path = NEVER;
        }
    }
    let rest = (above - held - lost).max(0.0);
    let left = children.iter_mut().filter(|child| child.path >= 0.0);
    if (1..=FEW).contains(&count) {
        // all of them are here, and one of them comes: each has its part of what was left to unknown tokens
        let (share, scale) = (rest / count as f32, above / (held + rest).max(f32::MIN_POSITIVE));
        left.for_each(|child| child.path = ((child.path + share) * scale).min(above));
    } else {
        let scale = above / (above - lost).max(held).max(f32::MIN_POSITIVE);
        left.for_each(|child| child.path = (child.path * scale).min(above));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allowed::Mask;

    fn filtered(probs: &[f32], above: f32, words: &[u32]) -> Vec<f32> {
        let mut allowed = Allowed::default();
        allowed.insert(&[], Mask::Words(words)).unwrap();
        let mut children: Vec<_> = (0..)
            .zip(probs)
            .map(|(token, &path)| Candidate { path, ..Candidate::new(token, 0, 1) })
            .collect();
        filter(&allowed, ALLOWED_ROOT, above, &mut children);
        children.iter().map(|child| child.path).collect()
    }

    #[test]
    fn what_is_allowed_shares_what_is_not() {
        // many are allowed: those that nobody has named keep their part
        let many = filtered(&[0.2, 0.2, 0.0], 0.8, &[0b101, u32::MAX]);
        assert!((many[0] - 0.2 * 0.8 / 0.6).abs() < 1e-6);
        assert_eq!(many[1..], [NEVER, 0.0]);
        // few are: one of them comes
        let few = filtered(&[0.2, 0.2, 0.0], 0.8, &[0b101]);
        assert!((few[0] + few[2] - 0.8).abs() < 1e-6 && few[1] == NEVER && few[2] > 0.0);
        // one is forced
        assert_eq!(filtered(&[0.3, 0.0], 0.5, &[0b10]), [NEVER, 0.5]);
        // nothing is
        assert_eq!(filtered(&[0.3, 0.2], 0.5, &[]), [NEVER, NEVER]);
    }
}
