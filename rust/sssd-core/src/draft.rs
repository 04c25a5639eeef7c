//! Grows a draft tree from samples of earlier occurrences, most probable node first.
//!
//! A *sample* is an earlier place where the end of the context occurred; it votes for the token that followed.
//! The samples of a node are those of its parent that agree with the node's token, so the tree is built inside
//! the samples found at the root. At each node the votes of a source are blended over match lengths k as in
//! prediction by partial matching, `p_k(t) = (1 - e_k) c_k(t) / n_k + e_k p_{k-1}(t)`; the sources are mixed; and
//! the mixed probability is refined by what became of such tokens before ([`Model`] has the learned parts).

use crate::Token;
use crate::aligned::{Aligned, agreed};
use crate::calibration::Calibration;
use crate::corpus::{Corpus, Match};
use crate::frontier::Frontier;
use crate::index::{Index, NONE, ORDERS};
use crate::knowledge::Stats;
use crate::live::LiveStore;
use crate::model::{
    CLASSES, EscapeCell, GateCell, MAX_LENGTH, Model, NO_CLASS, Occurrence, Support, class, source,
};
use crate::soft::{Recent, SOFT_ORDERS, SoftTable};
use crate::tree::{DraftTree, ROOT};

/// Occurrences looked at in the request: at the root, of these of each length when there are longer ones, and at
/// each further node.
const REQUEST_SAMPLES: usize = 64;
const SHORTER_SAMPLES: usize = 16;
const LOWER_SAMPLES: usize = 8;
/// Longest context looked up at nodes other than the root.
const LOWER_LENGTH: usize = 2;
/// Less probable nodes are not worth that look-up.
const WORTH_LOWER: f32 = 0.04;
/// Occurrences looked at in the datastore for each match length, and the longest match.
const STORE_SAMPLES: usize = 64;
const STORE_LENGTH: usize = 8;
/// The same for the live store.
const LIVE_SAMPLES: usize = 64;
const LIVE_LENGTH: usize = MAX_LENGTH;
/// Tokens read from the datastore at a time: most samples disagree early.
const FIRST_READ: usize = 4;
const NEXT_READ: usize = 16;
/// Below this mixed probability nothing is refined, and nothing learned about refining.
const LEAST_REFINED: f32 = 0.003;
/// Tokens of a list (successors, feedback) become candidates from this probability of their path on. The bound must not
/// follow the budget: a sibling that is left out is missing from the sum by which the others are scaled, so a node's
/// probability would depend on how many are drafted.
const WORTH_OFFERING: f32 = 0.0006;
/// Contexts to have room for at a node, so that few drafts need more.
const CONTEXTS: usize = 24;
/// Class of matches that need no shorter contexts beside them.
const COPY: u8 = 7;
/// Slots of the token table; more than the candidates that one expansion can have.
const SLOTS: usize = 2048;

/// What one draft is made from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub index: &'a Index,
    /// Tokens at the start of the index that are a predicted output.
    pub predicted: usize,
    pub aligned: &'a Aligned,
    pub store: Option<&'a dyn Corpus>,
    pub live: &'a LiveStore,
    pub soft: &'a SoftTable,
    pub recent: &'a Recent,
    pub model: &'a Model,
    pub calibration: &'a Calibration,
    /// Nothing is drafted after these.
    pub end_tokens: &'a [Token],
    /// Tokens of output so far.
    pub age: usize,
    pub limits: Limits,
}

/// What one draft may come to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The node budget.
    pub max_nodes: usize,
    /// No node is deeper.
    pub max_depth: usize,
    /// Less probable nodes are not drafted.
    pub min_prob: f32,
}

impl Limits {
    /// A node budget alone.
    pub fn nodes(max_nodes: usize) -> Self {
        Self { max_nodes, max_depth: usize::MAX, min_prob: 0.0 }
    }
}

impl Inputs<'_> {
    fn corpus(&self, source: u8) -> Option<&dyn Corpus> {
        match usize::from(source) {
            source::STORE => self.store,
            _ => Some(self.live),
        }
    }
}

/// An earlier occurrence of a node's context.
#[derive(Clone, Copy)]
struct Sample {
    /// The predicted token, as an index into the request's tokens or into `read`.
    cursor: u32,
    end: u32,
    /// The next sample of the same candidate.
    next: u32,
    /// Matched tokens, at most `MAX_LENGTH`.
    length: u16,
    source: u8,
    /// Whether nothing follows `end`.
    ended: bool,
    weight: f32,
    /// Where the corpus goes on after `end`.
    rest: u64,
}

