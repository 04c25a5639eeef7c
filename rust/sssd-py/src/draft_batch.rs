//! `sssd.DraftBatch`.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::{
    Element, PyArray1, PyArray2, PyArrayDescrMethods, PyArrayMethods, PyReadwriteArray1,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PySlice;
use sssd_core::{DraftTree, FlatTrees, MAX_NODES};
use sssd_engine::{Drafted, Work};

use crate::boundary::{int, node_budget, not_negative};
use crate::errors::error;
use crate::shutdown::defer_shutdown;
use crate::tokens::int32;
use crate::tree::PyDraftTree;

pub type Array<T> = Py<PyArray1<T>>;

/// The trees of a batch in flat arrays, which later batches can reuse.
///
/// Tree ``i`` has the nodes ``offsets[i]`` to ``offsets[i + 1]``; its parents are numbered from 0 within the tree, -1
/// for children of the root. The properties are views of the buffers as the last batch left them; the next batch
/// that is drafted into the same object overwrites them. One batch at a time may use it.
///
/// Args:
///     max_sequences: room for so many trees.
///     max_nodes: room for so many nodes in all.
///     token_ids, parents, depths: buffers to use, int32 [at least max_nodes], such as pinned memory; by default new
///         ones.
///     probs, sources: the same, float32 and int8.
///     offsets: the same, int32 [at least max_sequences + 1].
///
/// Raises:
///     InvalidArgumentError: a buffer is too short, not contiguous, of another dtype, or read-only; a size is negative.
#[pyclass(frozen, name = "DraftBatch", module = "sssd")]
pub struct PyDraftBatch {
    token_ids: Array<i32>,
    parents: Array<i32>,
    depths: Array<i32>,
    probs: Array<f32>,
    sources: Array<i8>,
    offsets: Array<i32>,
    max_sequences: usize,
    max_nodes: usize,
    sequences: AtomicUsize,
    nodes: AtomicUsize,
    drafted_sequences: AtomicUsize,
    drafted_nodes: AtomicUsize,
    context: AtomicU64,
    accepted: Mutex<Vec<i32>>,
}

