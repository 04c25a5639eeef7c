//! Batch calls of `sssd.Drafter`, and `sssd.DraftBatch`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use numpy::{
    Element, PyArray1, PyArrayDescrMethods, PyArrayMethods, PyReadwriteArray1, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PySlice};
use sssd_core::{DraftTree, FlatTrees, Limits, MAX_NODES};
use sssd_engine::{Drafted, Plan, Work};

use crate::boundary::{
    LONG, call, call_cancelled, int, node_budget, not_negative, optional_int, probability, request_error,
};
use crate::drafter::PyDrafter;
use crate::errors::error;
use crate::sequence::{PySequence, check_room};
use crate::shutdown::defer_shutdown;
use crate::sizing::{PySizingRule, read_sizing};
use crate::tokens::{blocks, history_into, integers, integers_into, top};
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
        DraftTree::from_nodes(nodes).map(PyDraftTree).map_err(|_| changed(py))
    }

    fn __repr__(&self) -> String {
        format!("DraftBatch({} sequences, {} nodes)", self.__len__(), self.nodes())
    }
}

/// A batch or a tree of it has at most so many nodes, so that offsets fit 32 bits.
const MOST: usize = 1 << 24;

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

/// The first `len` values of a buffer.
pub fn view<'py, T: Element>(py: Python<'py>, array: &Array<T>, len: usize) -> PyResult<Bound<'py, PyAny>> {
    array.bind(py).get_item(PySlice::new(py, 0, len as isize, 1))
}

/// The buffers of a batch while it is drafted: nobody else can have them.
struct Lent<'py> {
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
    fn lend<'py>(&self, py: Python<'py>) -> PyResult<Lent<'py>> {
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
    fn fill(
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
    }
}

/// What a batch call is to draft.
struct Asked<'a, 'py> {
    max_nodes: Option<&'a Bound<'py, PyAny>>,
    total_nodes: Option<i128>,
    min_nodes: Option<&'a Bound<'py, PyAny>>,
    max_depth: Option<&'a Bound<'py, PyAny>>,
    min_prob: f32,
    cost: Option<&'a Bound<'py, PyAny>>,
    rate: Option<f64>,
    rule: Option<&'a Bound<'py, PySizingRule>>,
    out: Option<&'a Bound<'py, PyDraftBatch>>,
}

/// Tokens to append: flat ids, offsets, and the target's most probable ones.
struct Produced<'a, 'py> {
    token_ids: &'a Bound<'py, PyAny>,
    offsets: &'a Bound<'py, PyAny>,
    topk_ids: Option<&'a Bound<'py, PyAny>>,
    topk_probs: Option<&'a Bound<'py, PyAny>>,
    feedback_ids: Option<&'a Bound<'py, PyAny>>,
    feedback_probs: Option<&'a Bound<'py, PyAny>>,
}

#[pymethods]
impl PyDrafter {
    /// Appends the tokens that the target model has produced for each of many sequences, in one call.
    ///
    /// Args:
    ///     sequences: n sequences of this drafter, none twice.
    ///     token_ids: their tokens one after another, integers [m].
    ///     offsets: those of sequence i are ``token_ids[offsets[i]:offsets[i + 1]]``; integers [n+1].
    ///     topk_ids, topk_probs: as in ``Sequence.extend``, [m, k].
    ///
    /// Raises:
    ///     InvalidTokenError, InvalidArgumentError: bad input; nothing is appended to any sequence.
    ///     BatchError: sequences are closed, met an internal error or do not fit into memory; the others are extended.
    #[pyo3(signature = (sequences, token_ids, offsets, topk_ids=None, topk_probs=None))]
    fn extend_batch(
        &self,
        sequences: &Bound<'_, PyAny>,
        token_ids: &Bound<'_, PyAny>,
        offsets: &Bound<'_, PyAny>,
        topk_ids: Option<&Bound<'_, PyAny>>,
        topk_probs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let produced =
            Produced { token_ids, offsets, topk_ids, topk_probs, feedback_ids: None, feedback_probs: None };
        self.run(sequences, Some(&produced), None).map(|_| ())
    }

