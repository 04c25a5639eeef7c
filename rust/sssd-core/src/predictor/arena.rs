//! The memory of a draft, used again by the next one: candidates, what each expanded node's prediction was made of, and
//! the samples that predict.

use crate::Token;
use crate::index::{NONE, Seed};
use crate::memory::{make_room, push};
use crate::predictor::frontier::Frontier;
use crate::predictor::guest::Heard;
use crate::predictor::support::{Occurrence, Support};
use crate::predictor::weights::{EscapeCell, GateCell};
use crate::sources::corpus::{Corpus, DOMAINS, Match};
use crate::sources::{self, BLENDED, CLASSES, LIVE, NO_CLASS, SAMPLED};
use crate::tree::ROOT;

/// Slots of the token table; more than the candidates that one expansion can have.
const SLOTS: usize = 2048;

/// What is kept until the outcome of a draft is known.
#[derive(Clone, Default)]
pub struct Arena {
    pub candidates: Vec<Candidate>,
    pub expansions: Vec<Expansion>,
    /// The blended sources' contexts at each expanded node, longest first: class and cell.
    pub contexts: Vec<(u8, EscapeCell)>,
    /// Tokens that the target held probable, with probability and class.
    pub said: Vec<(Token, f32, u8)>,
    /// Tokens that a draft from outside names.
    pub heard: Vec<Heard>,
    /// What the domains of the datastore say after probable nodes, if it has several.
    pub voices: Vec<Voice>,
}

/// Memory that is of no use between drafts: one set serves many sequences and stays near the processor.
#[derive(Clone, Default)]
pub struct Scratch {
    pub frontier: Frontier,
    pub samples: Vec<Sample>,
    /// Where each candidate's evidence begins.
    pub origins: Vec<Origin>,
    pub matches: Vec<Match>,
    /// Tokens read from corpora.
    pub read: Vec<Token>,
    /// Of the expansion at hand.
    pub successors: Vec<(Token, f32)>,
    pub votes: Vec<Vote>,
    pub table: TokenTable,
    /// Look-ups in corpora that nodes beyond the root have had.
    pub lookups: usize,
}

/// A token that may follow a node; a node itself once it is the most probable one left. One line of the cache.
#[derive(Clone, Copy)]
pub struct Candidate {
    pub token: Token,
    pub parent: u32,
    /// Probability given the parent, before refinement.
    pub mixed: f32,
    /// The same after refinement by the model.
    pub refined: f32,
    /// Probability of the path from the root.
    pub path: f32,
    /// Its row of [`Arena::expansions`], once it has been expanded.
    pub expansion: u32,
    /// Its index in the tree.
    pub node: i16,
    pub depth: u16,
    /// Probability given by each source.
    pub probs: [f32; sources::COUNT],
    /// For each source, the class of the longest context that the token followed.
    pub classes: [u8; sources::COUNT],
    pub occurrence: Occurrence,
}

const _: () = assert!(size_of::<Candidate>() == 64);

impl Candidate {
    pub fn new(token: Token, parent: u32, depth: u16) -> Self {
        Self {
            token,
            parent,
            mixed: 0.0,
            refined: 0.0,
            path: 1.0,
            expansion: NONE,
            node: ROOT as i16,
            depth,
            probs: [0.0; sources::COUNT],
            classes: [NO_CLASS; sources::COUNT],
            occurrence: Occurrence::Never,
        }
    }

    /// What speaks for it, where the sources of the bits in `speaks` say anything.
    pub fn support(&self, speaks: u8) -> Support {
        Support { classes: self.classes, speaks, occurrence: self.occurrence }
    }
}

/// What the prediction after an expanded node was made of, kept for learning.
#[derive(Clone, Default)]
pub struct Expansion {
    /// The node's children in [`Arena::candidates`].
    pub children: (u32, u32),
    /// A bit for each source that has anything to say.
    pub speaks: u8,
    /// Where the contexts of each blended source begin in [`Arena::contexts`], and where the last ones end.
    pub contexts: [u32; BLENDED + 1],
    /// What the target held probable after such contexts, in [`Arena::said`].
    pub said: (u32, u32),
    /// What a draft from outside names, in [`Arena::heard`], and its place and that of the rules of what is allowed.
    pub heard: (u32, u32),
    pub guest: u32,
    pub allowed: u32,
    /// What the datastore's domains say, in [`Arena::voices`].
    pub voices: (u32, u32),
    pub gates: [Option<GateCell>; sources::COUNT],
    pub weights: [f32; sources::COUNT],
}

/// An earlier occurrence of a node's context.
#[derive(Clone, Copy)]
pub struct Sample {
    /// The predicted token, as an index into the request's tokens or into [`Scratch::read`].
    pub cursor: u32,
    pub end: u32,
    /// The next sample of the same candidate.
    pub next: u32,
    /// Matched tokens, at most `MAX_LENGTH`.
    pub length: u16,
    pub source: u8,
    /// Of the source's corpus.
    pub domain: u8,
    /// Whether nothing follows `end`.
    pub ended: bool,
    pub weight: f32,
    /// Where the corpus goes on after `end`.
    pub rest: u64,
}

impl Sample {
    /// A place in the request.
    pub fn in_request(source: usize, cursor: u32, end: u32, length: u16) -> Self {
        let source = source as u8;
        Self { cursor, end, next: NONE, length, source, domain: 0, ended: true, weight: 1.0, rest: 0 }
    }

