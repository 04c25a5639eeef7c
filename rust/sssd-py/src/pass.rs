//! `sssd.PassBlock`.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use numpy::{
    Element, PyArray1, PyArrayDyn, PyArrayMethods, PyReadwriteArray1, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use sssd_core::{FlatTrees, PassBlock, PassError, Shape, Token};

use crate::boundary::{call, not_negative, optional_int};
use crate::draft_batch::{Array, PyDraftBatch, buffer, view};
use crate::errors::error;
use crate::shutdown::defer_shutdown;
use crate::tokens::{integers_into, tokens_into};

/// Fewer values than this are written before another thread could have taken the GIL.
const DETACH_FROM: usize = 1 << 18;
/// The most values of a mask.
const MAX_MASK: usize = 1 << 31;

/// What one verify pass takes and gives back, for the trees of a whole batch: ``[root] + nodes`` of each row.
///
/// Entry 0 of a row is its root, the last token of the text; entry ``i + 1`` is node ``i``. Rows are padded to one
/// width, ``[B, T]``, or packed end to end, ``[N]``. Fillers repeat the root's token and position, have no parent and
/// attend to themselves only. The arrays are views of buffers that the next ``fill`` or ``accept`` overwrites; nothing
/// is allocated once they have grown. One call at a time may use a block.
///
/// Args:
///     ids, positions, depths, parents, first_child, next_sibling: buffers to use, contiguous int64 [n] with room for
///         every pass, such as pinned memory; by default own ones, which grow.
///     ancestors: the same, uint64.
///     mask: the same, bool.
///
/// Raises:
///     InvalidArgumentError: a buffer is not contiguous, of another dtype, or read-only.
#[pyclass(frozen, name = "PassBlock", module = "sssd")]
pub struct PyPassBlock(Mutex<State>);

struct State {
    block: PassBlock,
    ids: Buffer<i64>,
    positions: Buffer<i64>,
    depths: Buffer<i64>,
    parents: Buffer<i64>,
    first_child: Buffer<i64>,
    next_sibling: Buffer<i64>,
    rows: Buffer<i64>,
    ancestors: Buffer<u64>,
    mask: Buffer<bool>,
    offsets: Buffer<i32>,
    kept: Buffer<i64>,
    tokens: Buffer<i64>,
    accepted: Buffer<i32>,
    asked: Asked,
    /// What a fill was given; kept for its memory.
    roots: Vec<Token>,
    starts: Vec<i64>,
    no_trees: Vec<i32>,
}

/// What `fill` writes only when told to.
#[derive(Clone, Copy, Default)]
struct Asked {
    mask: bool,
    links: bool,
}

struct Buffer<T> {
    name: &'static str,
    array: Array<T>,
    given: bool,
}

impl<T: Element> Buffer<T> {
    fn new(py: Python<'_>, name: &'static str, given: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        Ok(Self { name, array: buffer(py, name, given, 0)?, given: given.is_some() })
    }

    /// Makes room for `needed` values.
    fn reserve(&mut self, py: Python<'_>, needed: usize) -> PyResult<()> {
        let room = self.array.bind(py).len();
        if room >= needed {
            return Ok(());
        }
        if self.given {
            let message = format!(
                "{} has room for {room} values, and the pass takes {needed}; give a larger array",
                self.name
            );
            return Err(error(py, "InvalidArgumentError", message));
        }
        let _deferred = defer_shutdown(py);
        self.array = PyArray1::zeros(py, needed.max(2 * room), false).unbind();
        Ok(())
    }

    fn lend<'py>(&self, py: Python<'py>) -> PyResult<PyReadwriteArray1<'py, T>> {
        self.array.bind(py).try_readwrite().map_err(|_| {
            let message = format!("{} is in use by another call, or read-only", self.name);
            error(py, "InvalidArgumentError", message)
        })
    }

    /// The first values in a shape.
    fn shaped<'py>(&self, py: Python<'py>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let flat = view(py, &self.array, shape.iter().product())?;
        match shape {
            [_] => Ok(flat),
            _ => Ok(flat.cast::<PyArray1<T>>()?.reshape(shape)?.into_any()),
        }
    }
}