    /// Drafts for many sequences in one call. The GIL is released, and the drafter's threads share the work.
    ///
    /// Args:
    ///     sequences: n sequences of this drafter, none twice.
    ///     max_nodes: the most nodes of each tree, 0 to 1024: one number or integers [n]. 0 turns a sequence off. By
    ///         default 32, or what the ``rule`` says.
    ///     total_nodes: the most nodes of all trees together. They go to the most probable nodes, whichever sequences
    ///         these belong to. Without it every tree gets what ``Sequence.draft`` gives it.
    ///     min_nodes: nodes that a tree gets before others are considered, if it can have so many; one number or [n].
    ///     max_depth: no node is deeper; one number or [n]. ``max_length`` of a sequence holds as well.
    ///     min_prob: least probability of a node. A ``rule`` has its own.
    ///     cost: what passes cost, ``PassCosts`` or a ``CostCurve``: then all trees together are as large as pays, as
    ///         ``PassCosts.allocate`` has it, with at most ``max_nodes`` each; not together with ``total_nodes``. A
    ///         curve is read at this number of sequences and their mean length.
    ///     rate: what a second is worth then, in tokens; by default what decoding without drafts makes of it.
    ///     rule: a ``SizingRule`` in place of the two: it says how much to draft for each sequence, shares the pass out,
    ///         and learns from both.
    ///     out: where to put the trees; by default a new ``DraftBatch``.
    ///
    /// Returns:
    ///     ``out`` or the new ``DraftBatch``.
    ///
    /// Raises:
    ///     InvalidArgumentError: bad input, or ``out`` has not room enough for all trees at their largest; nothing is
    ///         drafted.
    ///     BatchError: sequences are closed or met an internal error. Its ``batch`` has the trees of the others.
    #[pyo3(signature = (sequences, max_nodes=None, *, total_nodes=None, min_nodes=None, max_depth=None,
                        min_prob=0.001, cost=None, rate=None, rule=None, out=None))]
    #[allow(clippy::too_many_arguments)]
    fn draft_batch<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        max_nodes: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = optional_int)] total_nodes: Option<i128>,
        min_nodes: Option<&Bound<'py, PyAny>>,
        max_depth: Option<&Bound<'py, PyAny>>,
        min_prob: f32,
        cost: Option<&Bound<'py, PyAny>>,
        rate: Option<f64>,
        rule: Option<&Bound<'py, PySizingRule>>,
        out: Option<&Bound<'py, PyDraftBatch>>,
    ) -> PyResult<Bound<'py, PyDraftBatch>> {
        let asked = Asked { max_nodes, total_nodes, min_nodes, max_depth, min_prob, cost, rate, rule, out };
        self.run(sequences, None, Some(&asked))?.ok_or_else(|| unreachable(sequences.py()))
    }

    /// One engine step in one call: the target's probabilities after the last drafts, ``extend_batch``, then
    /// ``draft_batch``, for each sequence in one go.
    ///
    /// Args:
    ///     feedback_ids: the target's k most probable tokens after every node of the last drafts, verified and accepted or
    ///         not, integers [n, rows, k]: row 0 of a sequence after its last token (the root), row i + 1 after node i of
    ///         its last draft; further rows are not looked at. As ``Sequence.feedback``; ``topk_ids`` are not needed then.
    ///     feedback_probs: their probabilities, floats [n, rows, k].
    ///
    ///     The others are those of the two.
    ///
    /// Returns, Raises:
    ///     As the two.
    #[pyo3(signature = (sequences, token_ids, offsets, max_nodes=None, *, total_nodes=None, min_nodes=None,
                        max_depth=None, min_prob=0.001, cost=None, rate=None, rule=None, topk_ids=None,
                        topk_probs=None, feedback_ids=None, feedback_probs=None, out=None))]
    #[allow(clippy::too_many_arguments)]
    fn step<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        token_ids: &Bound<'py, PyAny>,
        offsets: &Bound<'py, PyAny>,
        max_nodes: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = optional_int)] total_nodes: Option<i128>,
        min_nodes: Option<&Bound<'py, PyAny>>,
        max_depth: Option<&Bound<'py, PyAny>>,
        min_prob: f32,
        cost: Option<&Bound<'py, PyAny>>,
        rate: Option<f64>,
        rule: Option<&Bound<'py, PySizingRule>>,
        topk_ids: Option<&Bound<'py, PyAny>>,
        topk_probs: Option<&Bound<'py, PyAny>>,
        feedback_ids: Option<&Bound<'py, PyAny>>,
        feedback_probs: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyDraftBatch>>,
    ) -> PyResult<Bound<'py, PyDraftBatch>> {
        let produced = Produced { token_ids, offsets, topk_ids, topk_probs, feedback_ids, feedback_probs };
        let asked = Asked { max_nodes, total_nodes, min_nodes, max_depth, min_prob, cost, rate, rule, out };
        self.run(sequences, Some(&produced), Some(&asked))?.ok_or_else(|| unreachable(sequences.py()))
    }
}

