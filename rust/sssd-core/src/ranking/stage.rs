//! The stage at a node: which candidates are scored, and what becomes of their probabilities.

use pulp::{Arch, NullaryFnOnce};

use crate::memory::push;
use crate::predictor::arena::{Candidate, Expansion, Tally};
use crate::predictor::gather;
use crate::predictor::inputs::Inputs;
use crate::predictor::refine::LEAST_REFINED;
use crate::ranking::bilinear::{self, CONTEXT, Topic};
use crate::ranking::features::{self, Node};
use crate::ranking::network::{FEATURES, Network, Ranking, Seen};
use crate::ranking::record::{Ranked, RankingRecord};
use crate::{Token, sources};

/// Nodes less probable are not worth the time. Like the others, this bound does not follow `max_nodes`: trees are
/// prefixes of larger ones.
const WORTH_RANKING: f32 = 0.05;
/// Candidates whose path is less probable keep their share.
const WORTH_SCORING: f32 = 0.002;
/// Successors of the node's token over which scores are normalised.
const NORMALISED: usize = 8;
/// The least probability of all that are no candidates.
const LEAST_LEFT: f32 = 0.003;
/// No ranked probability is closer to 0 or 1.
const LEAST_RANKED: f32 = 1e-6;
/// Bound of a logarithm of odds.
const FURTHEST: f32 = 30.0;

/// What a draft keeps for ranking from node to node.
#[derive(Clone, Default)]
pub struct Room {
    pub topic: Topic,
    /// Of the node at hand: candidates and scores.
    scores: Vec<(u32, f32)>,
    /// What is seen, for learning a network.
    pub record: Option<Box<RankingRecord>>,
}

impl Room {
    /// Bytes beyond its own size.
    pub fn memory_bytes(&self) -> usize {
        self.scores.capacity() * size_of::<(u32, f32)>()
    }
}

/// The work at a node.
struct Stage<'a> {
    node: Node<'a>,
    children: &'a mut [Candidate],
    /// The last tokens of the node's path and of the text before it, the node's own first.
    last: &'a [Token],
    successors: &'a [(Token, f32)],
    network: &'a Network,
    room: &'a mut Room,
}

/// What the candidates leave: the probability of all tokens that are none of them, that of those which are not scored,
/// and of each source what it does not give to any.
struct Rest {
    left: f32,
    others: f32,
    sources: [f32; sources::COUNT],
}

/// Begins a draft: the topic is that of the text before it.
pub fn start(room: &mut Room, inputs: &Inputs) {
    if let Some(Ranking { tables, .. }) = inputs.ranking {
        room.topic.follow(tables, &inputs.index.tokens()[inputs.predicted..]);
    }
}

/// Ranks the candidates of `node`, which are those from `start` on and have been refined, if it is worth it.
pub fn rank(
    node: u32,
    start: usize,
    candidates: &mut [Candidate],
    (expansion, tally): (&Expansion, &Tally),
    successors: &[(Token, f32)],
    inputs: &Inputs,
    room: &mut Room,
) {
    let Some(Ranking { network, tables }) = inputs.ranking else { return };
    let owner = candidates[node as usize];
    if owner.path < WORTH_RANKING || start == candidates.len() {
        return;
    }
    let mut last = [0; CONTEXT];
    let before = gather::newest_first(node, candidates, inputs);
    let context = last.iter_mut().zip(before).map(|(place, token)| *place = token).count();
    let node = Node { owner, expansion, tally, inputs, tables };
    let (children, last) = (&mut candidates[start..], &last[..context]);
    Arch::new().dispatch(Stage { node, children, last, successors, network, room });
}

/// A candidate's probability before this request's correction.
#[inline(always)]
fn uncorrected(candidate: &Candidate) -> f32 {
    if candidate.mixed >= LEAST_REFINED { candidate.refined } else { candidate.mixed }
}

impl NullaryFnOnce for Stage<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        let total: f32 = self.children.iter().map(uncorrected).sum();
        let squash = 1.0 / total.max(1.0);
        let least = WORTH_SCORING / self.node.owner.path;
        let mut scores = std::mem::take(&mut self.room.scores);
        scores.clear();
        for (at, child) in (0u32..).zip(self.children.iter()) {
            if child.mixed >= LEAST_REFINED && uncorrected(child) * squash >= least {
                push(&mut scores, (at, 0.0));
            }
        }
        if !scores.is_empty() {
            self.bilinear(&mut scores);
            let rest = self.rest(&scores, squash);
            let seen = self.room.record.is_some().then(|| self.seen(&scores, total, squash, &rest));
            let none = self.network(&mut scores, total, squash, &rest);
            self.share_out(&mut scores, none + rest.others, squash);
            if let (Some(mut seen), Some(record)) = (seen, &mut self.room.record) {
                seen.given.extend(scores.iter().map(|score| score.1));
                record.nodes.push(seen);
            }
        }
        self.room.scores = scores;
    }
}

