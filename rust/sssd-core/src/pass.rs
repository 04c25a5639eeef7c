//! What a verify pass takes, `[root] + nodes` of many trees, padded to a width or packed end to end; and what it
//! accepts.
//!
//! Entry 0 of a row is its root, entry `i + 1` node `i`; fillers follow where rows are padded. A [`PassBlock`] keeps
//! what acceptance needs, so that it does not depend on what has become of the arrays that it wrote. Nothing is
//! allocated once its buffers have grown.

use std::ops::Range;

use thiserror::Error;

use crate::tree::{MAX_NODES, ROOT};
use crate::{MAX_TOKEN, Token};

/// The most entries of one row: a root and the nodes of the largest tree.
pub const MAX_WIDTH: usize = MAX_NODES + 1;

/// The most entries of all rows with their fillers.
const MAX_ENTRIES: usize = 1 << 26;

/// Positions beyond could overflow when depths are added.
const MAX_POSITION: i64 = 1 << 62;

/// No parent, child or sibling.
const NONE: i32 = -1;

/// Draft trees one after another, as batch calls give them: tree `i` has the nodes `offsets[i]..offsets[i + 1]`, whose
/// parents are numbered from 0 within the tree.
#[derive(Clone, Copy, Debug)]
pub struct FlatTrees<'a> {
    /// Token of each node.
    pub token_ids: &'a [i32],
    /// Parent of each node, or [`ROOT`].
    pub parents: &'a [i32],
    /// Where each tree starts, and the end of the last.
    pub offsets: &'a [i32],
}

/// How the rows of a pass lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// End to end, each as long as it is.
    Packed,
    /// Each filled up to the same number of entries; by default to that of the widest.
    Padded(Option<usize>),
}

/// The trees of a batch and their roots, as the entries of a pass.
#[derive(Clone, Debug, Default)]
pub struct PassBlock {
    /// Entries of a row and its fillers, or as many as it has.
    width: Option<usize>,
    /// First entry of each row without fillers, and the end of the last.
    starts: Vec<usize>,
    ids: Vec<i64>,
    depths: Vec<i32>,
    /// Entry of the parent within the row; like the links, [`NONE`] for none.
    parents: Vec<i32>,
    first_child: Vec<i32>,
    next_sibling: Vec<i32>,
}

/// Why trees make no block, or arrays do not fit one.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum PassError {
    /// Not one root for each tree.
    #[error("roots must hold one token for each of {trees} trees, got {roots}")]
    Roots {
        /// Trees of the batch.
        trees: usize,
        /// Roots given.
        roots: usize,
    },
    /// Offsets that do not rise from 0, or lead out of the arrays.
    #[error("the offsets of tree {row} must rise within the {nodes} nodes, got {start} and {end}")]
    Offsets {
        /// The tree.
        row: usize,
        /// Nodes of the arrays.
        nodes: usize,
        /// Its start.
        start: i32,
        /// Its end.
        end: i32,
    },
    /// More nodes than any draft may have.
    #[error("a tree has at most {MAX_NODES} nodes, but tree {row} has {nodes}")]
    Size {
        /// The tree.
        row: usize,
        /// Its nodes.
        nodes: usize,
    },
    /// A parent does not precede its child.
    #[error("the parent of node {node} of tree {row} must be -1 or an earlier node, got {parent}")]
    Parent {
        /// The tree.
        row: usize,
        /// The node.
        node: usize,
        /// Its parent.
        parent: i32,
    },
    /// A negative token.
    #[error("the token of node {node} of tree {row} must be in 0..={MAX_TOKEN}, got {token}")]
    Token {
        /// The tree.
        row: usize,
        /// The node.
        node: usize,
        /// Its token.
        token: i32,
    },
    /// A width that does not hold the trees.
    #[error(
        "width must be between {least}, the root and nodes of the largest tree, and {MAX_WIDTH}, got {width}"
    )]
    Width {
        /// Entries of the widest row.
        least: usize,
        /// The width asked for.
        width: usize,
    },
    /// More entries than a pass may have.
    #[error("a pass has at most {MAX_ENTRIES} entries, got {0}")]
    Entries(usize),
    /// Not one position for each row.
    #[error("positions must hold the root's position of each of {rows} rows, got {got}")]
    Positions {
        /// Rows of the block.
        rows: usize,
        /// Positions given.
        got: usize,
    },
    /// A position to which no depth can be added.
    #[error("the position of row {row} must be between -2^62 and 2^62, got {position}")]
    Position {
        /// The row.
        row: usize,
        /// Its position.
        position: i64,
    },
    /// An array is shorter than the block.
    #[error("room for {needed} values is needed, got {got}")]
    Room {
        /// Values to write or read.
        needed: usize,
        /// Length of the array.
        got: usize,
    },
}