    /// A place in a corpus, of which nothing has been read yet.
    pub fn in_corpus(source: usize, found: &Match) -> Self {
        Self {
            cursor: 0,
            end: 0,
            next: NONE,
            length: found.length as u16,
            source: source as u8,
            domain: found.domain.min(DOMAINS as u8 - 1),
            ended: false,
            weight: found.weight,
            rest: found.position,
        }
    }

    /// Reads the next tokens from the corpus.
    pub fn read_on(&mut self, read: &mut Vec<Token>, corpus: &dyn Corpus, count: usize) {
        let start = read.len();
        make_room(read, count);
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
pub struct Vote {
    pub candidate: u32,
    pub weight: f32,
    pub source: u8,
    pub class: u8,
    pub domain: u8,
}

/// What a domain of the datastore says of a candidate: what a sample after a context of this class counts.
#[derive(Clone, Copy)]
pub struct Voice {
    pub candidate: u32,
    pub weight: f32,
    pub class: u8,
    pub domain: u8,
}

/// The votes of an expansion by source and class.
#[derive(Default)]
pub struct Tally {
    pub counts: [[f32; CLASSES]; SAMPLED],
    /// Candidates by the longest context that they followed.
    pub distinct: [[u32; CLASSES]; SAMPLED],
    /// A bit for each class that has any.
    pub held: [u32; SAMPLED],
}

/// Where a candidate's evidence begins.
#[derive(Clone, Copy)]
pub struct Origin {
    /// First of its samples: a list through [`Sample::next`], the last one added first.
    pub samples: u32,
    /// Newest occurrence of its own last tokens in the request, once it is likely enough to be looked for.
    pub lower: u32,
}

const NOWHERE: Origin = Origin { samples: NONE, lower: NONE };

impl Arena {
    pub fn clear(&mut self) {
        self.candidates.clear();
        self.expansions.clear();
        self.contexts.clear();
        self.said.clear();
        self.heard.clear();
        self.voices.clear();
    }

    pub fn memory_bytes(&self) -> usize {
        fn bytes<T>(items: &Vec<T>) -> usize {
            items.capacity() * size_of::<T>()
        }
        let own = bytes(&self.candidates) + bytes(&self.expansions) + bytes(&self.contexts);
        own + bytes(&self.said) + bytes(&self.heard) + bytes(&self.voices)
    }
}

impl Scratch {
    /// Begins a draft with a root that has no evidence yet.
    pub fn start(&mut self) {
        self.samples.clear();
        self.origins.clear();
        push(&mut self.origins, NOWHERE);
        self.read.clear();
        self.lookups = 0;
    }

    pub fn memory_bytes(&self) -> usize {
        fn bytes<T>(items: &Vec<T>) -> usize {
            items.capacity() * size_of::<T>()
        }
        let samples = bytes(&self.samples) + bytes(&self.origins) + bytes(&self.matches) + bytes(&self.read);
        let expansion = bytes(&self.successors) + bytes(&self.votes);
        size_of::<Self>() + self.frontier.memory_bytes() + samples + expansion + bytes(&self.table.slots)
    }

    /// Where the live store goes on after a candidate's own token, for the newest of its samples that come from there.
    pub fn live_position(&self, candidate: u32) -> Option<u64> {
        let mut next = self.origins[candidate as usize].samples;
        while let Some(sample) = self.samples.get(next as usize) {
            if usize::from(sample.source) == LIVE {
                return Some(sample.rest - 1);
            }
            next = sample.next;
        }
        None
    }

    /// Makes a sample the first of a candidate.
    pub fn add_sample(&mut self, candidate: u32, mut sample: Sample) {
        let first = &mut self.origins[candidate as usize].samples;
        sample.next = std::mem::replace(first, self.samples.len() as u32);
        push(&mut self.samples, sample);
    }
}

/// The candidate for `token` under `node`, created if it is new.
pub fn child(
    node: u32,
    token: Token,
    candidates: &mut Vec<Candidate>,
    origins: &mut Vec<Origin>,
    table: &mut TokenTable,
) -> u32 {
    table.find(token, candidates).unwrap_or_else(|slot| {
        let candidate = candidates.len() as u32;
        let depth = candidates[node as usize].depth + 1;
        push(candidates, Candidate::new(token, node, depth));
        push(origins, NOWHERE);
        table.insert(slot, candidate);
        candidate
    })
}

/// From token to candidate, for the expansion at hand; cleared in constant time.
#[derive(Clone, Default)]
pub struct TokenTable {
    /// The expansion that filled the slot, and the candidate.
    slots: Vec<(u32, u32)>,
    expansion: u32,
    /// Where a token has its slot is secret: no choice of tokens crowds slots together.
    seed: Seed,
}

impl TokenTable {
    pub fn clear(&mut self) {
        self.expansion = self.expansion.wrapping_add(1);
        if self.slots.is_empty() || self.expansion == 0 {
            self.slots.clear();
            make_room(&mut self.slots, SLOTS);
            self.slots.resize(SLOTS, (0, 0));
            self.expansion = 1;
        }
    }

    /// The candidate for `token`, or the slot where it belongs.
    pub fn find(&self, token: Token, candidates: &[Candidate]) -> Result<u32, usize> {
        let mut slot = self.seed.spread(token) % SLOTS;
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