impl Stage<'_> {
    /// Sets the log-bilinear scores, relative to those of the successors in the mean.
    #[inline(always)]
    fn bilinear(&self, scores: &mut [(u32, f32)]) {
        let tables = self.node.tables;
        let successors = &self.successors[..self.successors.len().min(NORMALISED)];
        bilinear::touch(tables, successors.iter().map(|successor| successor.0));
        bilinear::touch(tables, scores.iter().map(|&(child, _)| self.children[child as usize].token));
        let context = bilinear::context(tables, self.last.iter().copied(), &self.room.topic);
        let (mut sum, mut mass) = (0.0, 0.0);
        for &(token, share) in successors {
            sum += share * bilinear::score(tables, &context, token).min(FURTHEST).exp();
            mass += share;
        }
        let norm = if mass > 0.0 { (sum / mass).max(f32::MIN_POSITIVE).ln() } else { 0.0 };
        for (child, score) in scores {
            *score = bilinear::score(tables, &context, self.children[*child as usize].token) - norm;
        }
    }

    #[inline(always)]
    fn rest(&self, scores: &[(u32, f32)], squash: f32) -> Rest {
        let (mut left, mut sources) = (1.0f32, [1.0f32; sources::COUNT]);
        for child in self.children.iter() {
            left -= uncorrected(child) * squash;
            sources.iter_mut().zip(&child.probs).for_each(|(rest, prob)| *rest -= prob);
        }
        let scored = scores.iter().map(|&(child, _)| uncorrected(&self.children[child as usize]) * squash);
        let others = (1.0 - left - scored.sum::<f32>()).max(0.0);
        Rest { left: left.max(LEAST_LEFT), others, sources }
    }

    /// Replaces the scores by the network's: probabilities up to a factor. Returns that of all that are no candidates.
    #[inline(always)]
    fn network(&self, scores: &mut [(u32, f32)], total: f32, squash: f32, rest: &Rest) -> f32 {
        let (network, mut seen) = (self.network, Seen::new());
        features::of_node(&self.node, self.children, total, &mut seen);
        let common = network.add(network.bias(), &seen);
        let odds = |base: f32, seen: &Seen| {
            let output = network.output(&network.add(common, seen));
            (base + output).clamp(-FURTHEST, FURTHEST).exp()
        };
        for (child, score) in scores.iter_mut() {
            let child = &self.children[*child as usize];
            seen.clear();
            let prob = uncorrected(child) * squash;
            let base = features::of_candidate(&self.node, child, prob, *score, &mut seen);
            *score = odds(base, &seen);
        }
        seen.clear();
        let base = features::of_none(&self.node, rest.left, &rest.sources, &mut seen);
        odds(base, &seen)
    }

    /// Gives the candidates their probabilities, corrected by this request, as parts of the node's. `rest` is what goes
    /// to none of the scored ones.
    #[inline(always)]
    fn share_out(&mut self, scores: &mut [(u32, f32)], rest: f32, squash: f32) {
        let whole = rest + scores.iter().map(|score| score.1).sum::<f32>();
        for child in self.children.iter_mut() {
            child.path = uncorrected(child) * squash / whole;
        }
        for (child, score) in scores {
            *score /= whole;
            self.children[*child as usize].path = *score;
        }
        let mut total = 0.0;
        for child in self.children.iter_mut() {
            if child.mixed >= LEAST_REFINED {
                child.refined = child.path.clamp(LEAST_RANKED, 1.0 - LEAST_RANKED);
                let kind = child.support(self.node.expansion.speaks).kind();
                child.path = self.node.inputs.calibration.correct(kind, child.refined);
            }
            total += child.path;
        }
        let scale = self.node.owner.path / total.max(1.0);
        self.children.iter_mut().for_each(|child| child.path *= scale);
    }

    #[cold]
    fn seen(&self, scores: &[(u32, f32)], total: f32, squash: f32, rest: &Rest) -> Ranked {
        let mut common = Seen::new();
        features::of_node(&self.node, self.children, total, &mut common);
        let row = |seen: &Seen| {
            let mut row = [0.0; FEATURES];
            common.write(&mut row);
            seen.write(&mut row);
            row
        };
        let scored = scores.iter().map(|&(child, score)| (&self.children[child as usize], score));
        let mut rows: Vec<_> = scored
            .clone()
            .map(|(child, score)| {
                let mut seen = Seen::new();
                let prob = uncorrected(child) * squash;
                (features::of_candidate(&self.node, child, prob, score, &mut seen), row(&seen))
            })
            .collect();
        let mut seen = Seen::new();
        let base = features::of_none(&self.node, rest.left, &rest.sources, &mut seen);
        rows.push((base, row(&seen)));
        let tokens: Vec<_> = scored.map(|(child, _)| child.token).collect();
        let others = self.children.iter().map(|child| child.token);
        Ranked {
            depth: usize::from(self.node.owner.depth),
            last: self.last.to_vec(),
            others: others.filter(|token| !tokens.contains(token)).collect(),
            tokens,
            rows,
            kept: rest.others,
            given: Vec::new(),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::predictor::inputs::tests::Parts;
    use crate::ranking::bilinear::tests::Noise;
    use crate::ranking::network::HIDDEN;
    use crate::sources::{STORE, SUCCESSORS};

    /// Weights that look random.
    pub fn network(seed: u32) -> Network {
        let mut state = seed;
        Network::random(&mut || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            3.0 * (state as f32 / u32::MAX as f32 - 0.5)
        })
    }

    /// The root and children with these probabilities, ranked, and what was seen.
    fn ranked(network: &Network, probs: &[f32], above: f32) -> (Vec<Candidate>, Vec<Candidate>, Vec<Ranked>) {
        let (parts, tables) = (Parts::new(&[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]), Noise::new(40));
        let mut expansion = Expansion { speaks: 1 << SUCCESSORS | 1 << STORE, ..Expansion::default() };
        (expansion.weights[SUCCESSORS], expansion.weights[STORE]) = (0.7, 0.3);
        let mut candidates = vec![Candidate::new(5, crate::index::NONE, 0)];
        candidates[0].path = above;
        candidates.extend((0..).zip(probs).map(|(token, &prob)| {
            let mut child = Candidate::new(token, 0, 1);
            (child.probs[SUCCESSORS], child.classes[SUCCESSORS]) = (prob, 0);
            (child.probs[STORE], child.classes[STORE]) = (prob * 0.9, (token % 5) as u8);
            child
        }));
        let inputs = Inputs { ranking: Some(Ranking { network, tables: &tables }), ..parts.inputs() };
        crate::predictor::refine::refine(&mut candidates[1..], above, &expansion, &inputs);
        let refined = candidates.clone();
        let mut room = Room { record: Some(Box::default()), ..Room::default() };
        start(&mut room, &inputs);
        let successors = [(0, 0.3), (1, 0.2), (7, 0.1)];
        rank(0, 1, &mut candidates, (&expansion, &Tally::default()), &successors, &inputs, &mut room);
        (refined, candidates, room.record.unwrap().nodes)
    }

    /// The network's answer to the rows, as its definition says, in double precision.
    fn slowly(network: &mut Network, seen: &Ranked) -> Vec<f64> {
        let weights: Vec<f64> = network.weights_mut().map(|weight| f64::from(*weight)).collect();
        let (features, rest) = weights.split_at(FEATURES * HIDDEN);
        let (bias, output) = rest.split_at(HIDDEN);
        let odds: Vec<f64> = seen
            .rows
            .iter()
            .map(|(base, row)| {
                let mut score = f64::from(*base);
                for unit in 0..HIDDEN {
                    let inputs = row.iter().enumerate();
                    let sum: f64 = inputs.map(|(at, x)| f64::from(*x) * features[at * HIDDEN + unit]).sum();
                    let sum = sum + bias[unit];
                    score += sum.max(0.1 * sum) * output[unit];
                }
                score.exp()
            })
            .collect();
        let whole = odds.iter().sum::<f64>() + f64::from(seen.kept);
        odds[..odds.len() - 1].iter().map(|odds| odds / whole).collect()
    }

    #[test]
    fn candidates_get_what_the_network_says_of_what_was_seen() {
        for seed in 1..20 {
            let mut network = network(seed);
            let probs = [0.3, 0.1, 0.25, 0.02, 0.004, 0.001, 0.0001];
            let (_, candidates, seen) = ranked(&network, &probs, 0.8);
            let [seen] = seen.as_slice() else { panic!() };
            let expected = slowly(&mut network, seen);
            assert!(seen.tokens.len() > 3 && seen.others.len() > 1 && seen.depth == 0);
            for ((given, expected), token) in seen.given.iter().zip(&expected).zip(&seen.tokens) {
                assert!((f64::from(*given) / expected - 1.0).abs() < 1e-3, "{given}, {expected}");
                let child = candidates.iter().find(|child| child.depth == 1 && child.token == *token);
                assert!((child.unwrap().refined - given).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn candidates_sum_to_at_most_their_node_and_nothing_is_impossible() {
        for seed in 1..50 {
            for probs in [[0.5; 12], [0.01; 12], [0.08; 12]] {
                let (_, candidates, _) = ranked(&network(seed), &probs, 0.6);
                let sum: f32 = candidates[1..].iter().map(|child| child.path).sum();
                assert!(sum <= 0.6 * 1.00001 && candidates.iter().all(|child| child.path > 0.0));
            }
        }
    }

    #[test]
    fn improbable_nodes_are_left_as_they_are() {
        let paths = |candidates: &[Candidate]| candidates.iter().map(|child| child.path).collect::<Vec<_>>();
        let (refined, candidates, seen) = ranked(&network(1), &[0.4, 0.3], WORTH_RANKING * 0.99);
        assert!(seen.is_empty() && paths(&refined) == paths(&candidates));
        let (refined, candidates, seen) = ranked(&network(1), &[0.4, 0.3], WORTH_RANKING);
        assert!(seen.len() == 1 && paths(&refined) != paths(&candidates));
    }
}