impl PassBlock {
    /// Becomes the block of `trees` below `roots`; of no rows after an error.
    pub fn set(&mut self, roots: &[Token], trees: FlatTrees<'_>, shape: Shape) -> Result<(), PassError> {
        let done = self.read(roots, trees).and_then(|()| self.arrange(shape));
        if done.is_err() {
            self.clear();
        }
        done
    }

    fn clear(&mut self) {
        self.width = None;
        self.starts.clear();
        self.ids.clear();
        self.depths.clear();
        self.parents.clear();
        self.first_child.clear();
        self.next_sibling.clear();
    }

    fn read(&mut self, roots: &[Token], trees: FlatTrees<'_>) -> Result<(), PassError> {
        self.clear();
        let rows = trees.offsets.len().saturating_sub(1);
        if rows != roots.len() {
            return Err(PassError::Roots { trees: rows, roots: roots.len() });
        }
        for (row, (&root, bounds)) in roots.iter().zip(trees.offsets.windows(2)).enumerate() {
            self.starts.push(self.ids.len());
            self.read_tree(row, root, nodes_of(row, bounds[0], bounds[1], trees)?, trees)?;
        }
        self.starts.push(self.ids.len());
        Ok(())
    }

    fn read_tree(
        &mut self,
        row: usize,
        root: Token,
        nodes: Range<usize>,
        trees: FlatTrees<'_>,
    ) -> Result<(), PassError> {
        let start = self.ids.len();
        self.add(root.into(), 0, NONE);
        let pairs = trees.token_ids[nodes.clone()].iter().zip(&trees.parents[nodes]);
        for (node, (&token, &parent)) in pairs.enumerate() {
            if parent < ROOT || parent >= node as i32 {
                return Err(PassError::Parent { row, node, parent });
            }
            if token < 0 {
                return Err(PassError::Token { row, node, token });
            }
            let parent = parent + 1;
            self.add(token.into(), self.depths[start + parent as usize] + 1, parent);
        }
        // backwards, so that each child comes to stand before its later siblings
        for entry in (1..self.ids.len() - start).rev() {
            let parent = start + self.parents[start + entry] as usize;
            self.next_sibling[start + entry] = self.first_child[parent];
            self.first_child[parent] = entry as i32;
        }
        Ok(())
    }

    fn add(&mut self, id: i64, depth: i32, parent: i32) {
        self.ids.push(id);
        self.depths.push(depth);
        self.parents.push(parent);
        self.first_child.push(NONE);
        self.next_sibling.push(NONE);
    }

