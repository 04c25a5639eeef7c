//! The stage at a node: which candidates are scored, and what becomes of their probabilities.

use pulp::{Arch, NullaryFnOnce};

use crate::Token;
use crate::memory::push;
use crate::predictor::arena::{Candidate, Expansion, Tally};
use crate::predictor::gather;
use crate::predictor::inputs::Inputs;
use crate::predictor::refine::LEAST_REFINED;
use crate::ranking::bilinear::{CONTEXT, LogBilinear, Said, Topic};
use crate::ranking::features::{self, BySource, Node};
use crate::ranking::network::{FEATURES, Network, OF_CANDIDATE, Ranking};
use crate::ranking::numbers::{exp, ln};
use crate::ranking::record::{Ranked, RankingRecord};
use crate::sources;

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
    /// Of the node at hand: the candidates that are scored, and their odds.
    scored: Vec<(u32, f32)>,
    /// Tokens that the tables are asked about, and what they say.
    tokens: Vec<Token>,
    said: Vec<Said>,
    /// What is seen, for learning a network.
    pub record: Option<Box<RankingRecord>>,
}

impl Room {
    /// Bytes beyond its own size.
    pub fn memory_bytes(&self) -> usize {
        let scored = self.scored.capacity() * size_of::<(u32, f32)>();
        scored + self.tokens.capacity() * size_of::<Token>() + self.said.capacity() * size_of::<Said>()
    }
}

/// The work at a node.
struct Stage<'a> {
    node: Node<'a>,
    /// Each with its probability at the node as its path's.
    children: &'a mut [Candidate],
    /// The last tokens of the node's path and of the text before it, the node's own first.
    last: &'a [Token],
    successors: &'a [(Token, f32)],
    network: &'a Network,
    tables: &'a dyn LogBilinear,
    room: &'a mut Room,
}

/// All candidates of a node.
struct Sums {
    /// Of their probabilities.
    total: f32,
    /// Of what each source gives them, and the most that it gives one.
    probs: BySource,
    peaks: BySource,
}

impl Sums {
    #[inline(always)]
    fn of(children: &[Candidate]) -> Self {
        let mut sums = Self { total: 0.0, probs: [0.0; sources::COUNT], peaks: [0.0; sources::COUNT] };
        for child in children {
            sums.total += child.path;
            for (source, &prob) in child.probs.iter().enumerate() {
                sums.probs[source] += prob;
                sums.peaks[source] = sums.peaks[source].max(prob);
            }
        }
        sums
    }

    /// What makes the probabilities sum to at most 1.
    #[inline(always)]
    fn squash(&self) -> f32 {
        1.0 / self.total.max(1.0)
    }
}

/// Begins a draft: the topic is that of the text before it.
pub fn start(room: &mut Room, inputs: &Inputs) {
    if let Some(Ranking { tables, .. }) = inputs.ranking {
        room.topic.follow(tables, &inputs.index.tokens()[inputs.predicted..]);
    }
}

/// Whether the candidates of a node whose path has this probability are ranked.
pub fn ranks(path: f32, inputs: &Inputs) -> bool {
    inputs.ranking.is_some() && path >= WORTH_RANKING
}

/// Ranks the candidates of `node`, which are those from `start` on and have been refined but not corrected by the request;
/// then this corrects them. Returns the sum of their probabilities at the node.
pub fn rank(
    node: u32,
    start: usize,
    candidates: &mut [Candidate],
    (expansion, tally): (&Expansion, &Tally),
    successors: &[(Token, f32)],
    inputs: &Inputs,
    room: &mut Room,
) -> f32 {
    let Some(Ranking { network, tables }) = inputs.ranking else { return 0.0 };
    let owner = candidates[node as usize];
    let mut last = [0; CONTEXT];
    let before = gather::newest_first(node, candidates, inputs);
    let context = last.iter_mut().zip(before).map(|(place, token)| *place = token).count();
    let node = Node { owner, expansion, tally, inputs };
    let (children, last) = (&mut candidates[start..], &last[..context]);
    Arch::new().dispatch(Stage { node, children, last, successors, network, tables, room })
}

/// Whose logarithm this is, within bounds.
#[inline(always)]
fn odds(log: f32) -> f32 {
    exp(log.clamp(-FURTHEST, FURTHEST))
}

// no closures where much is done: they are compiled for any processor
impl NullaryFnOnce for Stage<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(mut self) -> f32 {
        let sums = Sums::of(self.children);
        self.choose(sums.squash());
        if !self.room.scored.is_empty() {
            self.ask();
            if self.room.record.is_some() {
                self.note(&sums);
            }
            let rest = self.score(&sums);
            self.share_out(rest, sums.squash());
        }
        self.correct()
    }
}