fn unreachable(py: Python<'_>) -> PyErr {
    error(py, "InternalError", "a batch that was to draft has no trees")
}

impl PyDrafter {
    fn run<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        produced: Option<&Produced<'_, 'py>>,
        asked: Option<&Asked<'_, 'py>>,
    ) -> PyResult<Option<Bound<'py, PyDraftBatch>>> {
        let py = sequences.py();
        let step = self.engine.idle_step();
        let mut work = step.lock();
        self.read_sequences(sequences, &mut work)?;
        if let Some(produced) = produced {
            self.read_tokens(produced, &mut work)?;
        }
        let out = match asked {
            None => None,
            Some(asked) => {
                let most = read_plans(py, asked, &mut work)?;
                Some(output(py, asked.out, work.requests.len(), most)?)
            }
        };
        if let Some(repeated) = work.repeated() {
            let message = format!("sequences[{repeated}] is in the batch twice");
            return Err(error(py, "InvalidArgumentError", message));
        }
        // whatever is wrong with `out` is found before anything changes, and nothing can go wrong with it later
        let lent = out.as_ref().map(|out| out.get().lend(py)).transpose()?;
        let (long, cancelled) = (work.tokens.len() > LONG, Arc::clone(&work.cancelled));
        drop(work);
        if long {
            let (engine, step) = (Arc::clone(&self.engine), Arc::clone(&step));
            call_cancelled(py, cancelled, move |_| engine.run(&step))?;
        } else {
            call(py, true, || self.engine.run(&step))?;
        }
        let work = step.lock();
        if let (Some(out), Some(lent)) = (&out, lent) {
            out.get().fill(lent, work.requests.len(), |act| work.trees(act))?;
            out.get().tell(work.drafted());
        }
        let failures: Vec<_> = work.failures().collect();
        drop(work);
        self.engine.put_back(step);
        if failures.is_empty() {
            return Ok(out);
        }
        let raised = PyDict::new(py);
        for failure in &failures {
            raised.set_item(failure.index, request_error(py, &failure.error).value(py))?;
        }
        let places: Vec<_> = failures.iter().map(|failure| failure.index.to_string()).collect();
        let message =
            format!("sequences {} of the batch failed; first: {}", places.join(", "), failures[0].error);
        let raise = error(py, "BatchError", message);
        raise.value(py).setattr("failures", raised)?;
        raise.value(py).setattr("batch", out)?;
        Err(raise)
    }

    fn read_sequences(&self, sequences: &Bound<'_, PyAny>, work: &mut Work) -> PyResult<()> {
        let py = sequences.py();
        let refuse = |message: String| error(py, "InvalidArgumentError", message);
        for (index, item) in sequences.try_iter()?.enumerate() {
            let item = item?;
            let Ok(sequence) = item.cast::<PySequence>() else {
                return Err(refuse(format!(
                    "sequences[{index}] must be a Sequence, got {}",
                    item.get_type()
                )));
            };
            let sequence = sequence.get();
            if !Arc::ptr_eq(&sequence.engine, &self.engine) {
                return Err(refuse(format!("sequences[{index}] belongs to another drafter")));
            }
            work.requests.push(sequence.request.clone());
        }
        if work.requests.len() > MOST / MAX_NODES {
            return Err(refuse(format!("a batch has at most {} sequences", MOST / MAX_NODES)));
        }
        Ok(())
    }

    fn read_tokens(&self, produced: &Produced<'_, '_>, work: &mut Work) -> PyResult<()> {
        let py = produced.token_ids.py();
        work.extend = true;
        check_room(&self.engine, produced.token_ids)?;
        history_into(produced.token_ids, self.engine.options().vocab_size, &mut work.tokens)?;
        let (n, m) = (work.requests.len(), work.tokens.len());
        let offsets = &mut work.offsets;
        let mut sound = true;
        integers_into(produced.offsets, "offsets", &mut |offset: i64| {
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            sound &= offset >= offsets.last().copied().unwrap_or(0);
            offsets.push(offset);
        })?;
        if !sound || offsets.len() != n + 1 || offsets[0] != 0 || offsets[n] != m {
            let message = format!("offsets must be {} numbers that rise from 0 to the {m} tokens", n + 1);
            return Err(error(py, "InvalidArgumentError", message));
        }
        if let Some(top) = top(produced.topk_ids, produced.topk_probs, m, self.engine.options().vocab_size)? {
            (work.k, work.top_ids, work.top_probs) = top.into_parts();
        }
        let feedback =
            blocks(produced.feedback_ids, produced.feedback_probs, n, self.engine.options().vocab_size)?;
        if let Some((rows, feedback)) = feedback {
            work.feedback_rows = rows;
            (work.feedback_k, work.feedback_ids, work.feedback_probs) = feedback.into_parts();
        }
        Ok(())
    }
}

