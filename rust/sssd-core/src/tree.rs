//! The draft tree that is handed to the verifier.

use std::fmt::Write;

use thiserror::Error;

use crate::Token;

/// The parent of the root's children. The root is the last accepted token and not a node.
pub const ROOT: i32 = -1;

/// The most nodes of one draft.
pub const MAX_NODES: usize = 1024;

/// Drafted continuations as a tree: structure of arrays, most probable node first, so that the first `k` nodes
/// are the best tree of `k` nodes. Parents precede children; siblings have distinct tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DraftTree {
    /// The token of each node.
    pub token_ids: Vec<Token>,
    /// The parent of each node, or [`ROOT`].
    pub parents: Vec<i32>,
    /// Distance of each node from the root, at least 1.
    pub depths: Vec<i32>,
    /// The probability that the target produces the whole path from the root to the node.
    pub probs: Vec<f32>,
    /// The source that contributed most to each node, as an index of [`SOURCES`]; [`UNKNOWN`] in trees of others.
    pub sources: Vec<u8>,
}

/// The source of nodes that no drafter made.
pub const UNKNOWN: u8 = u8::MAX;

/// Breadth-first positions (0 is the root) with links, -1 for none.
#[derive(Debug, PartialEq)]
pub struct BreadthFirst {
    /// The node at each position from 1 on.
    pub nodes: Vec<i32>,
    /// The position of the first child of each position.
    pub first_child: Vec<i32>,
    /// The position of the next sibling of each position.
    pub next_sibling: Vec<i32>,
}

/// Why arrays do not make a draft tree, or targets do not fit one.
#[derive(Debug, Error, PartialEq)]
pub enum TreeError {
    /// Arrays differ in length.
    #[error("token_ids, parents and probs must have the same length, got {0}, {1} and {2}")]
    Lengths(usize, usize, usize),
    /// More nodes than any draft may have.
    #[error("a tree has at most {MAX_NODES} nodes, got {0}")]
    Size(usize),
    /// A parent does not precede its child.
    #[error("the parent of node {0} must be -1 or an earlier node, got {1}")]
    Parent(usize, i64),
    /// Two siblings share a token.
    #[error("node {0} repeats the token of its sibling {1}")]
    Duplicate(usize, usize),
    /// A probability outside 0..=1.
    #[error("the probability of node {0} must be between 0 and 1, got {1}")]
    Probability(usize, f32),
    /// Not one target per position.
    #[error("target_ids must hold the target's token after the root and after each of {0} nodes, got {1}")]
    Targets(usize, usize),
}

impl DraftTree {
    /// A tree from its arrays, checked.
    pub fn from_parts(token_ids: Vec<Token>, parents: &[i64], probs: Vec<f32>) -> Result<Self, TreeError> {
        let n = token_ids.len();
        if parents.len() != n || probs.len() != n {
            return Err(TreeError::Lengths(n, parents.len(), probs.len()));
        }
        if n > MAX_NODES {
            return Err(TreeError::Size(n));
        }
        let mut tree = Self::default();
        for (node, (&parent, (&token, &prob))) in parents.iter().zip(token_ids.iter().zip(&probs)).enumerate()
        {
            if parent < i64::from(ROOT) || parent >= node as i64 {
                return Err(TreeError::Parent(node, parent));
            }
            if !(0.0..=1.0).contains(&prob) {
                return Err(TreeError::Probability(node, prob));
            }
            if let Some(sibling) = tree.child(parent as i32, token) {
                return Err(TreeError::Duplicate(node, sibling as usize));
            }
            tree.push(token, parent as i32, prob, UNKNOWN);
        }
        Ok(tree)
    }

    /// A copy of a tree that a drafter made, from its tokens, parents, probabilities and sources. Nothing is checked
    /// but that parents precede their children.
    pub fn from_nodes(nodes: impl Iterator<Item = (Token, i32, f32, u8)>) -> Result<Self, TreeError> {
        let mut tree = Self::default();
        for (node, (token, parent, prob, source)) in nodes.enumerate() {
            if parent < ROOT || parent >= node as i32 {
                return Err(TreeError::Parent(node, parent.into()));
            }
            tree.push(token, parent, prob, source);
        }
        Ok(tree)
    }

    /// Appends a node.
    pub(crate) fn push(&mut self, token: Token, parent: i32, prob: f32, source: u8) {
        let depth = if parent == ROOT { 0 } else { self.depths[parent as usize] };
        self.token_ids.push(token);
        self.parents.push(parent);
        self.depths.push(depth + 1);
        self.probs.push(prob);
        self.sources.push(source);
    }

