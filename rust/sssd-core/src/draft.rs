//! Grows a draft tree from samples of earlier occurrences, most probable node first.
//!
//! A *sample* is an earlier place where the end of the context occurred; it predicts the token that followed.
//! The samples of a node are those of its parent that agree with the node's token, so the tree is built inside
//! the samples found once at the root. At each node the samples' votes are blended over match lengths k as in
//! prediction by partial matching: `p_k(t) = (1 - e_k) c_k(t) / n_k + e_k p_{k-1}(t)`.

use std::collections::BinaryHeap;

use crate::index::{Index, NONE, ORDERS};
use crate::model::{CLASSES, Model, REQUEST, SOURCES, STORE, class};
use crate::tree::{DraftTree, ROOT};
use crate::{Corpus, Match, Token};

const MAX_LENGTH: u32 = 32;
const STORE_CHUNK: usize = 12;
const NO_CELL: u16 = u16::MAX;

#[derive(Clone, Copy)]
struct Sample {
    /// Index of the predicted token in the source's text.
    cursor: u32,
    end: u32,
    /// The next sample of the same candidate.
    next: u32,
    length: u16,
    source: u8,
    weight: f32,
    /// Where the store goes on after `end`.
    position: u64,
}

/// A token that may follow a node. Becomes a node itself once it is the most probable one left.
#[derive(Clone, Copy)]
struct Candidate {
    token: Token,
    parent: u32,
    node: i32,
    path: f32,
    depth: u16,
    /// The longest class of each source that holds the token; `NO_CLASS` if none.
    classes: [u8; SOURCES],
    probs: [f32; SOURCES],
    samples: u32,
    children: (u32, u32),
    evidence: u32,
}

/// What an expanded node's prediction was made of, kept for learning.
#[derive(Clone, Copy)]
struct Evidence {
    cells: [[u16; CLASSES]; SOURCES],
    gates: [u16; SOURCES],
    weights: [f32; SOURCES],
}

const NO_CLASS: u8 = u8::MAX;

/// Reusable memory of a sequence's drafts, and the last draft itself until its outcome is known.
#[derive(Clone, Default)]
pub struct Drafting {
    samples: Vec<Sample>,
    candidates: Vec<Candidate>,
    evidence: Vec<Evidence>,
    heap: BinaryHeap<u64>,
    matches: Vec<Match>,
    buffer: Vec<Token>,
    /// Hash table from token to candidate for the expansion at hand.
    slots: Vec<(u32, u32)>,
    stamp: u32,
    votes: Vec<(u32, u32, u8)>,
    /// The node that the target's output has followed so far.
    followed: Option<u32>,
}

pub struct Limits<'a> {
    pub max_nodes: usize,
    pub end_tokens: &'a [Token],
    pub min_prob: f32,
}

const SLOTS: usize = 1024;

impl Drafting {
    pub fn memory_bytes(&self) -> usize {
        self.samples.capacity() * size_of::<Sample>()
            + self.candidates.capacity() * size_of::<Candidate>()
            + self.evidence.capacity() * size_of::<Evidence>()
            + self.heap.capacity() * 8
            + self.matches.capacity() * size_of::<Match>()
            + self.buffer.capacity() * 4
            + self.slots.capacity() * 8
            + self.votes.capacity() * 12
    }

    /// Learns from the tokens that the target has produced after the last draft.
    pub fn learn(&mut self, model: &mut Model, tokens: &[Token]) {
        for &token in tokens {
            let Some(at) = self.followed else { return };
            let candidate = self.candidates[at as usize];
            if candidate.evidence == NONE {
                self.followed = None;
                return;
            }
            let evidence = &self.evidence[candidate.evidence as usize];
            let (start, end) = candidate.children;
            let child = (start..end).find(|&child| self.candidates[child as usize].token == token);
            let found = child.map(|child| self.candidates[child as usize]);
            for source in 0..SOURCES {
                let held = found.map_or(NO_CLASS, |found| found.classes[source]);
                for class in (0..CLASSES).rev() {
                    let cell = evidence.cells[source][class];
                    if cell == NO_CELL {
                        continue;
                    }
                    let hit = held != NO_CLASS && held as usize >= class;
                    model.learn_escape(cell, !hit);
                    if hit {
                        break;
                    }
                }
            }
            if let Some(found) = found {
                let total: f32 = (0..SOURCES).map(|s| evidence.weights[s] * found.probs[s]).sum();
                if total > 0.0 {
                    for s in 0..SOURCES {
                        if evidence.gates[s] != NO_CELL {
                            let posterior = evidence.weights[s] * found.probs[s] / total;
                            model.learn_gate(evidence.gates[s], posterior - evidence.weights[s]);
                        }
                    }
                }
            }
            self.followed = child;
        }
    }

