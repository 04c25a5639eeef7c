//! A draft from outside, such as a multi-token-prediction head, a trained drafter or a template makes it.

use thiserror::Error;

use crate::index::NONE;
use crate::memory::{MemoryFull, try_reserve};
use crate::tree::{DraftTree, MAX_NODES, ROOT};
use crate::{MAX_TOKEN, Token};

/// The place before the first tokens.
pub const GIVEN_ROOT: u32 = 0;

/// Why a draft is not taken.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum GivenError {
    /// Too many nodes.
    #[error("a given draft has at most {MAX_NODES} nodes; give the most probable ones")]
    Size,
    /// A probability outside 0..=1.
    #[error("the probability of a given token must be between 0 and 1, got {0}")]
    Probability(f32),
    /// What is no token.
    #[error("a given token must be below 2^31, got {0}")]
    Token(Token),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryFull),
}

/// Tokens that may follow a sequence, as a tree in which siblings differ.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// The root first, if there are any.
    nodes: Vec<Node>,
    /// Whether they have probabilities.
    has_probs: bool,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    token: Token,
    /// Given its parent.
    prob: f32,
    first_child: u32,
    next_sibling: u32,
}

impl Given {
    /// Forgets all nodes and keeps the memory.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.has_probs = false;
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() < 2
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len().saturating_sub(1)
    }

    /// Whether the drafter said how probable its tokens are.
    pub(crate) fn has_probs(&self) -> bool {
        self.has_probs
    }

    /// Adds a chain, each token with its probability given those before it. Where it begins like another one the two share
    /// nodes, with the larger probability.
    pub fn push_chain(&mut self, tokens: &[Token], probs: Option<&[f32]>) -> Result<(), GivenError> {
        let mut node = GIVEN_ROOT;
        for (at, &token) in tokens.iter().enumerate() {
            node = self.push(node, token, probs.map(|probs| probs.get(at).copied().unwrap_or(0.0)))?;
        }
        Ok(())
    }

    /// Adds a tree with its probabilities, which are those of paths; if all of them are 0 it has none.
    pub fn push_tree(&mut self, tree: &DraftTree) -> Result<(), GivenError> {
        let known = tree.probs.iter().any(|&prob| prob > 0.0);
        let mut places = Vec::new();
        try_reserve(&mut places, tree.len())?;
        for (node, &token) in tree.token_ids.iter().enumerate() {
            let (parent, above) = match tree.parents[node] {
                ROOT => (GIVEN_ROOT, 1.0),
                parent => (places[parent as usize], tree.probs[parent as usize]),
            };
            // those who round may let a path rise
            let prob = known.then(|| (tree.probs[node] / above.max(f32::MIN_POSITIVE)).min(1.0));
            places.push(self.push(parent, token, prob)?);
        }
        Ok(())
    }

    /// Adds a node, or finds it.
    fn push(&mut self, parent: u32, token: Token, prob: Option<f32>) -> Result<u32, GivenError> {
        if token > MAX_TOKEN {
            return Err(GivenError::Token(token));
        }
        self.has_probs |= prob.is_some();
        let prob = prob.unwrap_or(0.0);
        if !(0.0..=1.0).contains(&prob) {
            return Err(GivenError::Probability(prob));
        }
        if self.nodes.is_empty() {
            self.append(Node { token: Token::MAX, prob: 1.0, first_child: NONE, next_sibling: NONE })?;
        }
        let (mut last, mut next) = (NONE, self.nodes[parent as usize].first_child);
        while let Some(node) = self.nodes.get_mut(next as usize) {
            if node.token == token {
                node.prob = node.prob.max(prob);
                return Ok(next);
            }
            last = std::mem::replace(&mut next, node.next_sibling);
        }
        if self.len() >= MAX_NODES {
            return Err(GivenError::Size);
        }
        let new = self.append(Node { token, prob, first_child: NONE, next_sibling: NONE })?;
        match self.nodes.get_mut(last as usize) {
            Some(sibling) => sibling.next_sibling = new,
            None => self.nodes[parent as usize].first_child = new,
        }
        Ok(new)
    }

    fn append(&mut self, node: Node) -> Result<u32, MemoryFull> {
        if self.nodes.len() == self.nodes.capacity() {
            let more = self.nodes.len().max(16);
            try_reserve(&mut self.nodes, more)?;
        }
        self.nodes.push(node);
        Ok(self.nodes.len() as u32 - 1)
    }

    /// What it has after a node, first one first: token and probability.
    pub(crate) fn children(&self, node: u32) -> impl Iterator<Item = (Token, f32)> + '_ {
        let mut next = self.nodes.get(node as usize).map_or(NONE, |node| node.first_child);
        std::iter::from_fn(move || {
            let node = self.nodes.get(next as usize)?;
            next = node.next_sibling;
            Some((node.token, node.prob))
        })
    }

    /// The node for a token after another node, or [`NONE`].
    pub(crate) fn child(&self, node: u32, token: Token) -> u32 {
        let mut next = self.nodes.get(node as usize).map_or(NONE, |node| node.first_child);
        while let Some(node) = self.nodes.get(next as usize)
            && node.token != token
        {
            next = node.next_sibling;
        }
        next
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn children(given: &Given, node: u32) -> Vec<(Token, f32)> {
        given.children(node).collect()
    }

    #[test]
    fn chains_that_begin_alike_share_nodes() {
        let mut given = Given::default();
        assert!(given.is_empty() && children(&given, GIVEN_ROOT).is_empty());
        given.push_chain(&[5, 6], Some(&[0.5, 0.9])).unwrap();
        given.push_chain(&[7], Some(&[0.2])).unwrap();
        given.push_chain(&[5, 8, 9], Some(&[0.4, 0.1, 1.0])).unwrap();
        assert_eq!((given.len(), given.has_probs()), (5, true));
        assert_eq!(children(&given, GIVEN_ROOT), [(5, 0.5), (7, 0.2)]);
        let five = given.child(GIVEN_ROOT, 5);
        assert_eq!(children(&given, five), [(6, 0.9), (8, 0.1)]);
        assert_eq!((given.child(five, 7), given.child(NONE, 7)), (NONE, NONE));
        given.clear();
        assert!(given.is_empty() && !given.has_probs());
    }

    #[test]
    fn the_probabilities_of_a_tree_are_those_of_its_paths() {
        let tree = DraftTree::from_parts(vec![5, 6, 7], &[-1, 0, -1], vec![0.5, 0.25, 0.0]).unwrap();
        let mut given = Given::default();
        given.push_tree(&tree).unwrap();
        assert_eq!(children(&given, GIVEN_ROOT), [(5, 0.5), (7, 0.0)]);
        assert_eq!(children(&given, given.child(GIVEN_ROOT, 5)), [(6, 0.5)]);
        let unknown = DraftTree::from_parts(vec![5], &[-1], vec![0.0]).unwrap();
        given.clear();
        given.push_tree(&unknown).unwrap();
        assert!(!given.has_probs());
    }

    #[test]
    fn what_is_no_draft_is_refused() {
        let mut given = Given::default();
        assert_eq!(given.push_chain(&[5], Some(&[1.5])), Err(GivenError::Probability(1.5)));
        assert!(matches!(given.push_chain(&[5], Some(&[f32::NAN])), Err(GivenError::Probability(_))));
        assert_eq!(given.push_chain(&[Token::MAX], None), Err(GivenError::Token(Token::MAX)));
        let long: Vec<Token> = (0..=MAX_NODES as Token).collect();
        assert_eq!(given.push_chain(&long, None), Err(GivenError::Size));
        assert_eq!(given.len(), MAX_NODES);
    }
}