impl Sample {
    /// Reads the next tokens from the corpus.
    fn read_on(&mut self, read: &mut Vec<Token>, corpus: &dyn Corpus, count: usize) {
        let start = read.len();
        read.resize(start + count, 0);
        let found = corpus.continuation(self.rest, &mut read[start..]);
        read.truncate(start + found);
        self.cursor = start as u32;
        self.end = (start + found) as u32;
        self.rest += found as u64;
        self.ended = found < count;
    }
}

/// A sample's voice for what follows a node.
#[derive(Clone, Copy)]
struct Vote {
    candidate: u32,
    weight: f32,
    source: u8,
    class: u8,
}

/// The votes of an expansion by source and class.
#[derive(Default)]
struct Tally {
    counts: [[f32; CLASSES]; source::SAMPLED],
    /// Candidates by the longest context that they followed.
    distinct: [[u32; CLASSES]; source::SAMPLED],
    /// A bit for each class that has any.
    held: [u32; source::SAMPLED],
}

/// Where a candidate's evidence begins.
#[derive(Clone, Copy)]
struct Origin {
    /// First of its samples.
    samples: u32,
    /// Newest occurrence of its own last tokens in the request, once it is likely enough to be looked for.
    lower: u32,
}

const NOWHERE: Origin = Origin { samples: NONE, lower: NONE };

/// A token that may follow a node; a node itself once it is the most probable one left. One line of the cache.
#[derive(Clone, Copy)]
struct Candidate {
    token: Token,
    parent: u32,
    /// Probability given the parent, before refinement.
    mixed: f32,
    /// The same after refinement by the model.
    refined: f32,
    /// Probability of the path from the root.
    path: f32,
    /// What its children are made of, once it has been expanded.
    evidence: u32,
    /// Its index in the tree.
    node: i16,
    depth: u16,
    /// Probability given by each source.
    probs: [f32; source::COUNT],
    /// For each source, the class of the longest context that the token followed.
    classes: [u8; source::COUNT],
    occurrence: Occurrence,
}

const _: () = assert!(size_of::<Candidate>() == 64);

impl Candidate {
    fn new(token: Token, parent: u32, depth: u16) -> Self {
        Self {
            token,
            parent,
            mixed: 0.0,
            refined: 0.0,
            path: 1.0,
            evidence: NONE,
            node: ROOT as i16,
            depth,
            probs: [0.0; source::COUNT],
            classes: [NO_CLASS; source::COUNT],
            occurrence: Occurrence::Never,
        }
    }

    fn support(&self, evidence: &Evidence) -> Support {
        Support { classes: self.classes, speaks: evidence.speaks, occurrence: self.occurrence }
    }
}

/// What the prediction after an expanded node was made of, kept for learning.
#[derive(Clone, Default)]
struct Evidence {
    /// The node's children in `Drafting::candidates`.
    children: (u32, u32),
    /// A bit for each source that has anything to say.
    speaks: u8,
    /// Where the contexts of each blended source begin in `Drafting::contexts`, and where the last ones end.
    contexts: [u32; source::BLENDED + 1],
    /// What the target held probable after such contexts, in `Drafting::soft`.
    soft: (u32, u32),
    gates: [Option<GateCell>; source::COUNT],
    weights: [f32; source::COUNT],
}

/// The memory of a sequence's drafts, reused from draft to draft, and the last draft's reasons until its outcome
/// is known.
#[derive(Clone, Default)]
pub struct Drafting {
    candidates: Vec<Candidate>,
    evidence: Vec<Evidence>,
    /// The blended sources' contexts at each expanded node, longest first: class and cell.
    contexts: Vec<(u8, EscapeCell)>,
    /// Tokens that the target held probable, with probability and class.
    soft: Vec<(Token, f32, u8)>,
    tree: DraftTree,
    /// Nodes that the live store speaks for, and a position in the document.
    credits: Vec<(u32, u64)>,
    /// Lent for the time of a draft.
    scratch: Scratch,
    /// The newest node, until it is expanded: there may be no room for its children.
    newest: Option<u32>,
    /// What the tree and its learning are to come to: those of a draft of so many nodes.
    budget: usize,
    /// Tokens of output before the draft.
    age: usize,
    /// The candidate that the target's output has followed so far.
    followed: Option<u32>,
}