#[pymethods]
impl PyDraftBatch {
    #[new]
    #[pyo3(signature = (max_sequences, max_nodes, *, token_ids=None, parents=None, depths=None, probs=None,
                        sources=None, offsets=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = int)] max_sequences: i128,
        #[pyo3(from_py_with = int)] max_nodes: i128,
        token_ids: Option<&Bound<'_, PyAny>>,
        parents: Option<&Bound<'_, PyAny>>,
        depths: Option<&Bound<'_, PyAny>>,
        probs: Option<&Bound<'_, PyAny>>,
        sources: Option<&Bound<'_, PyAny>>,
        offsets: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let size = |name: &str, size: i128| match not_negative(py, name, size)? {
            size if size <= MOST => Ok(size),
            size => {
                Err(error(py, "InvalidArgumentError", format!("{name} must be at most {MOST}, got {size}")))
            }
        };
        let (sequences, nodes) = (size("max_sequences", max_sequences)?, size("max_nodes", max_nodes)?);
        Ok(Self {
            token_ids: buffer(py, "token_ids", token_ids, nodes)?,
            parents: buffer(py, "parents", parents, nodes)?,
            depths: buffer(py, "depths", depths, nodes)?,
            probs: buffer(py, "probs", probs, nodes)?,
            sources: buffer(py, "sources", sources, nodes)?,
            offsets: buffer(py, "offsets", offsets, sequences + 1)?,
            max_sequences: sequences,
            max_nodes: nodes,
            sequences: AtomicUsize::new(0),
            nodes: AtomicUsize::new(0),
            drafted_sequences: AtomicUsize::new(0),
            drafted_nodes: AtomicUsize::new(0),
            context: AtomicU64::new(0),
            accepted: Mutex::default(),
        })
    }

    /// A batch of trees that were made one by one, such as by a drafter of another kind.
    ///
    /// Args:
    ///     trees: n ``DraftTree``, or None for none.
    ///     out: where to put them; by default a new ``DraftBatch``.
    ///
    /// Returns:
    ///     ``out`` or the new ``DraftBatch``.
    ///
    /// Raises:
    ///     InvalidArgumentError: an item is neither, ``out`` has not room enough, or there are too many trees.
    #[staticmethod]
    #[pyo3(signature = (trees, *, out=None))]
    fn from_trees<'py>(
        trees: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, Self>>,
    ) -> PyResult<Bound<'py, Self>> {
        let py = trees.py();
        let refuse = |message: String| error(py, "InvalidArgumentError", message);
        let mut read = Vec::new();
        for (index, item) in trees.try_iter()?.enumerate() {
            let item = item?;
            let tree = item.extract::<Option<Bound<'_, PyDraftTree>>>().map_err(|_| {
                refuse(format!("trees[{index}] must be a DraftTree or None, got {}", item.get_type()))
            })?;
            read.push(tree);
        }
        if read.len() > MOST / MAX_NODES {
            return Err(refuse(format!(
                "a batch has at most {} trees, got {}",
                MOST / MAX_NODES,
                read.len()
            )));
        }
        let nodes = read.iter().flatten().map(|tree| tree.get().0.len()).sum();
        let out = output(py, out, read.len(), nodes)?;
        let none = DraftTree::default();
        let lent = out.get().lend(py)?;
        out.get().fill(lent, read.len(), |act| {
            for (index, tree) in read.iter().enumerate() {
                act(index, tree.as_ref().map_or(&none, |tree| &tree.get().0));
            }
        })?;
        Ok(out)
    }

    /// Token of each node, int32 [nodes].
    #[getter]
    fn token_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.token_ids, self.nodes())
    }

    /// Parent of each node within its tree, int32 [nodes]; -1 for children of the root.
    #[getter]
    fn parents<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.parents, self.nodes())
    }

    /// Distance of each node from its root, int32 [nodes], at least 1.
    #[getter]
    fn depths<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.depths, self.nodes())
    }

    /// Probability that the target produces the path from the root to each node, float32 [nodes].
    #[getter]
    fn probs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.probs, self.nodes())
    }

    /// The source that contributed most to each node, int8 [nodes], as an index of ``sssd.SOURCES``.
    #[getter]
    fn sources<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.sources, self.nodes())
    }

    /// Where each tree starts, int32 [sequences + 1].
    #[getter]
    fn offsets<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.offsets, self.sequences.load(Ordering::Relaxed) + 1)
    }

    /// Sequences that drafts were made for, which takes time even where nothing of them is left.
    #[getter]
    fn drafted_sequences(&self) -> usize {
        self.drafted_sequences.load(Ordering::Relaxed)
    }

    /// Nodes of these drafts before any was cut to what pays or to what others left.
    #[getter]
    fn drafted_nodes(&self) -> usize {
        self.drafted_nodes.load(Ordering::Relaxed)
    }

    /// Mean length of the sequences, in tokens.
    #[getter]
    fn context(&self) -> f64 {
        f64::from_bits(self.context.load(Ordering::Relaxed))
    }

    /// Nodes of the drafts before these that the step's tokens have accepted, int32 [sequences]; empty if it appended none.
    #[getter]
    fn accepted<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        int32(py, self.lock_accepted().iter().copied())
    }

    /// The most probable chain of each tree in arrays of fixed length, for verifiers that take no trees. Drafts of
    /// ``shape="chain"`` are such chains; of other trees it is ``DraftTree.chain``.
    ///
    /// Args:
    ///     k: length of the rows, 0 to 1024; longer chains are cut.
    ///     pad: what fills the rest of a row.
    ///     out: where to put the tokens, a contiguous int32 array [at least n, k]; by default a new one.
    ///     lengths: where to put the lengths, a contiguous int32 array [at least n].
    ///
    /// Returns:
    ///     token_ids int32 [n, k] and lengths int32 [n].
    ///
    /// Raises:
    ///     InvalidArgumentError: ``k`` is out of range, or an array does not fit.
    #[pyo3(signature = (k, *, pad=-1, out=None, lengths=None),
           text_signature = "($self, k, *, pad=-1, out=None, lengths=None)")]
    fn chains<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = int)] k: i128,
        pad: i32,
        out: Option<&Bound<'py, PyAny>>,
        lengths: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (n, k) = (self.__len__(), node_budget(py, "k", k)?);
        let token_ids = chain_buffer(py, out, n, k)?;
        let lengths = buffer::<i32>(py, "lengths", lengths, n)?;
        {
            let (mut rows, mut counts) = (token_ids.try_readwrite()?, lengths.bind(py).try_readwrite()?);
            let (rows, counts) = (rows.as_slice_mut()?, counts.as_slice_mut()?);
            rows[..n * k].fill(pad);
            self.with_trees(py, |trees| {
                for (tree, count) in counts.iter_mut().enumerate().take(n) {
                    let (start, end) = (trees.offsets[tree], trees.offsets[tree + 1]);
                    let nodes = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
                    let (ids, parents) = (trees.token_ids.get(nodes.clone())?, trees.parents.get(nodes)?);
                    let row = &mut rows[tree * k..(tree + 1) * k];
                    *count = if parents.iter().zip(-1..).all(|(&parent, before)| parent == before) {
                        let length = ids.len().min(k);
                        row[..length].copy_from_slice(&ids[..length]);
                        length as i32
                    } else {
                        let path = self.tree(py, tree).ok()?.path(k);
                        row.iter_mut().zip(&path).for_each(|(to, &node)| *to = ids[node as usize]);
                        path.len() as i32
                    };
                }
                Some(())
            })?
            .ok_or_else(|| changed(py))?;
        }
        Ok((token_ids.get_item(PySlice::new(py, 0, n as isize, 1))?, view(py, &lengths, n)?))
    }

    fn __len__(&self) -> usize {
        self.sequences.load(Ordering::Relaxed)
    }

    /// A copy of tree ``index``.
    fn __getitem__(&self, py: Python<'_>, index: isize) -> PyResult<PyDraftTree> {
        let trees = self.__len__();
        let from_end = if index < 0 { index.wrapping_add(trees as isize) } else { index };
        let Some(tree) = usize::try_from(from_end).ok().filter(|&tree| tree < trees) else {
            let message = format!("tree {index} of a batch of {trees}");
            return Err(pyo3::exceptions::PyIndexError::new_err(message));
        };
        self.tree(py, tree).map(PyDraftTree)
    }

    fn __repr__(&self) -> String {
        format!("DraftBatch({} sequences, {} nodes)", self.__len__(), self.nodes())
    }
}

