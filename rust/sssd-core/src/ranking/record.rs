//! What the ranking stage has seen of a draft's nodes, for learning the network and for testing it.

use crate::Token;
use crate::ranking::network::FEATURES;

/// What was seen at one node.
#[derive(Clone, Debug)]
pub struct Ranked {
    /// Tokens from the root to the node.
    pub depth: usize,
    /// The path's tokens, the last one first, and then those of the text: at most `CONTEXT`.
    pub last: Vec<Token>,
    /// The tokens of the candidates that were scored.
    pub tokens: Vec<Token>,
    /// The tokens of the others.
    pub others: Vec<Token>,
    /// Of each scored candidate, and last of all that are no candidates: the logarithm of its probability and its
    /// features.
    pub rows: Vec<(f32, [f32; FEATURES])>,
    /// The probability of the others.
    pub kept: f32,
}

/// All nodes that were ranked, in the order in which they were.
#[derive(Clone, Debug, Default)]
pub struct RankingRecord {
    /// One entry a node.
    pub nodes: Vec<Ranked>,
}