    pub fn forget(&mut self) {
        self.followed = None;
    }

    pub fn draft(&mut self, index: &Index, store: Option<&dyn Corpus>, model: &Model, limits: &Limits) -> DraftTree {
        self.samples.clear();
        self.candidates.clear();
        self.evidence.clear();
        self.heap.clear();
        self.buffer.clear();
        self.slots.resize(SLOTS, (0, 0));
        self.followed = None;
        let mut tree = DraftTree::default();
        let Some(&last) = index.tokens().last() else { return tree };
        if limits.max_nodes == 0 || limits.end_tokens.contains(&last) {
            return tree;
        }
        self.candidates.push(Candidate {
            token: last,
            parent: NONE,
            node: ROOT,
            path: 1.0,
            depth: 0,
            classes: [NO_CLASS; SOURCES],
            probs: [0.0; SOURCES],
            samples: NONE,
            children: (0, 0),
            evidence: NONE,
        });
        self.gather_request(index, model);
        if let Some(store) = store {
            self.gather_store(index, store);
        }
        self.followed = Some(0);
        self.expand(0, index, store, model, limits);
        while let Some(key) = self.heap.pop() {
            let at = !(key as u32);
            let candidate = &mut self.candidates[at as usize];
            candidate.node = tree.token_ids.len() as i32;
            let (token, path, parent) = (candidate.token, candidate.path, candidate.parent);
            tree.push(token, self.candidates[parent as usize].node, path);
            if tree.len() == limits.max_nodes {
                break;
            }
            if !limits.end_tokens.contains(&token) {
                self.expand(at, index, store, model, limits);
            }
        }
        tree
    }

    /// Collects earlier occurrences of the context in the request, longest match first, newest first.
    fn gather_request(&mut self, index: &Index, model: &Model) {
        let tokens = index.tokens();
        let last = tokens.len() as u32 - 1;
        let cap = if model.tune[2].is_nan() { 64 } else { model.tune[2] as usize };
        let mut steps = 4 * cap;
        let mut longer = usize::MAX;
        for order in (0..ORDERS.len()).rev() {
            let mut position = index.previous(order, last);
            let mut fresh = true;
            while position != NONE && self.samples.len() < cap && steps > 0 {
                steps -= 1;
                let length = match_length(tokens, position, last);
                if (length as usize) < longer && length > 0 {
                    self.add_sample(0, Sample {
                        cursor: position + 1,
                        end: tokens.len() as u32,
                        next: NONE,
                        length: length as u16,
                        source: REQUEST as u8,
                        weight: if fresh { fresh = false; 1.0 + if model.tune[5].is_nan() { 0.0 } else { model.tune[5] } } else { 1.0 },
                        position: 0,
                    });
                }
                position = index.previous(order, position);
            }
            longer = ORDERS[order];
        }
    }

    fn gather_store(&mut self, index: &Index, store: &dyn Corpus) {
        let tokens = index.tokens();
        self.matches.clear();
        store.matches(&tokens[tokens.len().saturating_sub(8)..], 8, 64, &mut self.matches);
        for i in 0..self.matches.len() {
            let found = self.matches[i];
            let cursor = self.buffer.len() as u32;
            self.buffer.resize(self.buffer.len() + STORE_CHUNK, 0);
            let copied = store.continuation(found.position, &mut self.buffer[cursor as usize..]);
            self.add_sample(0, Sample {
                cursor,
                end: cursor + copied as u32,
                next: NONE,
                length: found.length as u16,
                source: STORE as u8,
                weight: found.weight,
                position: if copied == STORE_CHUNK { found.position + copied as u64 } else { u64::MAX },
            });
        }
    }