impl Stage<'_> {
    /// Chooses the candidates that are scored.
    #[inline(always)]
    fn choose(&mut self, squash: f32) {
        let Room { scored, tokens, .. } = &mut *self.room;
        scored.clear();
        tokens.clear();
        let least = WORTH_SCORING / self.node.owner.path;
        for (at, child) in (0u32..).zip(self.children.iter()) {
            if child.mixed >= LEAST_REFINED && child.path * squash >= least {
                push(scored, (at, 0.0));
                push(tokens, child.token);
            }
        }
    }

    /// Asks the tables about those chosen: scores relative to those of the successors in the mean.
    #[inline(always)]
    fn ask(&mut self) {
        let Room { scored, tokens, said, topic, .. } = &mut *self.room;
        let successors = &self.successors[..self.successors.len().min(NORMALISED)];
        successors.iter().for_each(|&(token, _)| push(tokens, token));
        said.clear();
        tokens.iter().for_each(|_| push(said, Said::default()));
        self.tables.say(self.last, topic, tokens, said);
        let (own, others) = said.split_at_mut(scored.len());
        let (mut sum, mut mass) = (0.0, 0.0);
        for (&(_, share), said) in successors.iter().zip(others) {
            sum += share * exp(said.score.min(FURTHEST));
            mass += share;
        }
        let norm = if mass > 0.0 { ln((sum / mass).max(f32::MIN_POSITIVE)) } else { 0.0 };
        own.iter_mut().for_each(|said| said.score -= norm);
    }

    /// What the features of all that are no candidates are made of: their probability, and what each source gives them.
    #[inline(always)]
    fn none(&self, sums: &Sums) -> (f32, [f32; OF_CANDIDATE]) {
        let left = (1.0 - sums.total).max(LEAST_LEFT);
        let mut rest = [1.0; sources::COUNT];
        rest.iter_mut().zip(&sums.probs).for_each(|(rest, sum)| *rest -= sum);
        features::of_none(&self.node, left, &rest)
    }

    /// The probability of the candidates that are not scored.
    #[inline(always)]
    fn others(&self, sums: &Sums) -> f32 {
        let scored: f32 = self.room.scored.iter().map(|&(child, _)| self.children[child as usize].path).sum();
        ((sums.total - scored) * sums.squash()).max(0.0)
    }

    /// Sets the odds of the candidates by the network. Returns those of all others.
    #[inline(always)]
    fn score(&mut self, sums: &Sums) -> f32 {
        let (rest, none, network) = (self.others(sums), self.none(sums), self.network);
        let common = network.of_node(&features::of_node(&self.node, &sums.peaks, sums.total));
        let (squash, Room { scored, said, .. }) = (sums.squash(), &mut *self.room);
        for ((child, score), said) in scored.iter_mut().zip(said.iter()) {
            let child = &self.children[*child as usize];
            let (base, row) = features::of_candidate(&self.node, child, child.path * squash, *said);
            *score = odds(base + network.of_candidate(&common, &row));
        }
        odds(none.0 + network.of_candidate(&common, &none.1)) + rest
    }

    /// Turns odds into probabilities, where `rest` goes to none of those scored.
    #[inline(always)]
    fn share_out(&mut self, rest: f32, squash: f32) {
        let scored = &mut self.room.scored;
        let whole = 1.0 / (rest + scored.iter().map(|score| score.1).sum::<f32>());
        self.children.iter_mut().for_each(|child| child.path *= squash * whole);
        for (child, score) in scored {
            *score *= whole;
            self.children[*child as usize].path = *score;
        }
    }

    /// Corrects the candidates by this request. Returns the sum of what becomes of them.
    #[inline(always)]
    fn correct(&mut self) -> f32 {
        let Node { expansion, inputs, .. } = self.node;
        let mut total = 0.0;
        for child in self.children.iter_mut() {
            if child.mixed >= LEAST_REFINED {
                child.refined = child.path.clamp(LEAST_RANKED, 1.0 - LEAST_RANKED);
                child.path =
                    inputs.calibration.correct(child.support(expansion.speaks).kind(), child.refined);
            }
            total += child.path;
        }
        total
    }

    #[cold]
    fn note(&mut self, sums: &Sums) {
        let common = features::of_node(&self.node, &sums.peaks, sums.total);
        let row = |(base, own): (f32, [f32; OF_CANDIDATE])| {
            let mut row = [0.0; FEATURES];
            row[..OF_CANDIDATE].copy_from_slice(&own);
            row[OF_CANDIDATE..].copy_from_slice(&common);
            (base, row)
        };
        let mut rows = Vec::new();
        for (&(child, _), said) in self.room.scored.iter().zip(&self.room.said) {
            let child = &self.children[child as usize];
            rows.push(row(features::of_candidate(&self.node, child, child.path * sums.squash(), *said)));
        }
        rows.push(row(self.none(sums)));
        let tokens = self.room.tokens[..self.room.scored.len()].to_vec();
        let others = self.children.iter().map(|child| child.token);
        let seen = Ranked {
            depth: usize::from(self.node.owner.depth),
            last: self.last.to_vec(),
            others: others.filter(|token| !tokens.contains(token)).collect(),
            tokens,
            rows,
            kept: self.others(sums),
        };
        self.room.record.iter_mut().for_each(|record| record.nodes.push(seen.clone()));
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::predictor::inputs::tests::Parts;
    use crate::predictor::refine;
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
        let mut refined = candidates.clone();
        let total = refine::refine(&mut refined[1..], &expansion, &inputs, true);
        refine::scale(&mut refined[1..], above, total);
        let mut room = Room { record: Some(Box::default()), ..Room::default() };
        start(&mut room, &inputs);
        let successors = [(0, 0.3), (1, 0.2), (7, 0.1)];
        let ranks = ranks(above, &inputs);
        let mut total = refine::refine(&mut candidates[1..], &expansion, &inputs, !ranks);
        if ranks {
            let made_of = (&expansion, &Tally::default());
            total = rank(0, 1, &mut candidates, made_of, &successors, &inputs, &mut room);
        }
        refine::scale(&mut candidates[1..], above, total);
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
            for (expected, token) in expected.iter().zip(&seen.tokens) {
                let child =
                    candidates.iter().find(|child| child.depth == 1 && child.token == *token).unwrap();
                let expected = expected.clamp(1e-6, 1.0 - 1e-6);
                assert!(
                    (f64::from(child.refined) / expected - 1.0).abs() < 1e-3,
                    "{}, {expected}",
                    child.refined
                );
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