    fn arrange(&mut self, shape: Shape) -> Result<(), PassError> {
        let least = self.widest();
        self.width = match shape {
            Shape::Packed => None,
            Shape::Padded(None) => Some(least),
            Shape::Padded(Some(width)) if (least..=MAX_WIDTH).contains(&width) => Some(width),
            Shape::Padded(Some(width)) => return Err(PassError::Width { least, width }),
        };
        if self.entries() > MAX_ENTRIES {
            return Err(PassError::Entries(self.entries()));
        }
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Number of entries, fillers included.
    pub fn entries(&self) -> usize {
        self.width.map_or(self.ids.len(), |width| width * self.rows())
    }

    /// Number of entries without fillers, which is also the most that can be accepted.
    pub fn filled(&self) -> usize {
        self.ids.len()
    }

    /// Entries of the widest row without its fillers.
    pub fn widest(&self) -> usize {
        self.starts.windows(2).map(|row| row[1] - row[0]).max().unwrap_or(0)
    }

    /// Entries of every row, or None where rows are packed.
    pub fn width(&self) -> Option<usize> {
        self.width
    }

    /// 64-bit words that hold a bit for each entry of a row, at least 1.
    pub fn words(&self) -> usize {
        self.width.unwrap_or_else(|| self.widest()).div_ceil(64).max(1)
    }

    /// Values of the whole attention mask.
    pub fn mask_values(&self) -> usize {
        self.entries() * self.width.unwrap_or_else(|| self.entries())
    }

    /// For each row: its entries in the own arrays, and where they stand among all entries with fillers.
    fn places(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        self.starts.windows(2).enumerate().map(|(row, bounds)| {
            let all = match self.width {
                Some(width) => row * width..(row + 1) * width,
                None => bounds[0]..bounds[1],
            };
            (bounds[0]..bounds[1], all)
        })
    }

    /// Writes a value for each entry, and one for the fillers of each row.
    fn write<T: Copy>(
        &self,
        out: &mut [T],
        value: impl Fn(usize, usize) -> T,
        filler: impl Fn(usize, usize) -> T,
    ) -> Result<(), PassError> {
        let out = room(out, self.entries())?;
        for (row, (own, all)) in self.places().enumerate() {
            let (entries, fillers) = out[all].split_at_mut(own.len());
            entries.iter_mut().zip(own.clone()).for_each(|(to, entry)| *to = value(row, entry));
            fillers.fill(filler(row, own.start));
        }
        Ok(())
    }

    /// The token of each entry; fillers repeat the root's.
    pub fn ids(&self, out: &mut [i64]) -> Result<(), PassError> {
        self.write(out, |_, entry| self.ids[entry], |_, root| self.ids[root])
    }

    /// The root's position plus the depth of each entry; fillers are at the root's.
    pub fn positions(&self, roots: &[i64], out: &mut [i64]) -> Result<(), PassError> {
        if roots.len() != self.rows() {
            return Err(PassError::Positions { rows: self.rows(), got: roots.len() });
        }
        let sound = |position: &i64| (-MAX_POSITION..=MAX_POSITION).contains(position);
        if let Some(row) = roots.iter().position(|position| !sound(position)) {
            return Err(PassError::Position { row, position: roots[row] });
        }
        self.write(out, |row, entry| roots[row] + i64::from(self.depths[entry]), |row, _| roots[row])
    }

    /// Distance of each entry from the root; 0 for fillers.
    pub fn depths(&self, out: &mut [i64]) -> Result<(), PassError> {
        self.write(out, |_, entry| self.depths[entry].into(), |_, _| 0)
    }

    /// The row of each entry.
    pub fn row_numbers(&self, out: &mut [i64]) -> Result<(), PassError> {
        self.write(out, |row, _| row as i64, |row, _| row as i64)
    }

    /// The entry of each entry's parent within its row; -1 for roots and fillers.
    pub fn parents(&self, out: &mut [i64]) -> Result<(), PassError> {
        self.write(out, |_, entry| self.parents[entry].into(), |_, _| NONE.into())
    }

    /// The entry of each entry's first child within its row, -1 for none.
    pub fn first_child(&self, out: &mut [i64]) -> Result<(), PassError> {
        self.write(out, |_, entry| self.first_child[entry].into(), |_, _| NONE.into())
    }

    /// The entry of the next child of the same parent within the row, -1 for none.
    pub fn next_sibling(&self, out: &mut [i64]) -> Result<(), PassError> {
        self.write(out, |_, entry| self.next_sibling[entry].into(), |_, _| NONE.into())
    }

    /// Where each row starts among all entries, and the end of the last.
    pub fn offsets(&self, out: &mut [i32]) -> Result<(), PassError> {
        let out = room(out, self.rows() + 1)?;
        out[0] = 0;
        for (to, (_, all)) in out[1..].iter_mut().zip(self.places()) {
            *to = all.end as i32;
        }
        Ok(())
    }

    /// [`words`](Self::words) for each entry, bit `j` of them set where entry `j` of the row is its ancestor or the
    /// entry itself.
    pub fn ancestors(&self, out: &mut [u64]) -> Result<(), PassError> {
        let words = self.words();
        let out = room(out, self.entries() * words)?;
        for (own, all) in self.places() {
            let row = &mut out[all.start * words..all.end * words];
            for entry in 0..all.len() {
                match self.parent(&own, entry) {
                    Some(parent) => row.copy_within(parent * words..(parent + 1) * words, entry * words),
                    None => row[entry * words..(entry + 1) * words].fill(0),
                }
                row[entry * words + entry / 64] |= 1 << (entry % 64);
            }
        }
        Ok(())
    }

    /// The attention mask, row-major: true where an entry is the other or descends from it. Of each row for itself
    /// where rows are padded, of all entries where they are packed. Fillers see themselves, for softmax must have
    /// something to divide by.
    pub fn mask(&self, out: &mut [bool]) -> Result<(), PassError> {
        let out = room(out, self.mask_values())?;
        let line = self.width.unwrap_or_else(|| self.entries());
        for (own, all) in self.places() {
            let column = if self.width.is_some() { 0 } else { all.start };
            let row = &mut out[all.start * line..all.end * line];
            for entry in 0..all.len() {
                match self.parent(&own, entry) {
                    Some(parent) => row.copy_within(parent * line..(parent + 1) * line, entry * line),
                    None => row[entry * line..(entry + 1) * line].fill(false),
                }
                row[entry * line + column + entry] = true;
            }
        }
        Ok(())
    }

    /// The parent's entry in the row that has the entries `own`; None for its root and fillers.
    fn parent(&self, own: &Range<usize>, entry: usize) -> Option<usize> {
        let parent = if entry < own.len() { self.parents[own.start + entry] } else { NONE };
        usize::try_from(parent).ok()
    }

    /// Walks each row from its root along the target's own tokens.
    ///
    /// `targets` holds the target's token after each entry, fillers included. Written are, for all rows one after
    /// another, the entries to keep in the cache (the root, then the accepted nodes) and the target's token after each
    /// of them, of which a row's last was not drafted; and where each row starts in both, and the end of the last.
    pub fn accept<T: Copy + Into<i64>>(
        &self,
        targets: &[T],
        kept: &mut [i64],
        tokens: &mut [i64],
        offsets: &mut [i32],
    ) -> Result<(), PassError> {
        if targets.len() != self.entries() {
            return Err(PassError::Room { needed: self.entries(), got: targets.len() });
        }
        let (kept, tokens) = (room(kept, self.filled())?, room(tokens, self.filled())?);
        let offsets = room(offsets, self.rows() + 1)?;
        let mut end = 0;
        offsets[0] = 0;
        for (row, (own, all)) in self.places().enumerate() {
            let mut next = Some(0);
            while let Some(entry) = next {
                let target = targets[all.start + entry].into();
                (kept[end], tokens[end]) = (entry as i64, target);
                end += 1;
                next = self.child(own.start, entry, target);
            }
            offsets[row + 1] = end as i32;
        }
        Ok(())
    }

    fn child(&self, start: usize, entry: usize, id: i64) -> Option<usize> {
        let mut child = self.first_child[start + entry];
        while child != NONE && self.ids[start + child as usize] != id {
            child = self.next_sibling[start + child as usize];
        }
        usize::try_from(child).ok()
    }
}

/// The nodes of a tree, within the arrays.
fn nodes_of(row: usize, start: i32, end: i32, trees: FlatTrees<'_>) -> Result<Range<usize>, PassError> {
    let nodes = trees.token_ids.len().min(trees.parents.len());
    let refused = PassError::Offsets { row, nodes, start, end };
    let (Ok(from), Ok(to)) = (usize::try_from(start), usize::try_from(end)) else { return Err(refused) };
    if from > to || to > nodes || (row == 0 && from != 0) {
        return Err(refused);
    }
    if to - from > MAX_NODES {
        return Err(PassError::Size { row, nodes: to - from });
    }
    Ok(from..to)
}

fn room<T>(out: &mut [T], needed: usize) -> Result<&mut [T], PassError> {
    let got = out.len();
    out.get_mut(..needed).ok_or(PassError::Room { needed, got })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::DraftTree;

    struct Flat {
        token_ids: Vec<i32>,
        parents: Vec<i32>,
        offsets: Vec<i32>,
    }

    impl Flat {
        fn of(trees: &[DraftTree]) -> Self {
            let mut flat = Self { token_ids: vec![], parents: vec![], offsets: vec![0] };
            for tree in trees {
                flat.token_ids.extend(tree.token_ids.iter().map(|&token| token as i32));
                flat.parents.extend(&tree.parents);
                flat.offsets.push(flat.parents.len() as i32);
            }
            flat
        }

        fn view(&self) -> FlatTrees<'_> {
            FlatTrees { token_ids: &self.token_ids, parents: &self.parents, offsets: &self.offsets }
        }
    }