/// Reads what is to be drafted, and returns the most nodes that may come of it.
fn read_plans(py: Python<'_>, asked: &Asked<'_, '_>, work: &mut Work) -> PyResult<usize> {
    let refuse = |message: String| error(py, "InvalidArgumentError", message);
    work.draft = true;
    let n = work.requests.len();
    let min_prob = probability(py, "min_prob", asked.min_prob)?;
    let max_nodes = if asked.rule.is_some() { MAX_NODES } else { Limits::DEFAULT.max_nodes };
    let limits = Limits { max_nodes, min_prob, ..Limits::DEFAULT };
    work.plans.resize(n, Plan { min_nodes: 0, limits });
    each(asked.max_nodes, "max_nodes", work, |plan, nodes| {
        plan.limits.max_nodes = node_budget(py, "max_nodes", nodes)?;
        Ok(())
    })?;
    each(asked.min_nodes, "min_nodes", work, |plan, nodes| {
        plan.min_nodes = node_budget(py, "min_nodes", nodes)?;
        Ok(())
    })?;
    each(asked.max_depth, "max_depth", work, |plan, depth| {
        plan.limits.max_depth = not_negative(py, "max_depth", depth)?;
        Ok(())
    })?;
    let sum: usize = work.plans.iter().map(|plan| plan.limits.max_nodes).sum();
    let least: usize = work.plans.iter().map(|plan| plan.min_nodes.min(plan.limits.max_nodes)).sum();
    let most = work.plans.iter().map(|plan| plan.limits.max_nodes).max().unwrap_or(0);
    work.sizing = read_sizing(py, asked.cost, asked.rate, asked.rule, most)?;
    if work.sizing.is_some() {
        return match asked.total_nodes {
            Some(_) => Err(refuse("give total_nodes, or cost or rule, not both".into())),
            None => Ok(sum),
        };
    }
    work.total_nodes = asked.total_nodes.map(|total| not_negative(py, "total_nodes", total)).transpose()?;
    match work.total_nodes {
        Some(total) if least > total => {
            Err(refuse(format!("total_nodes is {total}, but min_nodes are {least} in all")))
        }
        Some(total) if total >= sum => {
            work.total_nodes = None;
            Ok(sum)
        }
        Some(total) => Ok(total),
        None => Ok(sum),
    }
}

/// Gives each plan its value: the same for all, or one each.
fn each(
    values: Option<&Bound<'_, PyAny>>,
    name: &str,
    work: &mut Work,
    mut set: impl FnMut(&mut Plan, i128) -> PyResult<()>,
) -> PyResult<()> {
    let Some(values) = values else { return Ok(()) };
    if let Ok(value) = int(values) {
        return work.plans.iter_mut().try_for_each(|plan| set(plan, value));
    }
    let values_read = integers(values, name)?;
    if values_read.len() != work.plans.len() {
        let message = format!("{name} must be one number or {}, got {}", work.plans.len(), values_read.len());
        return Err(error(values.py(), "InvalidArgumentError", message));
    }
    work.plans.iter_mut().zip(values_read).try_for_each(|(plan, value)| set(plan, value.into()))
}

fn output<'py>(
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