/// Memory that is of no use between drafts: one set serves many sequences and stays near the processor.
#[derive(Clone, Default)]
pub struct Scratch {
    frontier: Frontier,
    samples: Vec<Sample>,
    /// Where each candidate's evidence begins.
    origins: Vec<Origin>,
    matches: Vec<Match>,
    /// Tokens read from the datastore.
    read: Vec<Token>,
    successors: Vec<(Token, f32)>,
    /// Those of the expansion at hand.
    votes: Vec<Vote>,
    table: TokenTable,
}

impl Drafting {
    /// Drafts a tree of at most `nodes` nodes, the best of those that `inputs` allow.
    pub fn draft(&mut self, nodes: usize, inputs: &Inputs, scratch: &mut Scratch) {
        std::mem::swap(&mut self.scratch, scratch);
        self.start(inputs);
        self.grow(nodes, inputs);
        std::mem::swap(&mut self.scratch, scratch);
    }

    fn start(&mut self, inputs: &Inputs) {
        self.candidates.clear();
        self.evidence.clear();
        self.credits.clear();
        self.scratch.samples.clear();
        self.scratch.origins.clear();
        self.scratch.read.clear();
        self.soft.clear();
        self.contexts.clear();
        self.contexts.reserve(CONTEXTS * inputs.limits.max_nodes);
        self.tree.clear();
        self.newest = None;
        self.budget = inputs.limits.max_nodes;
        self.followed = None;
        self.age = inputs.age;
        let Limits { max_nodes, max_depth, min_prob } = inputs.limits;
        self.scratch.frontier.reset(max_nodes, min_prob);
        match inputs.index.tokens().last() {
            Some(last) if max_nodes > 0 && max_depth > 0 && !inputs.end_tokens.contains(last) => {
                self.candidates.push(Candidate::new(*last, NONE, 0));
                self.scratch.origins.push(NOWHERE);
                self.gather_request(inputs.index);
                self.gather_aligned(inputs);
                self.gather_corpus(source::STORE, STORE_LENGTH, STORE_SAMPLES, inputs);
                self.gather_corpus(source::LIVE, LIVE_LENGTH, LIVE_SAMPLES, inputs);
                self.followed = Some(0);
                self.expand(0, inputs);
            }
            _ => {}
        }
    }

    /// Grows the tree to at most `nodes` nodes.
    fn grow(&mut self, nodes: usize, inputs: &Inputs) {
        while self.tree.len() < nodes.min(inputs.limits.max_nodes) {
            if let Some(node) = self.newest.take() {
                let Candidate { token, depth, path, classes, .. } = self.candidates[node as usize];
                let class = classes[source::REQUEST];
                let copied = class != NO_CLASS && class >= COPY;
                if (depth as usize) < inputs.limits.max_depth && !inputs.end_tokens.contains(&token) {
                    if path >= WORTH_LOWER && !copied {
                        self.gather_lower(node, inputs.index);
                    }
                    self.expand(node, inputs);
                }
            }
            let Some(best) = self.scratch.frontier.pop() else { return };
            let Candidate { token, parent, path, .. } = self.candidates[best as usize];
            self.candidates[best as usize].node = self.tree.len() as i16;
            let source = self.carrier(best);
            self.note_credit(best);
            self.tree.push(token, i32::from(self.candidates[parent as usize].node), path, source);
            self.newest = Some(best);
        }
    }

    /// Goes back to what a draft of at most `nodes` nodes is, and what is learned from it.
    pub fn cut(&mut self, nodes: usize) {
        self.budget = self.budget.min(nodes);
        self.tree.truncate(nodes);
        if nodes == 0 {
            self.followed = None;
        }
    }

    /// The tree, until the next draft.
    pub fn tree(&self) -> &DraftTree {
        &self.tree
    }

    /// Forgets the last draft.
    pub fn forget(&mut self) {
        self.followed = None;
    }

    /// Frees everything but the tree.
    pub fn shrink(&mut self) {
        let mut tree = std::mem::take(&mut self.tree);
        tree.shrink();
        *self = Self { tree, ..Self::default() };
    }