    fn add_sample(&mut self, candidate: u32, mut sample: Sample) {
        let list = &mut self.candidates[candidate as usize].samples;
        sample.next = *list;
        *list = self.samples.len() as u32;
        self.samples.push(sample);
    }

    /// Looks up the node's own last tokens in the request: shorter contexts than the samples have.
    fn gather_lower(&mut self, at: u32, index: &Index, model: &Model) {
        let cap = if model.tune[3].is_nan() { 8 } else { model.tune[3] as usize };
        if cap == 0 {
            return;
        }
        let tokens = index.tokens();
        let candidate = self.candidates[at as usize];
        let depth = u32::from(candidate.depth);
        // the path, newest token first, then the request's tail
        let mut path = [0; 8];
        let mut known = 0;
        let mut node = at;
        while known < path.len() && node != NONE && node != 0 {
            path[known] = self.candidates[node as usize].token;
            known += 1;
            node = self.candidates[node as usize].parent;
        }
        let mut longer = (depth + 1).min(8);
        let start = self.samples.len();
        let mut steps = 2 * cap;
        for order in (0..2).rev() {
            if ORDERS[order] as u32 > depth {
                continue;
            }
            let mut position = index.newest(order, path[..ORDERS[order]].iter().copied());
            while position != NONE && self.samples.len() < start + cap && steps > 0 {
                steps -= 1;
                let mut length = 0;
                while length < longer
                    && length <= position
                    && (length as usize) < known
                    && tokens[(position - length) as usize] == path[length as usize]
                {
                    length += 1;
                }
                if length < longer && length > 0 {
                    self.add_sample(at, Sample {
                        cursor: position + 1,
                        end: tokens.len() as u32,
                        next: NONE,
                        length: length as u16,
                        source: crate::model::LOWER as u8,
                        weight: 1.0,
                        position: 0,
                    });
                }
                position = index.previous(order, position);
            }
            longer = ORDERS[order] as u32;
        }
    }

