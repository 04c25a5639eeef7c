//! What the predictor asks of a large, read-only corpus (the datastore implements it).

use std::sync::{Arc, Mutex};

use crate::Token;
use crate::ranking::bilinear::LogBilinear;
use crate::sync::lock;

/// The most domains that the documents of a corpus can be of.
pub const DOMAINS: usize = 16;

/// An occurrence of the end of the context in a corpus, standing for `weight` occurrences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Match {
    /// Where the continuation starts; to be handed to [`Corpus::continuation`].
    pub position: u64,
    /// How many of the context's last tokens this match is a sample for.
    pub length: u32,
    /// Occurrences of that length divided by the samples taken of them (>= 1); of a corpus of several domains times
    /// what an occurrence in its domain counts.
    pub weight: f32,
    /// The domain that it is of.
    pub domain: u8,
}

/// A read-only collection of token documents. A continuation never crosses the end of its document.
pub trait Corpus: Send + Sync {
    /// Appends evenly spread samples of the occurrences of the last `n` tokens of `context`, for every
    /// length `n` that occurs, from the longest (at most `max_length`) down to 2 (1 if 2 does not occur),
    /// at most `max_samples` of each length. Goes no further down once a length has had
    /// `2 * max_samples` occurrences or more. Longest first; the occurrences of a shorter length include those
    /// of the longer ones.
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>);

    /// How many domains its documents are of, their sources, say: at most [`DOMAINS`].
    fn domains(&self) -> usize {
        1
    }

    /// The same where an occurrence in each domain counts `weights` (above 0, at most 1): samples each domain by itself,
    /// and goes no further down once a length has had occurrences that count `2 * max_samples` or more.
    fn matches_by_domain(
        &self,
        context: &[Token],
        max_length: usize,
        max_samples: usize,
        _weights: &[f32; DOMAINS],
        out: &mut Vec<Match>,
    ) {
        self.matches(context, max_length, max_samples, out);
    }

    /// Copies the tokens from `position` on into `out`, at most to the end of the document, and
    /// returns how many were copied. 0 for a position that does not exist.
    fn continuation(&self, position: u64, out: &mut [Token]) -> usize;

    /// Appends the most frequent successors of `token` (at most 32), most frequent first, each with its share
    /// of the token's occurrences.
    fn successors(&self, token: Token, out: &mut Vec<(Token, f32)>);

    /// The same where an occurrence in each domain counts `weights`.
    fn successors_by_domain(&self, token: Token, _weights: &[f32; DOMAINS], out: &mut Vec<(Token, f32)>) {
        self.successors(token, out);
    }

    /// What it has learned for ranking candidates, if it has.
    fn tables(&self) -> Option<&dyn LogBilinear> {
        None
    }

    /// Whether it can be read now. Asked before each draft: one that cannot is left out of it.
    fn is_readable(&self) -> bool {
        true
    }
}

/// What sequences match, or nothing: a corpus that can be replaced while they run. Each draft takes one and goes by that
/// alone.
#[derive(Default)]
pub struct StoreSlot(Mutex<Option<Arc<dyn Corpus>>>);

impl StoreSlot {
    /// With this in it.
    pub fn new(corpus: Option<Arc<dyn Corpus>>) -> Self {
        Self(Mutex::new(corpus))
    }

    /// What is in it.
    pub fn corpus(&self) -> Option<Arc<dyn Corpus>> {
        lock(&self.0).clone()
    }

    /// Puts another in its place, for the next drafts. Those under way go on with what was there, which is returned: the
    /// last who has it frees it, which may take long.
    pub fn replace(&self, corpus: Option<Arc<dyn Corpus>>) -> Option<Arc<dyn Corpus>> {
        std::mem::replace(&mut lock(&self.0), corpus)
    }
}
