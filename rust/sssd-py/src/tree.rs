//! `sssd.DraftTree`.

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use sssd_core::{DraftTree, MAX_NODES, SOURCES, TreeError};

use crate::boundary::{int, not_negative, optional_int};
use crate::errors::error;
use crate::tokens::{int32, integers, tokens};

type Int32<'py> = Bound<'py, PyArray1<i32>>;

/// A draft: continuations of the last token as a tree.
///
/// Nodes are numbered from the most probable one down, so the first ``k`` nodes are the best tree of ``k`` nodes.
/// Parents precede their children and siblings have distinct tokens. The root is the last token of the sequence
/// and is not a node. Arrays are copies: writing to them does not change the tree.
///
/// Args:
///     token_ids: token of each node, n integers.
///     parents: parent of each node, n integers; -1 for children of the root.
///     probs: path probability of each node, n floats; 0 if left out.
///     sources: as in ``sources``, n integers; -1 if left out.
///
/// Trees can be pickled and copied.
///
/// Raises:
///     InvalidArgumentError: a parent does not precede its child, siblings share a token, lengths differ, or a source is
///         none.
///     InvalidTokenError: a token id is not an integer in 0..2^31.
#[pyclass(frozen, name = "DraftTree", module = "sssd")]
pub struct PyDraftTree(pub DraftTree);

#[pymethods]
impl PyDraftTree {
    #[new]
    #[pyo3(signature = (token_ids, parents, probs=None, sources=None))]
    fn new(
        token_ids: &Bound<'_, PyAny>,
        parents: &Bound<'_, PyAny>,
        probs: Option<Vec<f32>>,
        sources: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = token_ids.py();
        let token_ids = tokens(token_ids, None)?;
        let probs = probs.unwrap_or_else(|| vec![0.0; token_ids.len()]);
        let parents = integers(parents, "parents")?;
        let mut tree =
            DraftTree::from_parts(token_ids, &parents, probs).map_err(|reason| invalid(py, &reason))?;
        if let Some(sources) = sources {
            let sources = integers(sources, "sources")?;
            let known = -1..SOURCES.len() as i64;
            if sources.len() != tree.len() || sources.iter().any(|source| !known.contains(source)) {
                let message = format!("sources must be {} indices of SOURCES, or -1", tree.len());
                return Err(error(py, "InvalidArgumentError", message));
            }
            tree.sources = sources.into_iter().map(|source| source as u8).collect();
        }
        Ok(Self(tree))
    }