    /// Collects earlier occurrences of the context in the request, longest contexts first, newest first.
    fn gather_request(&mut self, index: &Index) {
        let tokens = index.tokens();
        let last = tokens.len() - 1;
        let mut context = [0; MAX_LENGTH];
        let known = tokens.len().min(MAX_LENGTH);
        context.iter_mut().zip(tokens.iter().rev()).for_each(|(to, &from)| *to = from);
        let mut steps = 4 * REQUEST_SAMPLES;
        let mut longer = MAX_LENGTH + 1;
        for order in (0..ORDERS.len()).rev() {
            let found = self.scratch.samples.len();
            let most = if found > 0 { REQUEST_SAMPLES.min(found + SHORTER_SAMPLES) } else { REQUEST_SAMPLES };
            let mut position = index.previous(order, last as u32);
            while position != NONE && self.scratch.samples.len() < most && steps > 0 {
                steps -= 1;
                let length = index.match_length(position, &context[..known]);
                if (1..longer).contains(&length) {
                    self.add_request_sample(0, source::REQUEST, index, position, length);
                }
                position = index.previous(order, position);
            }
            longer = ORDERS[order];
        }
    }

    /// Collects occurrences in the request of the node's last two tokens, or of its one token at depth 1, where
    /// they follow another token than on the node's path: shorter contexts than those of the samples.
    fn gather_lower(&mut self, node: u32, index: &Index) {
        let own = self.candidates[node as usize];
        let above = self.candidates[own.parent as usize];
        let (length, order) = lower(own.depth);
        let before = self.candidates.get(above.parent as usize).map_or(Token::MAX, |before| before.token);
        let context = &[own.token, above.token, before][..=length];
        let (first, mut steps) = (self.scratch.samples.len(), 2 * LOWER_SAMPLES);
        let mut position = self.scratch.origins[node as usize].lower;
        while position != NONE && self.scratch.samples.len() < first + LOWER_SAMPLES && steps > 0 {
            steps -= 1;
            if index.match_length(position, context) == length {
                self.add_request_sample(node, source::LOWER, index, position, length);
            }
            position = index.previous(order, position);
        }
    }

    fn add_request_sample(
        &mut self,
        candidate: u32,
        source: usize,
        index: &Index,
        position: u32,
        length: usize,
    ) {
        let (cursor, end) = (position + 1, index.tokens().len() as u32);
        let length = length as u16;
        let (source, rest) = (source as u8, 0);
        let sample = Sample { cursor, end, next: NONE, length, source, ended: true, weight: 1.0, rest };
        self.add_sample(candidate, sample);
    }

    /// Collects where the text goes on that the output follows.
    fn gather_aligned(&mut self, inputs: &Inputs) {
        inputs.aligned.continuations(inputs.index, |at| {
            let sample = Sample {
                cursor: at.position,
                end: at.end,
                next: NONE,
                length: at.length,
                source: source::ALIGNED as u8,
                ended: true,
                weight: 1.0,
                rest: 0,
            };
            self.add_sample(0, sample);
        });
    }

    /// Collects occurrences of the context in the datastore or in the live store.
    fn gather_corpus(&mut self, source: usize, length: usize, samples: usize, inputs: &Inputs) {
        let Some(corpus) = inputs.corpus(source as u8) else { return };
        let tokens = &inputs.index.tokens()[inputs.predicted..];
        let context = &tokens[tokens.len().saturating_sub(length)..];
        let mut matches = std::mem::take(&mut self.scratch.matches);
        matches.clear();
        corpus.matches(context, length, samples, &mut matches);
        for found in &matches {
            let mut sample = Sample {
                cursor: 0,
                end: 0,
                next: NONE,
                length: found.length as u16,
                source: source as u8,
                ended: false,
                weight: found.weight,
                rest: found.position,
            };
            sample.read_on(&mut self.scratch.read, corpus, FIRST_READ);
            self.add_sample(0, sample);
        }
        self.scratch.matches = matches;
    }

    fn add_sample(&mut self, candidate: u32, mut sample: Sample) {
        let first = &mut self.scratch.origins[candidate as usize].samples;
        sample.next = std::mem::replace(first, self.scratch.samples.len() as u32);
        self.scratch.samples.push(sample);
    }

    /// Predicts what follows `node` and puts the predicted tokens on the frontier.
    fn expand(&mut self, node: u32, inputs: &Inputs) {
        let start = self.candidates.len();
        self.scratch.table.clear();
        let mut evidence = Evidence::default();
        let tally = self.vote(node, inputs);
        self.blend(&tally, inputs.model, &mut evidence);
        self.soften(node, inputs, &mut evidence);
        self.scratch.successors.clear();
        if let Some(store) = inputs.store {
            store.successors(self.candidates[node as usize].token, &mut self.scratch.successors);
        }
        self.weigh(inputs.model, &mut evidence);
        self.add_soft(node, &evidence);
        self.add_successors(node, &evidence);
        self.refine(node, start, inputs, &evidence);
        evidence.children = (start as u32, self.candidates.len() as u32);
        self.candidates[node as usize].evidence = self.evidence.len() as u32;
        self.evidence.push(evidence);
    }