#[pymethods]
impl PyPassBlock {
    #[new]
    #[pyo3(signature = (*, ids=None, positions=None, depths=None, parents=None, ancestors=None, mask=None,
                        first_child=None, next_sibling=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        ids: Option<&Bound<'_, PyAny>>,
        positions: Option<&Bound<'_, PyAny>>,
        depths: Option<&Bound<'_, PyAny>>,
        parents: Option<&Bound<'_, PyAny>>,
        ancestors: Option<&Bound<'_, PyAny>>,
        mask: Option<&Bound<'_, PyAny>>,
        first_child: Option<&Bound<'_, PyAny>>,
        next_sibling: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self(Mutex::new(State {
            block: PassBlock::default(),
            ids: Buffer::new(py, "ids", ids)?,
            positions: Buffer::new(py, "positions", positions)?,
            depths: Buffer::new(py, "depths", depths)?,
            parents: Buffer::new(py, "parents", parents)?,
            first_child: Buffer::new(py, "first_child", first_child)?,
            next_sibling: Buffer::new(py, "next_sibling", next_sibling)?,
            rows: Buffer::new(py, "rows", None)?,
            ancestors: Buffer::new(py, "ancestors", ancestors)?,
            mask: Buffer::new(py, "mask", mask)?,
            offsets: Buffer { name: "offsets", array: buffer(py, "offsets", None, 1)?, given: false },
            kept: Buffer::new(py, "kept", None)?,
            tokens: Buffer::new(py, "tokens", None)?,
            accepted: Buffer::new(py, "accepted", None)?,
            asked: Asked::default(),
            roots: Vec::new(),
            starts: Vec::new(),
            no_trees: Vec::new(),
        })))
    }

    /// Writes the entries of a pass. The GIL is released for large ones.
    ///
    /// Args:
    ///     trees: the drafts of B rows, or None where nothing is drafted.
    ///     roots: the last token of each row, B integers.
    ///     positions: its position id, B integers.
    ///     width: T, at least one more than the largest tree has nodes; by default just that.
    ///     packed: whether rows lie end to end, without fillers; then there is no ``width``.
    ///     mask: whether to write ``mask`` as well.
    ///     links: whether to write ``first_child`` and ``next_sibling`` as well.
    ///
    /// Raises:
    ///     InvalidArgumentError: bad input, or a buffer that was given is too short. The block has no rows then.
    ///     InvalidTokenError: a root is not an integer in 0..2^31.
    #[pyo3(signature = (trees, roots, positions, *, width=None, packed=false, mask=false, links=false))]
    #[allow(clippy::too_many_arguments)]
    fn fill(
        &self,
        py: Python<'_>,
        trees: Option<&Bound<'_, PyDraftBatch>>,
        roots: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = optional_int)] width: Option<i128>,
        packed: bool,
        mask: bool,
        links: bool,
    ) -> PyResult<()> {
        let state = &mut *self.lock(py)?;
        let width = width.map(|width| not_negative(py, "width", width)).transpose()?;
        let shape = match (packed, width) {
            (true, Some(_)) => {
                return Err(error(py, "InvalidArgumentError", "packed rows have no width: leave one out"));
            }
            (true, None) => Shape::Packed,
            (false, width) => Shape::Padded(width),
        };
        state.asked = Asked { mask, links };
        let done = state.read(py, trees, roots, positions, shape);
        let done = done.and_then(|()| state.reserve(py)).and_then(|()| state.write(py));
        if done.is_err() {
            state.block = PassBlock::default();
        }
        done
    }

    /// Tokens, int64 [B, T] or [N].
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        state.ids.shaped(py, &state.shape())
    }

    /// Position ids: the root's plus the depth; int64 [B, T] or [N].
    #[getter]
    fn positions<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        state.positions.shaped(py, &state.shape())
    }

    /// Distance from the root, int64 [B, T] or [N].
    #[getter]
    fn depths<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        state.depths.shaped(py, &state.shape())
    }

    /// The parent's entry within the row, int64 [B, T] or [N]; -1 for roots and fillers.
    #[getter]
    fn parents<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        state.parents.shaped(py, &state.shape())
    }

    /// The entry of the first child within the row, int64 [B, T] or [N]; -1 for none. Children and siblings come in
    /// the order of entries, which is that of probability.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``fill`` was not asked for links.
    #[getter]
    fn first_child<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        asked_for(py, state.asked.links, "links")?;
        state.first_child.shaped(py, &state.shape())
    }

    /// The entry of the next child of the same parent within the row, int64 [B, T] or [N]; -1 for none.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``fill`` was not asked for links.
    #[getter]
    fn next_sibling<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        asked_for(py, state.asked.links, "links")?;
        state.next_sibling.shaped(py, &state.shape())
    }

    /// The row of each entry, int64 [B, T] or [N].
    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        state.rows.shaped(py, &state.shape())
    }

    /// Where each row starts among all entries, int32 [B+1].
    #[getter]
    fn offsets<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        state.offsets.shaped(py, &[state.block.rows() + 1])
    }

    /// What each entry attends to within its row, uint64 [B, T, W] or [N, W]: bit ``j % 64`` of word ``j // 64`` is set
    /// where entry ``j`` is its ancestor or itself. W is 1 for rows of up to 64 entries.
    #[getter]
    fn ancestors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        let mut shape = state.shape();
        shape.push(state.block.words());
        state.ancestors.shaped(py, &shape)
    }

    /// The attention mask, bool [B, T, T] or [N, N]; True where the entry may attend to the other.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``fill`` was not asked for the mask.
    #[getter]
    fn mask<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock(py)?;
        asked_for(py, state.asked.mask, "mask")?;
        let mut shape = state.shape();
        shape.push(state.block.width().unwrap_or_else(|| state.block.entries()));
        state.mask.shaped(py, &shape)
    }

    /// Walks every row from its root along the target's own tokens.
    ///
    /// Args:
    ///     targets: the target's token after each entry, integers [B, T] or [N]; at fillers they are not looked at.
    ///
    /// Returns:
    ///     kept int64 [M], the entries of each row to keep in the cache: the root and the accepted nodes; tokens int64
    ///     [M], the target's token after each of them: the accepted tokens and one that was not drafted; offsets int32
    ///     [B+1], where each row starts in both. ``tokens`` and ``offsets`` are what ``Drafter.step`` takes next.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``targets`` are not integers of that shape.
    fn accept<'py>(
        &self,
        targets: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let py = targets.py();
        let mut state = self.lock(py)?;
        let targets = read_targets(targets, &state.shape())?;
        let (most, rows) = (state.block.filled(), state.block.rows());
        state.kept.reserve(py, most)?;
        state.tokens.reserve(py, most)?;
        state.accepted.reserve(py, rows + 1)?;
        let end = {
            let (mut kept, mut tokens) = (state.kept.lend(py)?, state.tokens.lend(py)?);
            let mut accepted = state.accepted.lend(py)?;
            let (kept, tokens) = (kept.as_slice_mut()?, tokens.as_slice_mut()?);
            let offsets = accepted.as_slice_mut()?;
            let block = &state.block;
            let detach = most > DETACH_FROM;
            let overlap =
                || error(py, "InvalidArgumentError", "targets are being written to: copy them first");
            match &targets {
                Targets::Long(array) => {
                    let targets = array.try_readonly().map_err(|_| overlap())?;
                    let targets = targets.as_slice()?;
                    call(py, detach, || block.accept(targets, kept, tokens, offsets))?
                }
                Targets::Int(array) => {
                    let targets = array.try_readonly().map_err(|_| overlap())?;
                    let targets = targets.as_slice()?;
                    call(py, detach, || block.accept(targets, kept, tokens, offsets))?
                }
            }
            .map_err(|reason| invalid(py, &reason))?;
            offsets[rows] as usize
        };
        Ok((
            state.kept.shaped(py, &[end])?,
            state.tokens.shaped(py, &[end])?,
            state.accepted.shaped(py, &[rows + 1])?,
        ))
    }

    /// Number of rows.
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.lock(py)?.block.rows())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let state = self.lock(py)?;
        let (rows, entries) = (state.block.rows(), state.block.entries());
        Ok(match state.block.width() {
            Some(width) => format!("PassBlock({rows} rows of {width} entries)"),
            None => format!("PassBlock({rows} rows, {entries} entries)"),
        })
    }
}