/// A batch or a tree of it has at most so many nodes, so that offsets fit 32 bits.
pub const MOST: usize = 1 << 24;

fn part<T: Copy>(
    py: Python<'_>,
    values: &[T],
    start: usize,
    end: usize,
) -> PyResult<impl Iterator<Item = T>> {
    values.get(start..end).map(|part| part.iter().copied()).ok_or_else(|| changed(py))
}

fn changed(py: Python<'_>) -> PyErr {
    error(py, "InvalidArgumentError", "the buffers do not hold the trees any more: they were written to")
}

/// A buffer that was given, checked, or a new one.
pub fn buffer<T: Element>(
    py: Python<'_>,
    name: &str,
    given: Option<&Bound<'_, PyAny>>,
    size: usize,
) -> PyResult<Array<T>> {
    let _deferred = defer_shutdown(py);
    let Some(given) = given else { return Ok(PyArray1::zeros(py, size, false).unbind()) };
    let refuse = |got: String| {
        let dtype = T::get_dtype(py);
        error(
            py,
            "InvalidArgumentError",
            format!(
                "{name} must be a contiguous, writable {dtype} array of at least {size} values, got {got}"
            ),
        )
    };
    let array = given.cast::<PyArray1<T>>().map_err(|_| refuse(given.get_type().to_string()))?;
    if !array.is_contiguous() || array.len() < size {
        return Err(refuse(format!("{} values, contiguous: {}", array.len(), array.is_contiguous())));
    }
    array.try_readwrite().map_err(|problem| refuse(problem.to_string()))?;
    Ok(array.clone().unbind())
}