    /// Hands each sample of `node` on to the candidate for its next token.
    fn vote(&mut self, node: u32, inputs: &Inputs) -> Tally {
        let Self { candidates, scratch, .. } = self;
        let Scratch { samples, origins, read, votes, table, .. } = scratch;
        let mut tally = Tally::default();
        votes.clear();
        let mut next = origins[node as usize].samples;
        while let Some(sample) = samples.get_mut(next as usize) {
            let current = std::mem::replace(&mut next, sample.next);
            if sample.cursor == sample.end {
                match inputs.corpus(sample.source) {
                    Some(corpus) if !sample.ended => sample.read_on(read, corpus, NEXT_READ),
                    _ => continue,
                }
                if sample.cursor == sample.end {
                    continue;
                }
            }
            let source = usize::from(sample.source);
            let token = match source {
                source::STORE | source::LIVE => read[sample.cursor as usize],
                _ => inputs.index.token(sample.cursor),
            };
            let child = child(node, token, candidates, origins, table);
            let class = class(sample.length) as u8;
            let held = &mut candidates[child as usize].classes[source];
            if *held == NO_CLASS || *held < class {
                if *held != NO_CLASS {
                    tally.distinct[source][usize::from(*held)] -= 1;
                }
                tally.distinct[source][usize::from(class)] += 1;
                *held = class;
            }
            sample.cursor += 1;
            sample.length = match source {
                source::ALIGNED => agreed(sample.length),
                _ => sample.length + 1,
            }
            .min(MAX_LENGTH as u16);
            sample.next = std::mem::replace(&mut origins[child as usize].samples, current);
            tally.counts[source][usize::from(class)] += sample.weight;
            tally.held[source] |= 1 << class;
            votes.push(Vote { candidate: child, weight: sample.weight, source: sample.source, class });
        }
        tally
    }

    /// Turns votes into the probability that each sampled source gives each candidate.
    fn blend(&mut self, tally: &Tally, model: &Model, evidence: &mut Evidence) {
        // the vote of one occurrence of each class
        let mut values = [[0.0f32; CLASSES]; source::SAMPLED];
        for (source, value) in values.iter_mut().enumerate() {
            evidence.contexts[source] = self.contexts.len() as u32;
            if tally.held[source] == 0 {
                continue;
            }
            // a longer match in the request is a shorter one too; the datastore samples each length anew
            let nested = !matches!(source, source::STORE | source::ALIGNED);
            let (mut count, mut seen, mut rest) = (0.0, 0, 1.0);
            let mut left = tally.held[source];
            while let Some(class) = left.checked_ilog2().map(|class| class as usize) {
                left ^= 1 << class;
                count =
                    if nested { count + tally.counts[source][class] } else { tally.counts[source][class] };
                seen += tally.distinct[source][class];
                let cell = Model::escape_cell(source, class, count, seen);
                let escape = model.escape(cell);
                value[class] = rest * (1.0 - escape) / count;
                rest *= escape;
                self.contexts.push((class as u8, cell));
            }
            if nested {
                let (mut left, mut shorter) = (tally.held[source], 0.0);
                while left != 0 {
                    let class = left.trailing_zeros() as usize;
                    left &= left - 1;
                    value[class] += shorter;
                    shorter = value[class];
                }
            }
        }
        let mut peaks = [0.0f32; source::SAMPLED];
        for vote in &self.scratch.votes {
            let source = usize::from(vote.source);
            let prob = &mut self.candidates[vote.candidate as usize].probs[source];
            *prob += vote.weight * values[source][usize::from(vote.class)];
            peaks[source] = peaks[source].max(*prob);
        }
        for (source, peak) in peaks.into_iter().enumerate() {
            let longest = tally.held[source].checked_ilog2();
            evidence.gates[source] = longest.map(|class| Model::gate_cell(source, class as usize, peak));
        }
    }