    /// Token of each node, int32 [n].
    #[getter]
    pub fn token_ids<'py>(&self, py: Python<'py>) -> Int32<'py> {
        int32(py, self.0.token_ids.iter().map(|&token| token as i32))
    }

    /// Parent of each node, int32 [n]; -1 for children of the root.
    #[getter]
    pub fn parents<'py>(&self, py: Python<'py>) -> Int32<'py> {
        PyArray1::from_slice(py, &self.0.parents)
    }

    /// Distance of each node from the root, int32 [n], at least 1.
    #[getter]
    fn depths<'py>(&self, py: Python<'py>) -> Int32<'py> {
        PyArray1::from_slice(py, &self.0.depths)
    }

    /// Probability that the target produces the path from the root to each node, float32 [n]. Never rises along
    /// a path; siblings sum to at most their parent's.
    #[getter]
    fn probs<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        PyArray1::from_slice(py, &self.0.probs)
    }

    /// The source that contributed most to each node, int8 [n], as an index of ``sssd.SOURCES``; -1 in trees that
    /// no drafter made.
    #[getter]
    fn sources<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i8>> {
        PyArray1::from_iter(py, self.0.sources.iter().map(|&source| source as i8))
    }

    /// Expected number of accepted tokens: the sum of ``probs``.
    #[getter]
    fn expected_accepted(&self) -> f64 {
        self.0.expected_accepted()
    }

    /// The tree of the first ``nodes`` nodes, which is the best tree of that size; all of it if it has no more.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``nodes`` is negative.
    fn first(&self, py: Python<'_>, #[pyo3(from_py_with = int)] nodes: i128) -> PyResult<Self> {
        if nodes < 0 {
            return Err(error(
                py,
                "InvalidArgumentError",
                format!("nodes must not be negative, got {nodes}"),
            ));
        }
        Ok(Self(self.0.first(usize::try_from(nodes).unwrap_or(MAX_NODES))))
    }

    /// Tree attention mask, bool [w+1, w+1], root first; True where the row's token may attend to the column's:
    /// to itself and its ancestors (SpecInfer, arXiv 2305.09781).
    ///
    /// Args:
    ///     width: w, at least n; by default n. The root is not counted. Rows added as padding attend to the root and to
    ///         themselves: as in ``pad``, they are children of the root.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``width`` is less than n.
    #[pyo3(signature = (width=None))]
    fn attention_mask<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = optional_int)] width: Option<i128>,
    ) -> PyResult<Bound<'py, PyArray2<bool>>> {
        let width = self.width(py, width)?;
        PyArray1::from_vec(py, self.0.attention_mask(width)).reshape([width + 1, width + 1])
    }

    /// Position id of the root and each node, int64 [w+1]: ``start`` plus depth. Padding stays at ``start``, so that no
    /// position lies beyond those of the text.
    ///
    /// Args:
    ///     start: position of the root, which is the number of tokens before it.
    ///     width: w, at least n; by default n.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``width`` is less than n.
    #[pyo3(signature = (start, width=None))]
    fn position_ids<'py>(
        &self,
        py: Python<'py>,
        start: i64,
        #[pyo3(from_py_with = optional_int)] width: Option<i128>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let width = self.width(py, width)?;
        let depths = std::iter::once(0).chain(self.0.depths.iter().copied()).chain(std::iter::repeat(0));
        Ok(PyArray1::from_iter(
            py,
            depths.take(width + 1).map(|depth| start.saturating_add(i64::from(depth))),
        ))
    }

    /// Tokens and parents at a fixed width, for verifiers with static shapes.
    ///
    /// Args:
    ///     width: number of nodes, at least n; the root is not counted, as in ``attention_mask``.
    ///     token_id: token of the padding nodes, whose parent is -1: children of the root. They must not be accepted.
    ///
    /// Returns:
    ///     token_ids int32 [width] and parents int32 [width].
    ///
    /// Raises:
    ///     InvalidArgumentError: ``width`` is less than n.
    #[pyo3(signature = (width, token_id=0))]
    fn pad<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = int)] width: i128,
        token_id: i32,
    ) -> PyResult<(Int32<'py>, Int32<'py>)> {
        let padding = self.width(py, Some(width))? - self.0.len();
        let token_ids = self.0.token_ids.iter().map(|&token| token as i32);
        Ok((
            int32(py, token_ids.chain(std::iter::repeat_n(token_id, padding))),
            int32(py, self.0.parents.iter().copied().chain(std::iter::repeat_n(-1, padding))),
        ))
    }

    /// The tree in breadth-first order, as engines with linked siblings want it.
    ///
    /// Returns:
    ///     nodes int32 [n], the node at each breadth-first position from 1 on (position 0 is the root);
    ///     first_child int32 [n+1] and next_sibling int32 [n+1], positions linked to each position, or -1.
    fn breadth_first<'py>(&self, py: Python<'py>) -> (Int32<'py>, Int32<'py>, Int32<'py>) {
        let order = self.0.breadth_first();
        (
            PyArray1::from_vec(py, order.nodes),
            PyArray1::from_vec(py, order.first_child),
            PyArray1::from_vec(py, order.next_sibling),
        )
    }

    /// The single path with the most expected accepted tokens, for verifiers that take chains only.
    ///
    /// Args:
    ///     k: the longest path wanted.
    ///
    /// Returns:
    ///     its tokens, int32 [at most k].
    ///
    /// Raises:
    ///     InvalidArgumentError: ``k`` is negative.
    fn chain<'py>(&self, py: Python<'py>, #[pyo3(from_py_with = int)] k: i128) -> PyResult<Int32<'py>> {
        Ok(int32(py, self.0.chain(longest(py, k)?).into_iter().map(|token| token as i32)))
    }

    /// The nodes of that path: ``probs[path]`` are its probabilities.
    ///
    /// Args:
    ///     k: the longest path wanted.
    ///
    /// Returns:
    ///     nodes int32 [at most k], from the root down.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``k`` is negative.
    fn path<'py>(&self, py: Python<'py>, #[pyo3(from_py_with = int)] k: i128) -> PyResult<Int32<'py>> {
        Ok(PyArray1::from_vec(py, self.0.path(longest(py, k)?)))
    }

    /// Walks from the root along the target's own tokens.
    ///
    /// Args:
    ///     target_ids: the target's token after the root and after each node, n+1 integers.
    ///
    /// Returns:
    ///     nodes int32 [a], the accepted path; token_ids int32 [a+1], the accepted tokens and the bonus token.
    ///
    /// Raises:
    ///     InvalidArgumentError: not n+1 target tokens.
    ///     InvalidTokenError: a target token is not an integer in 0..2^31.
    fn accept<'py>(&self, target_ids: &Bound<'py, PyAny>) -> PyResult<(Int32<'py>, Int32<'py>)> {
        let py = target_ids.py();
        let targets = tokens(target_ids, None)?;
        let nodes = self.0.accept(&targets).map_err(|reason| invalid(py, &reason))?;
        let bonus = nodes.last().map_or(targets[0], |&node| targets[node as usize + 1]);
        let accepted = nodes.iter().map(|&node| self.0.token_ids[node as usize] as i32);
        let token_ids = int32(py, accepted.chain(std::iter::once(bonus as i32)).collect::<Vec<_>>());
        Ok((PyArray1::from_vec(py, nodes), token_ids))
    }

    /// The tree as text, one node a line with its probability.
    ///
    /// Args:
    ///     decode: turns a list of token ids into text (such as ``tokenizer.decode``); ids are shown without it.
    #[pyo3(signature = (decode=None))]
    fn render(&self, decode: Option<&Bound<'_, PyAny>>) -> PyResult<String> {
        let label = |token: u32| match decode {
            None => Ok(token.to_string()),
            Some(decode) => decode.call1((vec![token],))?.repr()?.extract(),
        };
        let labels = self.0.token_ids.iter().map(|&token| label(token)).collect::<PyResult<Vec<String>>>()?;
        Ok(self.0.render(&labels))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __repr__(&self) -> String {
        let depth = self.0.depths.iter().max().copied().unwrap_or(0);
        format!(
            "DraftTree({} nodes, depth {depth}, expected_accepted={:.2})",
            self.0.len(),
            self.expected_accepted()
        )
    }
}

impl PyDraftTree {
    fn width(&self, py: Python<'_>, width: Option<i128>) -> PyResult<usize> {
        let nodes = self.0.len();
        let Some(width) = width else { return Ok(nodes) };
        usize::try_from(width).ok().filter(|width| (nodes..=MAX_NODES).contains(width)).ok_or_else(|| {
            let message =
                format!("width must be between the tree's {nodes} nodes and {MAX_NODES}, got {width}");
            error(py, "InvalidArgumentError", message)
        })
    }
}

/// The longest path wanted, of those that a tree may have.
fn longest(py: Python<'_>, k: i128) -> PyResult<usize> {
    not_negative(py, "k", k.min(MAX_NODES as i128))
}

fn invalid(py: Python<'_>, reason: &TreeError) -> PyErr {
    error(py, "InvalidArgumentError", reason.to_string())
}