/// An array of at least `n` rows of `k` chains' tokens that was given, checked, or a new one.
fn chain_buffer<'py>(
    py: Python<'py>,
    given: Option<&Bound<'py, PyAny>>,
    n: usize,
    k: usize,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let _deferred = defer_shutdown(py);
    let Some(given) = given else { return Ok(PyArray2::zeros(py, [n, k], false)) };
    let array = given.cast::<PyArray2<i32>>().ok().filter(|array| {
        array.is_c_contiguous()
            && array.shape()[0] >= n
            && array.shape()[1] == k
            && array.try_readwrite().is_ok()
    });
    array.cloned().ok_or_else(|| {
        let message = format!("out must be a contiguous, writable int32 array [at least {n}, {k}]");
        error(py, "InvalidArgumentError", message)
    })
}

/// The first `len` values of a buffer.
pub fn view<'py, T: Element>(py: Python<'py>, array: &Array<T>, len: usize) -> PyResult<Bound<'py, PyAny>> {
    array.bind(py).get_item(PySlice::new(py, 0, len as isize, 1))
}

/// The buffers of a batch while it is drafted: nobody else can have them.
pub struct Lent<'py> {
    token_ids: PyReadwriteArray1<'py, i32>,
    parents: PyReadwriteArray1<'py, i32>,
    depths: PyReadwriteArray1<'py, i32>,
    probs: PyReadwriteArray1<'py, f32>,
    sources: PyReadwriteArray1<'py, i8>,
    offsets: PyReadwriteArray1<'py, i32>,
}

fn writable<'py, T: Element>(
    py: Python<'py>,
    name: &str,
    array: &Array<T>,
    size: usize,
) -> PyResult<PyReadwriteArray1<'py, T>> {
    let array = array.bind(py);
    let refuse = |problem: String| {
        let message = format!("out cannot be written to: {name} {problem}; make a new DraftBatch");
        error(py, "InvalidArgumentError", message)
    };
    if !T::get_dtype(py).is_equiv_to(&array.dtype()) {
        return Err(refuse(format!("has become an array of {}", array.dtype())));
    }
    let Ok(lent) = array.try_readwrite() else {
        return Err(refuse("is read-only, in use by another batch, or lies over another buffer".into()));
    };
    if !array.is_contiguous() || array.len() < size {
        return Err(refuse(format!(
            "has become {} values, contiguous: {}",
            array.len(),
            array.is_contiguous()
        )));
    }
    Ok(lent)
}

impl PyDraftBatch {
    /// A copy of a tree.
    fn tree(&self, py: Python<'_>, tree: usize) -> PyResult<DraftTree> {
        let offsets = self.offsets.bind(py).try_readonly()?;
        let offsets = offsets.as_slice()?;
        let (start, end) = (offsets[tree].max(0) as usize, offsets[tree + 1].max(0) as usize);
        let (token_ids, parents) =
            (self.token_ids.bind(py).try_readonly()?, self.parents.bind(py).try_readonly()?);
        let (probs, sources) = (self.probs.bind(py).try_readonly()?, self.sources.bind(py).try_readonly()?);
        let nodes = part(py, token_ids.as_slice()?, start, end)?
            .zip(part(py, parents.as_slice()?, start, end)?)
            .zip(part(py, probs.as_slice()?, start, end)?.zip(part(py, sources.as_slice()?, start, end)?))
            .map(|((token, parent), (prob, source))| (token as u32, parent, prob, source as u8));
        DraftTree::from_nodes(nodes).map_err(|_| changed(py))
    }

    fn nodes(&self) -> usize {
        self.nodes.load(Ordering::Relaxed)
    }