impl PyPassBlock {
    /// Waits for nobody, who could wait for the GIL.
    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, State>> {
        match self.0.try_lock() {
            Ok(state) => Ok(state),
            Err(TryLockError::Poisoned(poisoned)) => Ok(PoisonError::into_inner(poisoned)),
            Err(TryLockError::WouldBlock) => {
                Err(error(py, "InvalidArgumentError", "the block is in use by another call"))
            }
        }
    }
}

impl State {
    fn shape(&self) -> Vec<usize> {
        match self.block.width() {
            Some(width) => vec![self.block.rows(), width],
            None => vec![self.block.entries()],
        }
    }

    /// Takes over what a pass is of.
    fn read(
        &mut self,
        py: Python<'_>,
        trees: Option<&Bound<'_, PyDraftBatch>>,
        roots: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        shape: Shape,
    ) -> PyResult<()> {
        self.roots.clear();
        self.starts.clear();
        tokens_into(roots, None, &mut self.roots)?;
        let starts = &mut self.starts;
        integers_into(positions, "positions", &mut |position| starts.push(position))?;
        let (block, roots) = (&mut self.block, &self.roots);
        let mut set = |trees: FlatTrees<'_>| {
            let detach = trees.token_ids.len() > DETACH_FROM;
            call(py, detach, || block.set(roots, trees, shape))
        };
        let done = match trees {
            Some(trees) => trees.get().with_trees(py, set)??,
            None => {
                self.no_trees.clear();
                self.no_trees.resize(roots.len() + 1, 0);
                set(FlatTrees { token_ids: &[], parents: &[], offsets: &self.no_trees })?
            }
        };
        done.map_err(|reason| invalid(py, &reason))
    }

    fn reserve(&mut self, py: Python<'_>) -> PyResult<()> {
        let block = &self.block;
        let (entries, rows) = (block.entries(), block.rows());
        let fields =
            [&mut self.ids, &mut self.positions, &mut self.depths, &mut self.parents, &mut self.rows];
        fields.into_iter().try_for_each(|field| field.reserve(py, entries))?;
        self.ancestors.reserve(py, entries * block.words())?;
        self.offsets.reserve(py, rows + 1)?;
        if self.asked.links {
            self.first_child.reserve(py, entries)?;
            self.next_sibling.reserve(py, entries)?;
        }
        if self.asked.mask {
            let values = block.mask_values();
            if values > MAX_MASK {
                let message =
                    format!("a mask of {values} values is too large: take ancestors, or smaller batches");
                return Err(error(py, "InvalidArgumentError", message));
            }
            self.mask.reserve(py, values)?;
        }
        Ok(())
    }

    fn write(&self, py: Python<'_>) -> PyResult<()> {
        let (mut ids, mut positions) = (self.ids.lend(py)?, self.positions.lend(py)?);
        let (mut depths, mut parents) = (self.depths.lend(py)?, self.parents.lend(py)?);
        let (mut first_child, mut next_sibling) = (self.first_child.lend(py)?, self.next_sibling.lend(py)?);
        let (mut rows, mut offsets) = (self.rows.lend(py)?, self.offsets.lend(py)?);
        let (mut ancestors, mut mask) = (self.ancestors.lend(py)?, self.mask.lend(py)?);
        let (ids, positions) = (ids.as_slice_mut()?, positions.as_slice_mut()?);
        let (depths, parents) = (depths.as_slice_mut()?, parents.as_slice_mut()?);
        let (first_child, next_sibling) = (first_child.as_slice_mut()?, next_sibling.as_slice_mut()?);
        let (rows, offsets) = (rows.as_slice_mut()?, offsets.as_slice_mut()?);
        let (ancestors, mask) = (ancestors.as_slice_mut()?, mask.as_slice_mut()?);
        let (block, starts, asked) = (&self.block, &self.starts, self.asked);
        let values = block.entries() + if asked.mask { block.mask_values() } else { 0 };
        let work = || {
            block.ids(ids)?;
            block.positions(starts, positions)?;
            block.depths(depths)?;
            block.parents(parents)?;
            block.row_numbers(rows)?;
            block.offsets(offsets)?;
            block.ancestors(ancestors)?;
            if asked.links {
                block.first_child(first_child)?;
                block.next_sibling(next_sibling)?;
            }
            if asked.mask { block.mask(mask) } else { Ok(()) }
        };
        call(py, values > DETACH_FROM, work)?.map_err(|reason| invalid(py, &reason))
    }
}