    fn block(trees: &[DraftTree], width: Option<usize>) -> PassBlock {
        let shape = width.map_or(Shape::Packed, |width| Shape::Padded(Some(width)));
        let mut block = PassBlock::default();
        let roots: Vec<Token> = (0..trees.len() as Token).map(|row| 90 + row).collect();
        block.set(&roots, Flat::of(trees).view(), shape).unwrap();
        block
    }

    fn written<T: Copy + Default>(
        len: usize,
        write: impl FnOnce(&mut [T]) -> Result<(), PassError>,
    ) -> Vec<T> {
        let mut out = vec![T::default(); len];
        write(&mut out).unwrap();
        out
    }

    fn tree(token_ids: &[Token], parents: &[i64]) -> DraftTree {
        DraftTree::from_parts(token_ids.to_vec(), parents, vec![0.0; parents.len()]).unwrap()
    }

    fn two() -> [DraftTree; 2] {
        [tree(&[1, 2, 3, 1], &[-1, 0, -1, 0]), tree(&[5], &[-1])]
    }

    #[test]
    fn padded_rows_are_filled_up_behind_their_nodes() {
        let block = block(&two(), Some(6));
        assert_eq!((block.rows(), block.entries(), block.filled()), (2, 12, 7));
        assert_eq!(written(12, |out| block.ids(out)), [90, 1, 2, 3, 1, 90, 91, 5, 91, 91, 91, 91]);
        let positions = written(12, |out| block.positions(&[7, 100], out));
        assert_eq!(positions, [7, 8, 9, 8, 9, 7, 100, 101, 100, 100, 100, 100]);
        assert_eq!(written(12, |out| block.parents(out))[..6], [-1, 0, 1, 0, 1, -1]);
        assert_eq!(written(12, |out| block.first_child(out))[..8], [1, 2, -1, -1, -1, -1, 1, -1]);
        assert_eq!(written(12, |out| block.next_sibling(out))[..6], [-1, 3, 4, -1, -1, -1]);
        assert_eq!(
            written(12, |out| block.ancestors(out))[..6],
            [1, 0b11, 0b111, 0b1001, 0b10011, 0b100_000]
        );
        assert_eq!(written(3, |out| block.offsets(out)), [0, 6, 12]);
    }