    /// Gives each source its weight: a softmax over those that have anything to say.
    fn weigh(&self, model: &Model, evidence: &mut Evidence) {
        if let Some(&(class, _)) = self.contexts.get(evidence.contexts[source::SOFT] as usize) {
            let said = &self.soft[evidence.soft.0 as usize..evidence.soft.1 as usize];
            let peak = said.iter().map(|&(_, prob, _)| prob).fold(0.0, f32::max);
            evidence.gates[source::SOFT] = Some(Model::gate_cell(source::SOFT, usize::from(class), peak));
        }
        if let Some(&(_, peak)) = self.scratch.successors.first() {
            evidence.gates[source::SUCCESSORS] = Some(Model::gate_cell(source::SUCCESSORS, 0, peak));
        }
        let mut total = 0.0;
        for (source, gate) in evidence.gates.iter().enumerate() {
            if let &Some(cell) = gate {
                evidence.speaks |= 1 << source;
                evidence.weights[source] = model.gate(cell).exp();
                total += evidence.weights[source];
            }
        }
        evidence.weights.iter_mut().for_each(|weight| *weight /= total.max(f32::MIN_POSITIVE));
    }

    /// Looks up what the target held probable after the last tokens before, and blends it over their numbers.
    fn soften(&mut self, node: u32, inputs: &Inputs, evidence: &mut Evidence) {
        let start = self.soft.len();
        evidence.soft = (start as u32, start as u32);
        evidence.contexts[source::SOFT..].fill(self.contexts.len() as u32);
        if inputs.soft.is_empty() {
            return;
        }
        let mut found = [None; SOFT_ORDERS.len()];
        let mut at = node;
        let path = std::iter::from_fn(|| {
            // the root is the sequence's last token
            let candidate = self.candidates.get(at as usize).filter(|_| at != 0)?;
            at = candidate.parent;
            Some(candidate.token)
        });
        let before = inputs.index.tokens()[inputs.predicted..].iter().rev().copied();
        inputs.soft.find(path.chain(before), &mut found);
        let mut rest = 1.0;
        let (said, contexts) = (&mut self.soft, &mut self.contexts);
        let mut blend =
            |class: u8, cell: EscapeCell, total: f32, tokens: &mut dyn Iterator<Item = (Token, f32)>| {
                let escape = inputs.model.escape(cell);
                for (token, prob) in tokens {
                    let value = rest * (1.0 - escape) * prob / total;
                    match said[start..].iter_mut().find(|held| held.0 == token) {
                        Some(held) => held.1 += value,
                        None => said.push((token, value, class)),
                    }
                }
                rest *= escape;
                contexts.push((class, cell));
            };
        for (class, soft) in found.iter().enumerate().rev() {
            if let Some(soft) = soft {
                let cell = Model::soft_cell(class + 1, soft.writes, soft.probs[0]);
                blend(class as u8 + 1, cell, soft.probs.iter().sum(), &mut soft.tokens());
            }
        }
        let recent = &inputs.recent.tokens;
        if let Some(&(_, peak)) = recent.first() {
            let total: f32 = recent.iter().map(|held| held.1).sum();
            let cell = Model::soft_cell(0, (total * 16.0) as u8, peak / total);
            blend(0, cell, total, &mut recent.iter().copied());
        }
        evidence.soft.1 = self.soft.len() as u32;
        evidence.contexts[source::SOFT + 1] = self.contexts.len() as u32;
    }

    /// Adds what the target held probable, as far as it is worth it.
    fn add_soft(&mut self, node: u32, evidence: &Evidence) {
        let reach = self.candidates[node as usize].path * evidence.weights[source::SOFT];
        for at in evidence.soft.0..evidence.soft.1 {
            let (token, prob, class) = self.soft[at as usize];
            let child = if reach * prob >= WORTH_OFFERING {
                Some(self.child(node, token))
            } else {
                self.scratch.table.find(token, &self.candidates).ok()
            };
            if let Some(child) = child {
                let candidate = &mut self.candidates[child as usize];
                candidate.classes[source::SOFT] = class;
                candidate.probs[source::SOFT] = prob;
            }
        }
    }

    /// Notes which document of the live store speaks for the next node.
    fn note_credit(&mut self, candidate: u32) {
        if self.candidates[candidate as usize].classes[source::LIVE] == NO_CLASS {
            return;
        }
        let mut next = self.scratch.origins[candidate as usize].samples;
        while let Some(sample) = self.scratch.samples.get(next as usize) {
            if usize::from(sample.source) == source::LIVE {
                return self.credits.push((self.tree.len() as u32, sample.rest - 1));
            }
            next = sample.next;
        }
    }