fn asked_for(py: Python<'_>, asked: bool, name: &str) -> PyResult<()> {
    if asked {
        return Ok(());
    }
    let message = format!("the block was filled without {name}: call fill with {name}=True");
    Err(error(py, "InvalidArgumentError", message))
}

enum Targets<'py> {
    Long(Bound<'py, PyArrayDyn<i64>>),
    Int(Bound<'py, PyArrayDyn<i32>>),
}

/// Targets of the block's shape, contiguous.
fn read_targets<'py>(targets: &Bound<'py, PyAny>, shape: &[usize]) -> PyResult<Targets<'py>> {
    let py = targets.py();
    let _deferred = defer_shutdown(py);
    let refuse = |got: String| {
        let message = format!(
            "targets must be integers of shape {shape:?}, the target's token after each entry, got {got}"
        );
        error(py, "InvalidArgumentError", message)
    };
    let mut array = targets.clone();
    let usual = array.cast::<PyArrayDyn<i64>>().is_ok_and(|array| array.is_c_contiguous())
        || array.cast::<PyArrayDyn<i32>>().is_ok_and(|array| array.is_c_contiguous());
    if !usual {
        let numpy = py.import("numpy")?;
        array = numpy.call_method1("asarray", (array,)).map_err(|problem| refuse(problem.to_string()))?;
        let dtype = array.getattr("dtype")?;
        let kind: String = dtype.getattr("kind")?.extract()?;
        if !matches!(kind.as_str(), "i" | "u") && !array.cast::<PyUntypedArray>()?.is_empty() {
            return Err(refuse(dtype.to_string()));
        }
        array = numpy.call_method1("ascontiguousarray", (array, "int64"))?;
    }
    let held = array.cast::<PyUntypedArray>()?.shape().to_vec();
    if held != shape {
        return Err(refuse(format!("{held:?}")));
    }
    match array.cast_into::<PyArrayDyn<i64>>() {
        Ok(array) => Ok(Targets::Long(array)),
        Err(other) => Ok(Targets::Int(other.into_inner().cast_into::<PyArrayDyn<i32>>()?)),
    }
}

fn invalid(py: Python<'_>, reason: &PassError) -> PyErr {
    error(py, "InvalidArgumentError", reason.to_string())
}