    #[test]
    fn packed_rows_lie_end_to_end() {
        let block = block(&two(), None);
        assert_eq!((block.rows(), block.entries(), block.mask_values()), (2, 7, 49));
        assert_eq!(written(7, |out| block.ids(out)), [90, 1, 2, 3, 1, 91, 5]);
        assert_eq!(written(7, |out| block.row_numbers(out)), [0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(written(3, |out| block.offsets(out)), [0, 5, 7]);
        let mask = written(49, |out| block.mask(out));
        let seen: Vec<usize> = (0..7).filter(|column| mask[6 * 7 + column]).collect();
        assert_eq!(seen, [5, 6]);
    }

    #[test]
    fn acceptance_ends_each_row_with_a_token_that_was_not_drafted() {
        let block = block(&two(), Some(5));
        let targets: [i64; 10] = [1, 1, 9, 9, 8, 4, 0, 0, 0, 0];
        let (mut kept, mut tokens, mut offsets) = ([0; 7], [0; 7], [0; 3]);
        block.accept(&targets, &mut kept, &mut tokens, &mut offsets).unwrap();
        assert_eq!((&kept[..4], &tokens[..4], offsets), (&[0, 1, 4, 0][..], &[1, 1, 8, 4][..], [0, 3, 4]));
    }

    #[test]
    fn more_than_64_entries_take_more_words() {
        let chain = tree(&[7; 70], &(-1..69).collect::<Vec<_>>());
        let block = block(&[chain], None);
        assert_eq!(block.words(), 2);
        let ancestors = written(142, |out| block.ancestors(out));
        assert_eq!((ancestors[140], ancestors[141]), (u64::MAX, 0b111_1111));
    }

    #[test]
    fn what_is_no_block_is_refused_and_leaves_none() {
        let mut block = block(&two(), None);
        let mut set = |token_ids: &[i32], parents: &[i32], offsets: &[i32], width| {
            let shape = Shape::Padded(width);
            let refused = block.set(&[1], FlatTrees { token_ids, parents, offsets }, shape).unwrap_err();
            assert_eq!((block.rows(), block.entries()), (0, 0));
            refused
        };
        assert_eq!(set(&[], &[], &[0, 0, 0], None), PassError::Roots { trees: 2, roots: 1 });
        assert_eq!(set(&[], &[], &[], None), PassError::Roots { trees: 0, roots: 1 });
        for (start, end) in [(0, 2), (1, 1), (-1, 1), (0, -1), (1, 0)] {
            let refused = PassError::Offsets { row: 0, nodes: 1, start, end };
            assert_eq!(set(&[1], &[-1], &[start, end], None), refused);
        }
        assert_eq!(set(&[1], &[0], &[0, 1], None), PassError::Parent { row: 0, node: 0, parent: 0 });
        assert_eq!(set(&[1], &[-2], &[0, 1], None), PassError::Parent { row: 0, node: 0, parent: -2 });
        assert_eq!(set(&[-1], &[-1], &[0, 1], None), PassError::Token { row: 0, node: 0, token: -1 });
        assert_eq!(set(&[1], &[-1], &[0, 1], Some(1)), PassError::Width { least: 2, width: 1 });
        assert_eq!(set(&[1], &[-1], &[0, 1], Some(1026)), PassError::Width { least: 2, width: 1026 });
        let many = vec![-1; 1025];
        assert_eq!(set(&many, &many, &[0, 1025], None), PassError::Size { row: 0, nodes: 1025 });
    }

    #[test]
    fn arrays_that_do_not_fit_are_refused() {
        let block = block(&two(), Some(5));
        let short = PassError::Room { needed: 10, got: 9 };
        assert_eq!(block.ids(&mut [0; 9]), Err(short.clone()));
        assert_eq!(block.mask(&mut [false; 49]), Err(PassError::Room { needed: 50, got: 49 }));
        assert_eq!(block.accept(&[0_i64; 9], &mut [0; 7], &mut [0; 7], &mut [0; 3]), Err(short));
        assert!(block.accept(&[0_i64; 10], &mut [0; 6], &mut [0; 7], &mut [0; 3]).is_err());
        let mut out = [0; 10];
        assert_eq!(block.positions(&[1], &mut out), Err(PassError::Positions { rows: 2, got: 1 }));
        let refused = block.positions(&[0, i64::MAX], &mut out);
        assert_eq!(refused, Err(PassError::Position { row: 1, position: i64::MAX }));
    }

    fn trees() -> impl Strategy<Value = Vec<DraftTree>> {
        let node = (any::<prop::sample::Index>(), 0..6_u32);
        let nodes = prop_oneof![4 => prop::collection::vec(node.clone(), 0..12), 1 => prop::collection::vec(node, 60..80)];
        let tree = nodes.prop_map(|nodes| {
            let mut tree = DraftTree::default();
            for (above, token) in nodes {
                let parent = above.index(tree.len() + 1) as i32 - 1;
                if tree.child(parent, token).is_none() {
                    tree.push(token, parent, 0.0, 0);
                }
            }
            tree
        });
        prop::collection::vec(tree, 0..5)
    }

    /// Whether an entry of a tree's row attends to another: to itself and its ancestors; fillers to themselves alone.
    fn sees(tree: &DraftTree, entry: usize, other: usize) -> bool {
        let mut at = Some(entry);
        while let Some(above) = at.filter(|&at| at != other) {
            let node = above.checked_sub(1).filter(|&node| node < tree.len());
            at = node.map(|node| (tree.parents[node] + 1) as usize);
        }
        at.is_some()
    }

    proptest! {
        /// Every array against the methods of a single tree.
        #[test]
        fn a_block_is_its_trees(trees in trees(), extra in 0..4_usize, packed in any::<bool>(),
                                targets in prop::collection::vec(0..6_i32, 500)) {
            let widest = trees.iter().map(|tree| tree.len() + 1).max().unwrap_or(0);
            let width = (!packed).then_some(widest + extra);
            let block = block(&trees, width);
            let (n, words) = (block.entries(), block.words());
            let starts: Vec<i64> = (0..trees.len() as i64).map(|row| 1000 * row).collect();
            let ids = written(n, |out| block.ids(out));
            let positions = written(n, |out| block.positions(&starts, out));
            let depths = written(n, |out| block.depths(out));
            let parents = written(n, |out| block.parents(out));
            let ancestors = written(n * words, |out| block.ancestors(out));
            let mask = written(block.mask_values(), |out| block.mask(out));
            let (children, siblings) = (written(n, |out| block.first_child(out)), written(n, |out| block.next_sibling(out)));
            let rows = written(n, |out| block.row_numbers(out));
            let offsets = written(trees.len() + 1, |out| block.offsets(out));
            let line = width.unwrap_or(n);
            prop_assert_eq!(offsets[trees.len()] as usize, n);
            let targets = &targets.repeat(n / 500 + 1)[..n];
            let (mut kept, mut tokens, mut ends) = (vec![0; block.filled()], vec![0; block.filled()], vec![0; trees.len() + 1]);
            block.accept(targets, &mut kept, &mut tokens, &mut ends).unwrap();
            for (row, tree) in trees.iter().enumerate() {
                let (start, end) = (offsets[row] as usize, offsets[row + 1] as usize);
                let column = if packed { start } else { 0 };
                for entry in 0..end - start {
                    let at = start + entry;
                    let node = (1..=tree.len()).contains(&entry).then(|| entry - 1);
                    let above = node.map(|node| i64::from(tree.parents[node]) + 1);
                    let depth = node.map_or(0, |node| i64::from(tree.depths[node]));
                    prop_assert_eq!(ids[at], node.map_or(90 + row as i64, |node| tree.token_ids[node].into()));
                    prop_assert_eq!((depths[at], positions[at], rows[at]), (depth, starts[row] + depth, row as i64));
                    prop_assert_eq!(parents[at], above.unwrap_or(-1));
                    for other in 0..line {
                        let seen = other.checked_sub(column).is_some_and(|other| sees(tree, entry, other));
                        prop_assert_eq!(mask[at * line + other], seen);
                    }
                    for other in 0..64 * words {
                        let set = ancestors[at * words + other / 64] >> (other % 64) & 1 == 1;
                        prop_assert_eq!(set, sees(tree, entry, other));
                    }
                    let mut found = vec![];
                    let mut child = children[at];
                    while child >= 0 {
                        found.push(child);
                        child = siblings[start + child as usize];
                    }
                    let wanted: Vec<i64> = (1..=tree.len()).filter(|&child| entry <= tree.len() && tree.parents[child - 1] + 1 == entry as i32).map(|child| child as i64).collect();
                    prop_assert_eq!(found, wanted);
                }
                let own: Vec<Token> = targets[start..=start + tree.len()].iter().map(|&target| target as Token).collect();
                let path: Vec<i64> = std::iter::once(0).chain(tree.accept(&own).unwrap().into_iter().map(|node| i64::from(node) + 1)).collect();
                let range = ends[row] as usize..ends[row + 1] as usize;
                prop_assert_eq!(&kept[range.clone()], &path[..]);
                let chosen: Vec<i64> = path.iter().map(|&entry| targets[start + entry as usize].into()).collect();
                prop_assert_eq!(&tokens[range], &chosen[..]);
            }
        }

        /// Whatever stands in the arrays, the answer is a block or an error.
        #[test]
        fn no_arrays_make_it_panic(token_ids in prop::collection::vec(-2..9_i32, 0..9), parents in prop::collection::vec(-3..9_i32, 0..9),
                                   offsets in prop::collection::vec(-2..12_i32, 0..4), rows in 0..4_usize, width in prop::option::of(0..12_usize)) {
            let mut block = PassBlock::default();
            let trees = FlatTrees { token_ids: &token_ids, parents: &parents, offsets: &offsets };
            let shape = width.map_or(Shape::Packed, |width| Shape::Padded((width > 0).then_some(width)));
            let done = block.set(&vec![1; rows], trees, shape);
            prop_assert_eq!(block.rows(), if done.is_ok() { rows } else { 0 });
            written(block.entries() * block.words(), |out| block.ancestors(out));
            written(block.mask_values(), |out| block.mask(out));
        }
    }
}