    /// Hands the trees to `act` as they lie.
    pub fn with_trees<T>(&self, py: Python<'_>, act: impl FnOnce(FlatTrees<'_>) -> T) -> PyResult<T> {
        let busy = |_| error(py, "InvalidArgumentError", "trees are in use by another batch");
        let token_ids = self.token_ids.bind(py).try_readonly().map_err(busy)?;
        let parents = self.parents.bind(py).try_readonly().map_err(busy)?;
        let offsets = self.offsets.bind(py).try_readonly().map_err(busy)?;
        let nodes = self.nodes();
        Ok(act(FlatTrees {
            token_ids: &token_ids.as_slice()?[..nodes],
            parents: &parents.as_slice()?[..nodes],
            offsets: &offsets.as_slice()?[..=self.__len__()],
        }))
    }

    /// All buffers, to be written to: they are what they were when they were given, and nobody else has them.
    pub fn lend<'py>(&self, py: Python<'py>) -> PyResult<Lent<'py>> {
        Ok(Lent {
            token_ids: writable(py, "token_ids", &self.token_ids, self.max_nodes)?,
            parents: writable(py, "parents", &self.parents, self.max_nodes)?,
            depths: writable(py, "depths", &self.depths, self.max_nodes)?,
            probs: writable(py, "probs", &self.probs, self.max_nodes)?,
            sources: writable(py, "sources", &self.sources, self.max_nodes)?,
            offsets: writable(py, "offsets", &self.offsets, self.max_sequences + 1)?,
        })
    }

    /// Copies in the trees that `trees` hands to its argument, with their numbers from 0 to `sequences`.
    pub fn fill(
        &self,
        lent: Lent<'_>,
        sequences: usize,
        trees: impl FnOnce(&mut dyn FnMut(usize, &DraftTree)),
    ) -> PyResult<()> {
        let Lent { mut token_ids, mut parents, mut depths, mut probs, mut sources, mut offsets } = lent;
        let (token_ids, parents) = (token_ids.as_slice_mut()?, parents.as_slice_mut()?);
        let (depths, probs) = (depths.as_slice_mut()?, probs.as_slice_mut()?);
        let (sources, offsets) = (sources.as_slice_mut()?, offsets.as_slice_mut()?);
        let mut end = 0;
        offsets[0] = 0;
        trees(&mut |index, tree| {
            let nodes = end..end + tree.len();
            for (to, &from) in token_ids[nodes.clone()].iter_mut().zip(&tree.token_ids) {
                *to = from as i32;
            }
            parents[nodes.clone()].copy_from_slice(&tree.parents);
            depths[nodes.clone()].copy_from_slice(&tree.depths);
            probs[nodes.clone()].copy_from_slice(&tree.probs);
            for (to, &from) in sources[nodes.clone()].iter_mut().zip(&tree.sources) {
                *to = from as i8;
            }
            end = nodes.end;
            offsets[index + 1] = end as i32;
        });
        self.sequences.store(sequences, Ordering::Relaxed);
        self.nodes.store(end, Ordering::Relaxed);
        self.tell(Drafted { requests: sequences, nodes: end, context: 0.0 });
        Ok(())
    }

    /// Says what was drafted for the trees.
    fn tell(&self, drafted: Drafted) {
        self.drafted_sequences.store(drafted.requests, Ordering::Relaxed);
        self.drafted_nodes.store(drafted.nodes, Ordering::Relaxed);
        self.context.store(drafted.context.to_bits(), Ordering::Relaxed);
        self.lock_accepted().clear();
    }

    fn lock_accepted(&self) -> MutexGuard<'_, Vec<i32>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what a step has drafted, and what has become of the drafts before.
    pub fn tell_step(&self, work: &Work) {
        self.tell(work.drafted());
        if work.extend {
            let mut accepted = self.lock_accepted();
            work.accepted(|count| accepted.push(count as i32));
        }
    }
}

/// The batch that was given, if it has room for so much, or a new one.
pub fn output<'py>(
    py: Python<'py>,
    given: Option<&Bound<'py, PyDraftBatch>>,
    sequences: usize,
    nodes: usize,
) -> PyResult<Bound<'py, PyDraftBatch>> {
    let Some(given) = given else {
        let made =
            PyDraftBatch::new(py, sequences as i128, nodes as i128, None, None, None, None, None, None)?;
        return Bound::new(py, made);
    };
    let (max_sequences, max_nodes) = (given.get().max_sequences, given.get().max_nodes);
    if max_sequences < sequences || max_nodes < nodes {
        let message = format!(
            "out has room for {max_sequences} sequences and {max_nodes} nodes, and the batch may come to \
             {sequences} and {nodes}"
        );
        return Err(error(py, "InvalidArgumentError", message));
    }
    Ok(given.clone())
}