    fn expand(&mut self, at: u32, index: &Index, store: Option<&dyn Corpus>, model: &Model, limits: &Limits) {
        if at != 0 {
            self.gather_lower(at, index, model);
        }
        let parent = self.candidates[at as usize];
        let start = self.candidates.len() as u32;
        self.stamp += 1;
        self.votes.clear();
        let mut mass = [[0.0f32; CLASSES]; SOURCES];
        let mut list = parent.samples;
        while list != NONE {
            let sample = self.samples[list as usize];
            let current = list;
            list = sample.next;
            let token = if sample.cursor < sample.end {
                if sample.source as usize != STORE { index.tokens()[sample.cursor as usize] } else { self.buffer[sample.cursor as usize] }
            } else if let (true, Some(store)) = (sample.source as usize == STORE && sample.position != u64::MAX, store) {
                let cursor = self.buffer.len();
                self.buffer.resize(cursor + STORE_CHUNK, 0);
                let copied = store.continuation(sample.position, &mut self.buffer[cursor..]);
                if copied == 0 {
                    continue;
                }
                let s = &mut self.samples[current as usize];
                s.cursor = cursor as u32;
                s.end = (cursor + copied) as u32;
                s.position = if copied == STORE_CHUNK { sample.position + copied as u64 } else { u64::MAX };
                self.buffer[cursor]
            } else {
                continue;
            };
            let child = self.child(at, start, token);
            let class = class(u32::from(sample.length));
            let source = sample.source as usize;
            let c = &mut self.candidates[child as usize];
            if c.classes[source] == NO_CLASS || (c.classes[source] as usize) < class {
                c.classes[source] = class as u8;
            }
            mass[source][class] += sample.weight;
            self.votes.push((current, child, class as u8));
            let s = &mut self.samples[current as usize];
            s.cursor += 1;
            s.length = (s.length + 1).min(MAX_LENGTH as u16);
            s.next = c.samples;
            c.samples = current;
        }
        let end = self.candidates.len() as u32;
        if end == start {
            return;
        }
        // distinct successors per class
        let mut distinct = [[0u32; CLASSES]; SOURCES];
        for c in &self.candidates[start as usize..] {
            for source in 0..SOURCES {
                if c.classes[source] != NO_CLASS {
                    distinct[source][c.classes[source] as usize] += 1;
                }
            }
        }
        let mut evidence =
            Evidence { cells: [[NO_CELL; CLASSES]; SOURCES], gates: [NO_CELL; SOURCES], weights: [0.0; SOURCES] };
        let mut value = [[0.0f32; CLASSES]; SOURCES];
        for source in 0..SOURCES {
            let cumulative = source != STORE;
            let (mut n, mut d, mut rest) = (0.0, 0, 1.0);
            for class in (0..CLASSES).rev() {
                if mass[source][class] == 0.0 {
                    continue;
                }
                n = if cumulative { n + mass[source][class] } else { mass[source][class] };
                d = if cumulative { d + distinct[source][class] } else { d + distinct[source][class] };
                let cell = model.cell(crate::model::depth_bucket(parent.depth), source, class, n, d);
                if evidence.gates[source] == NO_CELL {
                    evidence.gates[source] = model.gate_cell(source, class, n);
                }
                evidence.cells[source][class] = cell;
                let escape = model.escape(cell);
                value[source][class] = rest * (1.0 - escape) / n;
                rest *= escape;
            }
            if cumulative {
                for class in 1..CLASSES {
                    value[source][class] += value[source][class - 1];
                }
            }
        }
        // softmax over the sources that have anything to say
        let mut total = 0.0;
        for source in 0..SOURCES {
            if evidence.gates[source] != NO_CELL {
                evidence.weights[source] = model.gate(evidence.gates[source]).exp();
                total += evidence.weights[source];
            }
        }
        evidence.weights.iter_mut().for_each(|weight| *weight /= total);
        for i in 0..self.votes.len() {
            let (sample, child, class) = self.votes[i];
            let sample = self.samples[sample as usize];
            let source = sample.source as usize;
            self.candidates[child as usize].probs[source] += sample.weight * value[source][class as usize];
        }
        let mut pushed = 0;
        for child in start..end {
            let c = &mut self.candidates[child as usize];
            let p: f32 = (0..SOURCES).map(|s| evidence.weights[s] * c.probs[s]).sum();
            c.path = parent.path * p.min(1.0);
            if c.path >= limits.min_prob {
                self.heap.push(u64::from(c.path.to_bits()) << 32 | u64::from(!child));
                pushed += 1;
            }
        }
        let _ = pushed;
        let c = &mut self.candidates[at as usize];
        c.children = (start, end);
        c.evidence = self.evidence.len() as u32;
        self.evidence.push(evidence);
    }

    /// The candidate for `token` under `parent`, created if it is new. `start` is the parent's first candidate.
    fn child(&mut self, parent: u32, start: u32, token: Token) -> u32 {
        let mut slot = (token.wrapping_mul(0x9e37_79b1) >> 22) as usize;
        loop {
            let (stamp, candidate) = self.slots[slot];
            if stamp != self.stamp {
                break;
            }
            if self.candidates[candidate as usize].token == token {
                return candidate;
            }
            slot = (slot + 1) % SLOTS;
        }
        let _ = start;
        let candidate = self.candidates.len() as u32;
        self.slots[slot] = (self.stamp, candidate);
        let depth = self.candidates[parent as usize].depth + 1;
        self.candidates.push(Candidate {
            token,
            parent,
            node: ROOT,
            path: 0.0,
            depth,
            classes: [NO_CLASS; SOURCES],
            probs: [0.0; SOURCES],
            samples: NONE,
            children: (0, 0),
            evidence: NONE,
        });
        candidate
    }
}

/// How many tokens up to `a` and up to `b` are equal, at most `MAX_LENGTH`.
fn match_length(tokens: &[Token], a: u32, b: u32) -> u32 {
    let limit = (a + 1).min(MAX_LENGTH);
    (0..limit).find(|&i| tokens[(a - i) as usize] != tokens[(b - i) as usize]).unwrap_or(limit)
}
