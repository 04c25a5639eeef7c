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
use crate::model::{CLASSES, EscapeCell, GateCell, MAX_LENGTH, Model, Occurrence, Support, class, source};
use crate::soft::{Recent, SOFT_ORDERS, SoftTable};
use crate::tree::{DraftTree, ROOT};

/// Occurrences looked at in the request, at the root and at each further node.
const REQUEST_SAMPLES: usize = 64;
const LOWER_SAMPLES: usize = 8;
/// Longest context looked up at nodes other than the root, as an index of [`ORDERS`].
const LOWER_ORDERS: usize = 2;
/// Less probable nodes are not worth that look-up.
const WORTH_LOWER: f32 = 0.02;
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
/// No refinement raises a probability by more than about this factor.
const MOST_GAIN: f32 = 2.0;
/// Contexts to have room for at a node, so that few drafts need more.
const CONTEXTS: usize = 24;
/// Class of matches that need no shorter contexts beside them.
const COPY: u8 = 7;
/// Slots of the token table; more than the candidates that one expansion can have.
const SLOTS: usize = 2048;
const NO_CLASS: u8 = u8::MAX;

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

/// A token that may follow a node; a node itself once it is the most probable one left.
#[derive(Clone, Copy)]
struct Candidate {
    token: Token,
    parent: u32,
    /// Its index in the tree.
    node: i32,
    depth: u32,
    /// Probability given the parent, before refinement.
    mixed: f32,
    /// The same after refinement by the model.
    refined: f32,
    /// Probability of the path from the root.
    path: f32,
    occurrence: Occurrence,
    /// For each source, the class of the longest context that the token followed.
    classes: [u8; source::COUNT],
    /// Probability given by each source.
    probs: [f32; source::COUNT],
    /// First of its samples.
    samples: u32,
    /// Its children and the evidence for them, once it has been expanded.
    children: (u32, u32),
    evidence: u32,
}

impl Candidate {
    fn new(token: Token, parent: u32, depth: u32) -> Self {
        Self {
            token,
            parent,
            node: ROOT,
            depth,
            mixed: 0.0,
            refined: 0.0,
            path: 1.0,
            occurrence: Occurrence::Never,
            classes: [NO_CLASS; source::COUNT],
            probs: [0.0; source::COUNT],
            samples: NONE,
            children: (0, 0),
            evidence: NONE,
        }
    }

    fn support(&self, evidence: &Evidence) -> Support {
        let class = |source: usize| (self.classes[source] != NO_CLASS).then_some(self.classes[source]);
        Support {
            classes: std::array::from_fn(class),
            speaks: std::array::from_fn(|source| evidence.gates[source].is_some()),
            occurrence: self.occurrence,
            successor: class(source::SUCCESSORS).is_some(),
        }
    }
}