    /// The source that contributes most to a candidate's probability.
    fn carrier(&self, candidate: u32) -> u8 {
        let candidate = &self.candidates[candidate as usize];
        let evidence = self.candidates[candidate.parent as usize].evidence;
        let weights = &self.evidence[evidence as usize].weights;
        let parts = candidate.probs.iter().zip(weights).map(|(prob, weight)| prob * weight);
        let best = parts.enumerate().fold((0, 0.0), |best, part| if part.1 > best.1 { part } else { best });
        best.0 as u8
    }

    /// Adds the last token's usual successors, as far as they are worth it.
    fn add_successors(&mut self, node: u32, evidence: &Evidence) {
        let reach = self.candidates[node as usize].path * evidence.weights[source::SUCCESSORS];
        for i in 0..self.scratch.successors.len() {
            let (token, share) = self.scratch.successors[i];
            let child = if reach * share >= WORTH_OFFERING {
                Some(self.child(node, token))
            } else {
                self.scratch.table.find(token, &self.candidates).ok()
            };
            if let Some(child) = child {
                let candidate = &mut self.candidates[child as usize];
                candidate.classes[source::SUCCESSORS] = 0;
                candidate.probs[source::SUCCESSORS] = share;
            }
        }
    }

    fn child(&mut self, node: u32, token: Token) -> u32 {
        child(node, token, &mut self.candidates, &mut self.scratch.origins, &mut self.scratch.table)
    }

    /// Mixes the sources, refines the result and puts the candidates on the frontier.
    fn refine(&mut self, node: u32, start: usize, inputs: &Inputs, evidence: &Evidence) {
        let above = self.candidates[node as usize].path;
        let mut total = 0.0;
        for candidate in &mut self.candidates[start..] {
            let parts = candidate.probs.iter().zip(evidence.weights);
            candidate.mixed = parts.map(|(prob, weight)| prob * weight).sum::<f32>().min(1.0);
            candidate.path = candidate.mixed;
            if candidate.mixed >= LEAST_REFINED {
                let unseen =
                    [source::REQUEST, source::LOWER].iter().all(|&s| candidate.classes[s] == NO_CLASS);
                let newest = if unseen { inputs.index.newest(0, &[candidate.token]) } else { NONE };
                if newest != NONE {
                    candidate.occurrence = Occurrence::ago(inputs.index.tokens().len() - newest as usize);
                }
                let support = candidate.support(evidence);
                candidate.refined = inputs.model.refine(support, candidate.mixed);
                candidate.path = inputs.calibration.correct(support.kind(), candidate.refined);
            }
            total += candidate.path;
        }
        let scale = above / total.max(1.0);
        let Candidate { token: last, depth, .. } = self.candidates[node as usize];
        let (length, order) = lower(depth + 1);
        let mut seen = 0;
        for (child, candidate) in (start as u32..).zip(&mut self.candidates[start..]) {
            candidate.path *= scale;
            self.scratch.frontier.push(child, candidate.path);
            if candidate.path >= WORTH_LOWER {
                // looked for early: the processor fetches the place before it is needed
                let newest = inputs.index.newest(order, &[candidate.token, last][..length]);
                seen ^= if newest == NONE { 0 } else { inputs.index.token(newest) };
                self.scratch.origins[child as usize].lower = newest;
            }
        }
        std::hint::black_box(seen);
    }

    /// Whether the outcome of the last draft is not known yet.
    pub fn awaits_outcome(&self) -> bool {
        self.followed.is_some()
    }