    /// Removes all nodes and keeps the memory.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.parents.clear();
        self.depths.clear();
        self.probs.clear();
        self.sources.clear();
    }

    /// Becomes a copy of another tree and keeps the memory.
    pub fn copy_from(&mut self, other: &Self) {
        self.clear();
        self.token_ids.extend_from_slice(&other.token_ids);
        self.parents.extend_from_slice(&other.parents);
        self.depths.extend_from_slice(&other.depths);
        self.probs.extend_from_slice(&other.probs);
        self.sources.extend_from_slice(&other.sources);
    }

    /// Keeps the first `nodes` nodes.
    pub fn truncate(&mut self, nodes: usize) {
        self.token_ids.truncate(nodes);
        self.parents.truncate(nodes);
        self.depths.truncate(nodes);
        self.probs.truncate(nodes);
        self.sources.truncate(nodes);
    }

    /// Gives back the memory that is not in use.
    pub(crate) fn shrink(&mut self) {
        self.token_ids.shrink_to_fit();
        self.parents.shrink_to_fit();
        self.depths.shrink_to_fit();
        self.probs.shrink_to_fit();
        self.sources.shrink_to_fit();
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        4 * (self.token_ids.capacity()
            + self.parents.capacity()
            + self.depths.capacity()
            + self.probs.capacity())
            + self.sources.capacity()
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// Whether nothing is drafted.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty()
    }

    /// The expected number of accepted tokens.
    pub fn expected_accepted(&self) -> f64 {
        self.probs.iter().map(|&prob| f64::from(prob)).sum()
    }

    /// The tree of the first `nodes` nodes, which is the best tree of that size.
    pub fn first(&self, nodes: usize) -> Self {
        let nodes = nodes.min(self.len());
        Self {
            token_ids: self.token_ids[..nodes].to_vec(),
            parents: self.parents[..nodes].to_vec(),
            depths: self.depths[..nodes].to_vec(),
            probs: self.probs[..nodes].to_vec(),
            sources: self.sources[..nodes].to_vec(),
        }
    }

    /// The child of `parent` with `token`.
    pub fn child(&self, parent: i32, token: Token) -> Option<i32> {
        let first = (parent + 1) as usize;
        let nodes = self.parents[first..].iter().zip(&self.token_ids[first..]);
        nodes.into_iter().position(|node| node == (&parent, &token)).map(|found| (first + found) as i32)
    }

    /// The path that agrees with the target's tokens: `targets[0]` follows the root, `targets[i + 1]` node `i`.
    pub fn accept(&self, targets: &[Token]) -> Result<Vec<i32>, TreeError> {
        if targets.len() != self.len() + 1 {
            return Err(TreeError::Targets(self.len(), targets.len()));
        }
        let mut path = Vec::new();
        let mut node = ROOT;
        while let Some(child) = self.child(node, targets[(node + 1) as usize]) {
            path.push(child);
            node = child;
        }
        Ok(path)
    }

    /// Row-major mask of `width + 1` rows, root first: true where the row is the column or descends from it.
    /// Rows beyond the tree see the root and themselves, as children of the root do.
    pub fn attention_mask(&self, width: usize) -> Vec<bool> {
        let row = width + 1;
        let mut mask = vec![false; row * row];
        mask[0] = true;
        for (node, &parent) in self.parents.iter().enumerate() {
            let (above, own) = mask.split_at_mut((node + 1) * row);
            own[..row].copy_from_slice(&above[(parent + 1) as usize * row..][..row]);
            own[node + 1] = true;
        }
        for padding in self.len() + 1..row {
            mask[padding * row] = true;
            mask[padding * row + padding] = true;
        }
        mask
    }

    /// The tree in breadth-first order; siblings keep their order.
    pub fn breadth_first(&self) -> BreadthFirst {
        let n = self.len();
        let mut nodes: Vec<i32> = (0..n as i32).collect();
        let mut position = vec![0; n + 1];
        // parents precede children, so one stable sort by depth keeps siblings together only if their
        // parents' order decides first
        let mut rank = vec![0usize; n];
        nodes.sort_by_key(|&node| self.depths[node as usize]);
        let mut start = 0;
        while start < n {
            let depth = self.depths[nodes[start] as usize];
            let end = start
                + nodes[start..].iter().take_while(|&&node| self.depths[node as usize] == depth).count();
            nodes[start..end].sort_by_key(|&node| match self.parents[node as usize] {
                ROOT => 0,
                parent => rank[parent as usize],
            });
            for (index, &node) in nodes.iter().enumerate().take(end).skip(start) {
                rank[node as usize] = index;
                position[(node + 1) as usize] = index as i32 + 1;
            }
            start = end;
        }
        let (mut first_child, mut next_sibling) = (vec![-1; n + 1], vec![-1; n + 1]);
        for (index, &node) in nodes.iter().enumerate().rev() {
            let parent = position[(self.parents[node as usize] + 1) as usize] as usize;
            next_sibling[index + 1] = first_child[parent];
            first_child[parent] = index as i32 + 1;
        }
        BreadthFirst { nodes, first_child, next_sibling }
    }

    /// The tokens of [`DraftTree::path`].
    pub fn chain(&self, k: usize) -> Vec<Token> {
        self.path(k).into_iter().map(|node| self.token_ids[node as usize]).collect()
    }

    /// The path of at most `k` nodes with the largest sum of path probabilities.
    pub fn path(&self, k: usize) -> Vec<i32> {
        let mut sums = Vec::with_capacity(self.len());
        let mut best = (0.0, ROOT);
        for node in 0..self.len() {
            let above = if self.parents[node] == ROOT { 0.0 } else { sums[self.parents[node] as usize] };
            sums.push(above + self.probs[node]);
            if self.depths[node] as usize <= k && (best.1 == ROOT || sums[node] > best.0) {
                best = (sums[node], node as i32);
            }
        }
        let mut path = Vec::new();
        let mut node = best.1;
        while node != ROOT {
            path.push(node);
            node = self.parents[node as usize];
        }
        path.reverse();
        path
    }

    /// The tree as text, one node a line, with a label for each node.
    pub fn render(&self, labels: &[impl AsRef<str>]) -> String {
        let mut text =
            format!("root ({} nodes, {:.2} expected to be accepted)", self.len(), self.expected_accepted());
        let mut children = vec![Vec::new(); self.len() + 1];
        for (node, &parent) in self.parents.iter().enumerate().rev() {
            children[(parent + 1) as usize].push(node);
        }
        // (node, indentation of its line, whether it is the last of its siblings)
        let mut stack: Vec<(usize, String, bool)> = Vec::new();
        let push = |stack: &mut Vec<_>, children: &[usize], indent: &str| {
            stack.extend(children.iter().enumerate().map(|(i, &child)| (child, indent.to_owned(), i == 0)));
        };
        push(&mut stack, &children[0], "");
        while let Some((node, indent, last)) = stack.pop() {
            let (branch, below) = if last { ("└─", "   ") } else { ("├─", "│  ") };
            let label = labels.get(node).map_or("", AsRef::as_ref);
            let _ = write!(text, "\n{indent}{branch} {label} {:.3}", self.probs[node]);
            push(&mut stack, &children[node + 1], &format!("{indent}{below}"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> DraftTree {
        DraftTree::from_parts(vec![1, 2, 3, 1, 5], &[-1, 0, -1, 2, 1], vec![0.6, 0.5, 0.3, 0.25, 0.1])
            .unwrap()
    }

    #[test]
    fn accept_follows_the_targets() {
        assert_eq!(tree().accept(&[3, 0, 0, 1, 9, 0]).unwrap(), [2, 3]);
        assert_eq!(tree().accept(&[7, 0, 0, 0, 0, 0]).unwrap(), []);
        assert_eq!(tree().accept(&[7]), Err(TreeError::Targets(5, 1)));
    }

    #[test]
    fn mask_is_ancestor_or_self() {
        let mask = tree().attention_mask(6);
        let row = |r: usize| mask[r * 7..(r + 1) * 7].iter().map(|&b| u8::from(b)).collect::<Vec<_>>();
        assert_eq!(row(0), [1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(row(5), [1, 1, 1, 0, 0, 1, 0]);
        assert_eq!(row(4), [1, 0, 0, 1, 1, 0, 0]);
        assert_eq!(row(6), [1, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn breadth_first_links_children_and_siblings() {
        let order = tree().breadth_first();
        assert_eq!(order.nodes, [0, 2, 1, 3, 4]);
        assert_eq!(order.first_child, [1, 3, 4, 5, -1, -1]);
        assert_eq!(order.next_sibling, [-1, 2, -1, -1, -1, -1]);
    }

    #[test]
    fn chain_is_the_path_with_the_most_expected_tokens() {
        assert_eq!(tree().chain(9), [1, 2, 5]);
        assert_eq!(tree().chain(2), [1, 2]);
        assert_eq!((tree().path(9), tree().path(1)), (vec![0, 1, 4], vec![0]));
        assert_eq!(tree().chain(0), []);
    }

    #[test]
    fn bad_arrays_are_refused() {
        let build = |tokens: &[u32], parents: &[i64]| {
            DraftTree::from_parts(tokens.to_vec(), parents, vec![0.0; tokens.len()]).unwrap_err()
        };
        assert_eq!(build(&[1, 1], &[-1, -1]), TreeError::Duplicate(1, 0));
        assert_eq!(build(&[1, 1], &[-1, 1]), TreeError::Parent(1, 1));
        assert_eq!(build(&[1], &[-2]), TreeError::Parent(0, -2));
        assert_eq!(build(&[1], &[]), TreeError::Lengths(1, 0, 1));
        let nan = DraftTree::from_parts(vec![1], &[-1], vec![f32::NAN]).unwrap_err();
        assert!(matches!(nan, TreeError::Probability(0, _)));
    }

    #[test]
    fn render_draws_branches() {
        let text = tree().render(&["a", "b", "c", "d", "e"]);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines, ["├─ a 0.600", "│  └─ b 0.500", "│     └─ e 0.100", "└─ c 0.300", "   └─ d 0.250"]);
    }
}