/// What the prediction after an expanded node was made of, kept for learning.
#[derive(Clone, Default)]
struct Evidence {
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
    samples: Vec<Sample>,
    candidates: Vec<Candidate>,
    evidence: Vec<Evidence>,
    /// The blended sources' contexts at each expanded node, longest first: class and cell.
    contexts: Vec<(u8, EscapeCell)>,
    /// Tokens that the target held probable, with probability and class.
    soft: Vec<(Token, f32, u8)>,
    tree: DraftTree,
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
    matches: Vec<Match>,
    /// Tokens read from the datastore.
    read: Vec<Token>,
    successors: Vec<(Token, f32)>,
    /// Sample, candidate and class of each vote in the expansion at hand.
    votes: Vec<(u32, u32, u8)>,
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
        self.samples.clear();
        self.candidates.clear();
        self.evidence.clear();
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
            self.candidates[best as usize].node = self.tree.len() as i32;
            let source = self.carrier(best);
            self.tree.push(token, self.candidates[parent as usize].node, path, source);
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
            let mut position = index.previous(order, last as u32);
            while position != NONE && self.samples.len() < REQUEST_SAMPLES && steps > 0 {
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

    /// Collects occurrences in the request of the node's own last tokens, where they follow other tokens than
    /// on the node's path: shorter contexts than those of the samples.
    fn gather_lower(&mut self, node: u32, index: &Index) {
        const LONGEST: usize = ORDERS[LOWER_ORDERS - 1];
        let mut context = [0; LONGEST + 1];
        let mut known = 0;
        let mut above = node;
        while known < context.len() && above != NONE {
            context[known] = self.candidates[above as usize].token;
            known += 1;
            above = self.candidates[above as usize].parent;
        }
        let depth = self.candidates[node as usize].depth as usize;
        let (first, mut steps) = (self.samples.len(), 2 * LOWER_SAMPLES);
        let mut longer = (depth + 1).min(context.len());
        for order in (0..LOWER_ORDERS).rev().filter(|&order| ORDERS[order] <= depth) {
            let mut position = index.newest(order, &context[..known]);
            while position != NONE && self.samples.len() < first + LOWER_SAMPLES && steps > 0 {
                steps -= 1;
                let length = index.match_length(position, &context[..known]);
                if (1..longer).contains(&length) {
                    self.add_request_sample(node, source::LOWER, index, position, length);
                }
                position = index.previous(order, position);
            }
            longer = ORDERS[order];
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
            self.read_on(&mut sample, corpus, FIRST_READ);
            self.add_sample(0, sample);
        }
        self.scratch.matches = matches;
    }

    /// Reads the sample's next tokens from its corpus.
    fn read_on(&mut self, sample: &mut Sample, corpus: &dyn Corpus, count: usize) {
        let start = self.scratch.read.len();
        self.scratch.read.resize(start + count, 0);
        let read = corpus.continuation(sample.rest, &mut self.scratch.read[start..]);
        self.scratch.read.truncate(start + read);
        sample.cursor = start as u32;
        sample.end = (start + read) as u32;
        sample.rest += read as u64;
        sample.ended = read < count;
    }

    fn add_sample(&mut self, candidate: u32, mut sample: Sample) {
        let first = &mut self.candidates[candidate as usize].samples;
        sample.next = std::mem::replace(first, self.samples.len() as u32);
        self.samples.push(sample);
    }

    /// Predicts what follows `node` and puts the predicted tokens on the frontier.
    fn expand(&mut self, node: u32, inputs: &Inputs) {
        let start = self.candidates.len();
        self.scratch.table.clear();
        let mut evidence = Evidence::default();
        self.vote(node, inputs);
        let classes = self.blend(start, inputs.model, &mut evidence);
        self.soften(node, inputs, &mut evidence);
        self.scratch.successors.clear();
        if let Some(store) = inputs.store {
            store.successors(self.candidates[node as usize].token, &mut self.scratch.successors);
        }
        self.weigh(start, &classes, inputs.model, &mut evidence);
        self.add_soft(node, &evidence);
        self.add_successors(node, &evidence);
        self.refine(node, start, inputs, &evidence);
        let expanded = &mut self.candidates[node as usize];
        expanded.children = (start as u32, 0);
        expanded.evidence = self.evidence.len() as u32;
        self.candidates[node as usize].children.1 = self.candidates.len() as u32;
        self.evidence.push(evidence);
    }

    /// Hands each sample of `node` on to the candidate for its next token.
    fn vote(&mut self, node: u32, inputs: &Inputs) {
        self.scratch.votes.clear();
        let mut next = self.candidates[node as usize].samples;
        while next != NONE {
            let current = next;
            let mut sample = self.samples[current as usize];
            next = sample.next;
            if sample.cursor == sample.end {
                match inputs.corpus(sample.source) {
                    Some(corpus) if !sample.ended => self.read_on(&mut sample, corpus, NEXT_READ),
                    _ => continue,
                }
                if sample.cursor == sample.end {
                    continue;
                }
            }
            let source = usize::from(sample.source);
            let token = match source {
                source::STORE | source::LIVE => self.scratch.read[sample.cursor as usize],
                _ => inputs.index.token(sample.cursor),
            };
            let child = self.child(node, token);
            let class = class(sample.length) as u8;
            let candidate = &mut self.candidates[child as usize];
            let held = &mut candidate.classes[source];
            if *held == NO_CLASS || *held < class {
                *held = class;
            }
            sample.cursor += 1;
            sample.length = match source {
                source::ALIGNED => agreed(sample.length),
                _ => sample.length + 1,
            }
            .min(MAX_LENGTH as u16);
            sample.next = std::mem::replace(&mut candidate.samples, current);
            self.samples[current as usize] = sample;
            self.scratch.votes.push((current, child, class));
        }
    }

    /// Turns votes into the probability that each sampled source gives each candidate. Returns the longest class
    /// of each source.
    fn blend(
        &mut self,
        start: usize,
        model: &Model,
        evidence: &mut Evidence,
    ) -> [Option<usize>; source::SAMPLED] {
        let mut counts = [[0.0f32; CLASSES]; source::SAMPLED];
        let mut distinct = [[0u32; CLASSES]; source::SAMPLED];
        let mut longest = [None; source::SAMPLED];
        // most sources and classes have nothing to say: a bit for each class that has
        let mut held = [0u32; source::SAMPLED];
        for &(sample, _, class) in &self.scratch.votes {
            let sample = &self.samples[sample as usize];
            let source = usize::from(sample.source);
            counts[source][usize::from(class)] += sample.weight;
            held[source] |= 1 << class;
        }
        // the vote of one occurrence of each class
        let mut value = [[0.0f32; CLASSES]; source::SAMPLED];
        for source in 0..source::SAMPLED {
            evidence.contexts[source] = self.contexts.len() as u32;
            longest[source] = held[source].checked_ilog2().map(|class| class as usize);
            if held[source] == 0 {
                continue;
            }
            for candidate in &self.candidates[start..] {
                if candidate.classes[source] != NO_CLASS {
                    distinct[source][usize::from(candidate.classes[source])] += 1;
                }
            }
            // a longer match in the request is a shorter one too; the datastore samples each length anew
            let nested = !matches!(source, source::STORE | source::ALIGNED);
            let (mut count, mut seen, mut rest) = (0.0, 0, 1.0);
            let mut left = held[source];
            while let Some(class) = left.checked_ilog2().map(|class| class as usize) {
                left ^= 1 << class;
                count = if nested { count + counts[source][class] } else { counts[source][class] };
                seen += distinct[source][class];
                let cell = Model::escape_cell(source, class, count, seen);
                let escape = model.escape(cell);
                value[source][class] = rest * (1.0 - escape) / count;
                rest *= escape;
                self.contexts.push((class as u8, cell));
            }
            if nested {
                let (mut left, mut shorter) = (held[source], 0.0);
                while left != 0 {
                    let class = left.trailing_zeros() as usize;
                    left &= left - 1;
                    value[source][class] += shorter;
                    shorter = value[source][class];
                }
            }
        }
        for &(sample, child, class) in &self.scratch.votes {
            let sample = &self.samples[sample as usize];
            let source = usize::from(sample.source);
            self.candidates[child as usize].probs[source] +=
                sample.weight * value[source][usize::from(class)];
        }
        longest
    }

    /// Gives each source its weight: a softmax over those that have anything to say.
    fn weigh(
        &self,
        start: usize,
        classes: &[Option<usize>; source::SAMPLED],
        model: &Model,
        evidence: &mut Evidence,
    ) {
        for (source, class) in classes.iter().enumerate() {
            if let &Some(class) = class {
                let probs = self.candidates[start..].iter().map(|candidate| candidate.probs[source]);
                let peak = probs.fold(0.0, f32::max);
                evidence.gates[source] = Some(Model::gate_cell(source, class, peak));
            }
        }
        if let Some(&(class, _)) = self.contexts.get(evidence.contexts[source::SOFT] as usize) {
            let said = &self.soft[evidence.soft.0 as usize..evidence.soft.1 as usize];
            let peak = said.iter().map(|&(_, prob, _)| prob).fold(0.0, f32::max);
            evidence.gates[source::SOFT] = Some(Model::gate_cell(source::SOFT, usize::from(class), peak));
        }
        if let Some(&(_, peak)) = self.scratch.successors.first() {
            evidence.gates[source::SUCCESSORS] = Some(Model::gate_cell(source::SUCCESSORS, 0, peak));
        }
        let mut total = 0.0;
        for (weight, gate) in evidence.weights.iter_mut().zip(evidence.gates) {
            *weight = gate.map_or(0.0, |cell| model.gate(cell).exp());
            total += *weight;
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

    /// Adds what the target held probable, as far as it may become nodes.
    fn add_soft(&mut self, node: u32, evidence: &Evidence) {
        let reach = self.candidates[node as usize].path * evidence.weights[source::SOFT] * MOST_GAIN;
        for at in evidence.soft.0..evidence.soft.1 {
            let (token, prob, class) = self.soft[at as usize];
            let child = if reach * prob >= self.scratch.frontier.floor() {
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

    /// The source that contributes most to a candidate's probability.
    fn carrier(&self, candidate: u32) -> u8 {
        let candidate = &self.candidates[candidate as usize];
        let evidence = self.candidates[candidate.parent as usize].evidence;
        let weights = &self.evidence[evidence as usize].weights;
        let parts = candidate.probs.iter().zip(weights).map(|(prob, weight)| prob * weight);
        let best = parts.enumerate().fold((0, 0.0), |best, part| if part.1 > best.1 { part } else { best });
        best.0 as u8
    }

    /// Adds the last token's usual successors, as far as they may become nodes.
    fn add_successors(&mut self, node: u32, evidence: &Evidence) {
        let reach = self.candidates[node as usize].path * evidence.weights[source::SUCCESSORS] * MOST_GAIN;
        for i in 0..self.scratch.successors.len() {
            let (token, share) = self.scratch.successors[i];
            let child = if reach * share >= self.scratch.frontier.floor() {
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
        for (child, candidate) in (start as u32..).zip(&mut self.candidates[start..]) {
            candidate.path *= scale;
            self.scratch.frontier.push(child, candidate.path);
        }
    }

    /// The candidate for `token` under `node`, created if it is new.
    fn child(&mut self, node: u32, token: Token) -> u32 {
        match self.scratch.table.find(token, &self.candidates) {
            Ok(candidate) => candidate,
            Err(slot) => {
                let depth = self.candidates[node as usize].depth + 1;
                let candidate = self.candidates.len() as u32;
                self.candidates.push(Candidate::new(token, node, depth));
                self.scratch.table.insert(slot, candidate);
                candidate
            }
        }
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
            if expanded.node >= self.budget as i32 - 1 {
                return;
            }
            let Some(evidence) = self.evidence.get(expanded.evidence as usize) else { return };
            let children = expanded.children.0..expanded.children.1;
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
                self.credit(truth.map_or(NONE, |truth| truth.samples), live);
            }
        }
    }

    /// Tells the live store that a document was of use.
    fn credit(&self, mut sample: u32, live: &LiveStore) {
        while let Some(at) = self.samples.get(sample as usize) {
            if usize::from(at.source) == source::LIVE {
                return live.credit(at.rest - 1);
            }
            sample = at.next;
        }
    }

    pub fn memory_bytes(&self) -> usize {
        fn bytes<T>(items: &Vec<T>) -> usize {
            items.capacity() * size_of::<T>()
        }
        bytes(&self.samples)
            + bytes(&self.candidates)
            + bytes(&self.evidence)
            + bytes(&self.soft)
            + bytes(&self.contexts)
            + self.tree.memory_bytes()
    }
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