    /// Learns from the tokens that the target has produced after the last draft.
    pub fn learn(
        &mut self,
        model: &mut Model,
        calibration: &mut Calibration,
        tokens: &[Token],
        stats: &mut Stats,
        live: &LiveStore,
    ) {
        if !tokens.is_empty() && self.followed == Some(0) {
            stats.drafts += 1;
            for (&source, &prob) in self.tree.sources.iter().zip(&self.tree.probs) {
                let source = &mut stats.sources[usize::from(source)];
                source.drafted += 1;
                source.predicted += f64::from(prob);
            }
        }
        for &token in tokens {
            let Some(at) = self.followed.take() else { return };
            let expanded = &self.candidates[at as usize];
            // the last node of a budget is not expanded, nor is what was cut off
            if i32::from(expanded.node) >= self.budget as i32 - 1 {
                return;
            }
            let Some(evidence) = self.evidence.get(expanded.evidence as usize) else { return };
            let children = evidence.children.0..evidence.children.1;
            self.followed = children.clone().find(|&child| self.candidates[child as usize].token == token);
            let truth = self.followed.map(|child| &self.candidates[child as usize]);
            let soft = &self.soft[evidence.soft.0 as usize..evidence.soft.1 as usize];
            for (source, bounds) in evidence.contexts.windows(2).enumerate() {
                let contexts = &self.contexts[bounds[0] as usize..bounds[1] as usize];
                let held = match source {
                    source::SOFT => soft.iter().find(|said| said.0 == token).map_or(NO_CLASS, |said| said.2),
                    _ => truth.map_or(NO_CLASS, |truth| truth.classes[source]),
                };
                // only down to the longest context that held the truth: shorter ones were not asked
                for &(class, cell) in contexts {
                    let escaped = held == NO_CLASS || held < class;
                    model.learn_escape(cell, escaped);
                    if !escaped {
                        break;
                    }
                }
            }
            if let Some(truth) = truth.filter(|truth| truth.mixed > 0.0) {
                for (source, gate) in evidence.gates.iter().enumerate() {
                    if let &Some(cell) = gate {
                        let weight = evidence.weights[source];
                        model.learn_gate(cell, weight * truth.probs[source] / truth.mixed - weight);
                    }
                }
            }
            for candidate in &self.candidates[children.start as usize..children.end as usize] {
                if candidate.mixed >= LEAST_REFINED {
                    let support = candidate.support(evidence);
                    model.learn_refinement(support, candidate.mixed, candidate.token == token);
                    let kind = support.kind();
                    let error = calibration.note(kind, candidate.refined, candidate.token == token);
                    model.learn_age(self.age, kind, error);
                }
            }
            calibration.learn();
            if let Some(node) = truth.and_then(|truth| usize::try_from(truth.node).ok())
                && node < self.tree.len()
            {
                stats.sources[usize::from(self.tree.sources[node])].accepted += 1;
                self.credits
                    .iter()
                    .filter(|credit| credit.0 == node as u32)
                    .for_each(|credit| live.credit(credit.1));
            }
        }
    }

    pub fn memory_bytes(&self) -> usize {
        fn bytes<T>(items: &Vec<T>) -> usize {
            items.capacity() * size_of::<T>()
        }
        bytes(&self.candidates)
            + bytes(&self.evidence)
            + bytes(&self.soft)
            + bytes(&self.contexts)
            + bytes(&self.credits)
            + self.tree.memory_bytes()
    }
}

/// The length of the context that is looked up at a node, and its index in [`ORDERS`].
fn lower(depth: u16) -> (usize, usize) {
    let length = LOWER_LENGTH.min(usize::from(depth));
    (length, ORDERS.partition_point(|&order| order < length))
}

/// The candidate for `token` under `node`, created if it is new.
fn child(
    node: u32,
    token: Token,
    candidates: &mut Vec<Candidate>,
    origins: &mut Vec<Origin>,
    table: &mut TokenTable,
) -> u32 {
    table.find(token, candidates).unwrap_or_else(|slot| {
        let candidate = candidates.len() as u32;
        candidates.push(Candidate::new(token, node, candidates[node as usize].depth + 1));
        origins.push(NOWHERE);
        table.insert(slot, candidate);
        candidate
    })
}

/// From token to candidate, for the expansion at hand; cleared in constant time.
#[derive(Clone, Default)]
struct TokenTable {
    /// The expansion that filled the slot, and the candidate.
    slots: Vec<(u32, u32)>,
    expansion: u32,
}

impl TokenTable {
    fn clear(&mut self) {
        self.expansion = self.expansion.wrapping_add(1);
        if self.slots.is_empty() || self.expansion == 0 {
            self.slots.clear();
            self.slots.resize(SLOTS, (0, 0));
            self.expansion = 1;
        }
    }

    /// The candidate for `token`, or the slot where it belongs.
    fn find(&self, token: Token, candidates: &[Candidate]) -> Result<u32, usize> {
        let mut slot = (token.wrapping_mul(0x9e37_79b1) >> 21) as usize;
        loop {
            let (expansion, candidate) = self.slots[slot];
            if expansion != self.expansion {
                return Err(slot);
            }
            if candidates[candidate as usize].token == token {
                return Ok(candidate);
            }
            slot = (slot + 1) % SLOTS;
        }
    }

    fn insert(&mut self, slot: usize, candidate: u32) {
        self.slots[slot] = (self.expansion, candidate);
    }
}
