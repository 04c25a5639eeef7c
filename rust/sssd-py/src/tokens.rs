//! Token ids in and arrays out.

use numpy::ndarray::s;
use numpy::{Element, PyArray1, PyArrayDescrMethods, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyInt, PyList, PyMemoryView, PySequence, PyString, PyTuple};
use sssd_core::{MAX_TOKEN, MemoryFull, PLACEHOLDER, Token, TopK};

use crate::boundary::{let_others_run, memory_full};
use crate::errors::error;
use crate::shutdown::defer_shutdown;

/// Token ids from any one-dimensional sequence or array of integers, each checked to be in the vocabulary.
pub fn tokens(ids: &Bound<'_, PyAny>, vocab_size: Option<u32>) -> PyResult<Vec<Token>> {
    let mut out = Vec::new();
    tokens_into(ids, vocab_size, &mut out)?;
    Ok(out)
}

/// The same, appended to `out`.
pub fn tokens_into(ids: &Bound<'_, PyAny>, vocab_size: Option<u32>, out: &mut Vec<Token>) -> PyResult<()> {
    let limit = vocab_size.map_or(MAX_TOKEN, |size| size - 1);
    let result = read(ids, &mut |id| push(out, id, limit));
    result.map_err(|refused| match refused {
        Refused::Raised(raised) => raised,
        Refused::Memory(wanted) => memory_full(ids.py(), &MemoryFull::System { wanted }),
        Refused::Id(id) => error(ids.py(), "InvalidTokenError", bad_id(id, out.len(), vocab_size)),
        Refused::Kind(kind) => bad_kind(ids, &kind),
    })
}

/// The tokens of a request: ids outside the vocabulary become placeholders.
pub fn history(ids: &Bound<'_, PyAny>, vocab_size: Option<u32>) -> PyResult<Vec<Token>> {
    let mut out = Vec::new();
    history_into(ids, vocab_size, &mut out)?;
    Ok(out)
}

/// The same, appended to `out`.
pub fn history_into(ids: &Bound<'_, PyAny>, vocab_size: Option<u32>, out: &mut Vec<Token>) -> PyResult<()> {
    let limit = i128::from(vocab_size.map_or(MAX_TOKEN, |size| size - 1));
    let result =
        read(ids, &mut |id| append(out, if (0..=limit).contains(&id) { id as Token } else { PLACEHOLDER }));
    result.map_err(|refused| match refused {
        Refused::Raised(raised) => raised,
        Refused::Memory(wanted) => memory_full(ids.py(), &MemoryFull::System { wanted }),
        Refused::Kind(kind) => bad_kind(ids, &kind),
        Refused::Id(id) => bad_kind(ids, &id.to_string()),
    })
}

fn bad_kind(ids: &Bound<'_, PyAny>, kind: &str) -> PyErr {
    let message = format!("token ids must be a one-dimensional sequence of integers, got {kind}");
    error(ids.py(), "InvalidTokenError", message)
}

/// An id as Python sees it: -1 for a placeholder.
pub fn shown(token: Token) -> i32 {
    if token > MAX_TOKEN { -1 } else { token as i32 }
}

/// Integers that may be negative, such as parents; the same inputs as [`tokens`].
pub fn integers(values: &Bound<'_, PyAny>, name: &str) -> PyResult<Vec<i64>> {
    let mut out = Vec::new();
    integers_into(values, name, &mut |value| out.push(value))?;
    Ok(out)
}

/// The same, given to `act` one by one.
pub fn integers_into(values: &Bound<'_, PyAny>, name: &str, act: &mut dyn FnMut(i64)) -> PyResult<()> {
    let result = read(values, &mut |value| match i64::try_from(value) {
        Ok(value) => {
            act(value);
            Ok(())
        }
        Err(_) => Err(Refused::Id(value)),
    });
    result.map_err(|refused| match refused {
        Refused::Raised(raised) => raised,
        Refused::Memory(wanted) => memory_full(values.py(), &MemoryFull::System { wanted }),
        Refused::Id(_) | Refused::Kind(_) => error(
            values.py(),
            "InvalidArgumentError",
            format!("{name} must be a one-dimensional sequence of 64-bit integers"),
        ),
    })
}

/// The target's most probable tokens at several positions, checked.
pub struct Top {
    k: usize,
    ids: Vec<Token>,
    probs: Vec<f32>,
}

impl Top {
    pub fn view(&self) -> TopK<'_> {
        TopK { k: self.k, ids: &self.ids, probs: &self.probs }
    }

    /// `k`, ids and probabilities.
    pub fn into_parts(self) -> (usize, Vec<Token>, Vec<f32>) {
        (self.k, self.ids, self.probs)
    }
}

/// Reads `topk_ids` and `topk_probs`, two arrays of `rows` rows; both or neither may be None.
pub fn top(
    ids: Option<&Bound<'_, PyAny>>,
    probs: Option<&Bound<'_, PyAny>>,
    rows: usize,
    vocab_size: Option<u32>,
) -> PyResult<Option<Top>> {
    let Some((ids, probs)) = both("topk", ids, probs)? else { return Ok(None) };
    let py = ids.py();
    let _deferred = defer_shutdown(py);
    let refuse = |message: String| error(py, "InvalidArgumentError", message);
    let (k, ids) = matrix(ids, "topk_ids", rows, "iu")?;
    let (k_probs, probs) = matrix(probs, "topk_probs", rows, "f")?;
    if k != k_probs {
        return Err(refuse(format!("topk_ids has {k} columns and topk_probs {k_probs}; they must agree")));
    }
    let ids = tokens(&ids.call_method1("reshape", (-1,))?, vocab_size)?;
    let probs = probs.call_method1("astype", ("float32",))?.call_method1("reshape", (-1,))?;
    let probs: Vec<f32> = probs.cast::<PyArray1<f32>>()?.to_vec()?;
    for (row, probs) in probs.chunks(k.max(1)).enumerate() {
        if let Some(prob) = probs.iter().find(|prob| !(0.0..=1.0 + ROUNDING).contains(*prob)) {
            return Err(refuse(format!("topk_probs must be between 0 and 1, got {prob} in row {row}")));
        }
        let total: f32 = probs.iter().sum();
        if total > 1.0 + ROUNDING {
            return Err(refuse(format!(
                "topk_probs of a row must sum to at most 1, got {total} in row {row}"
            )));
        }
    }
    Ok(Some(Top { k, ids, probs }))
}

/// Reads `feedback_ids` and `feedback_probs`, arrays [n, rows, k], and returns `rows` as well.
pub fn blocks(
    ids: Option<&Bound<'_, PyAny>>,
    probs: Option<&Bound<'_, PyAny>>,
    n: usize,
    vocab_size: Option<u32>,
) -> PyResult<Option<(usize, Top)>> {
    let Some((ids, probs)) = both("feedback", ids, probs)? else { return Ok(None) };
    let py = ids.py();
    let _deferred = defer_shutdown(py);
    let flat = |values: &Bound<'_, PyAny>, name: &str| {
        let refuse = |got: String| {
            let message = format!("{name} must be an array of shape [{n}, rows, k], got {got}");
            error(py, "InvalidArgumentError", message)
        };
        let array = py.import("numpy")?.call_method1("asarray", (values,));
        let array = array.map_err(|problem| refuse(problem.to_string()))?;
        match array.getattr("shape")?.extract::<Vec<usize>>()?[..] {
            [held, rows, k] if held == n => {
                Ok((rows, array.call_method1("reshape", ((n * rows, k),))?.unbind()))
            }
            ref shape => Err(refuse(format!("{shape:?}"))),
        }
    };
    let ((rows, ids), (rows_probs, probs)) = (flat(ids, "feedback_ids")?, flat(probs, "feedback_probs")?);
    if rows != rows_probs {
        let message = format!("feedback_ids has {rows} rows a sequence and feedback_probs {rows_probs}");
        return Err(error(py, "InvalidArgumentError", message));
    }
    let top = top(Some(ids.bind(py)), Some(probs.bind(py)), n * rows, vocab_size)?;
    Ok(top.filter(|_| rows > 0).map(|top| (rows, top)))
}

/// Ids and probabilities that belong together, if there are any.
fn both<'a, 'py>(
    name: &str,
    ids: Option<&'a Bound<'py, PyAny>>,
    probs: Option<&'a Bound<'py, PyAny>>,
) -> PyResult<Option<(&'a Bound<'py, PyAny>, &'a Bound<'py, PyAny>)>> {
    match (ids, probs) {
        (Some(given), None) | (None, Some(given)) => {
            let message = format!("{name}_ids and {name}_probs belong together: give both or neither");
            Err(error(given.py(), "InvalidArgumentError", message))
        }
        (ids, probs) => Ok(ids.zip(probs)),
    }
}

/// An array of `rows` rows whose numpy kind is one of `kinds`, and its number of columns.
fn matrix<'py>(
    values: &Bound<'py, PyAny>,
    name: &str,
    rows: usize,
    kinds: &str,
) -> PyResult<(usize, Bound<'py, PyAny>)> {
    let py = values.py();
    let refuse = |got: String| {
        error(py, "InvalidArgumentError", format!("{name} must be an array of shape [{rows}, k], got {got}"))
    };
    let array = py.import("numpy")?.call_method1("asarray", (values,));
    let array = array.map_err(|problem| refuse(problem.to_string()))?;
    let shape: Vec<usize> = array.getattr("shape")?.extract()?;
    let dtype = array.getattr("dtype")?;
    let kind: String = dtype.getattr("kind")?.extract()?;
    match shape[..] {
        [held, k] if held == rows && (kinds.contains(&kind) || held * k == 0) => Ok((k, array)),
        _ => Err(refuse(format!("{shape:?} of {dtype}"))),
    }
}

/// Probabilities in half precision may sum to a little more than 1.
const ROUNDING: f32 = 0.01;

/// A new int32 array.
pub fn int32<'py>(py: Python<'py>, values: impl IntoIterator<Item = i32>) -> Bound<'py, PyArray1<i32>> {
    PyArray1::from_iter(py, values)
}

enum Refused {
    Raised(PyErr),
    Id(i128),
    Kind(String),
    /// No memory for so many more bytes.
    Memory(usize),
}

impl From<PyErr> for Refused {
    fn from(raised: PyErr) -> Self {
        Self::Raised(raised)
    }
}

type Sink<'a> = dyn FnMut(i128) -> Result<(), Refused> + 'a;

fn push(out: &mut Vec<Token>, id: i128, limit: Token) -> Result<(), Refused> {
    if id < 0 || id > i128::from(limit) {
        return Err(Refused::Id(id));
    }
    append(out, id as Token)
}

fn append(out: &mut Vec<Token>, token: Token) -> Result<(), Refused> {
    if out.len() == out.capacity() && out.try_reserve(1).is_err() {
        return Err(Refused::Memory(size_of_val(&out[..])));
    }
    out.push(token);
    Ok(())
}

fn bad_id(id: i128, index: usize, vocab_size: Option<u32>) -> String {
    match vocab_size {
        Some(size) => format!("token id {id} at index {index} is outside the vocabulary of {size} tokens"),
        None => format!("token id {id} at index {index} is outside 0..={MAX_TOKEN}"),
    }
}

/// Items that are read before other threads get their turn, and signals their handlers: about a millisecond.
const CHUNK: usize = 1 << 16;

fn read(ids: &Bound<'_, PyAny>, sink: &mut Sink<'_>) -> Result<(), Refused> {
    let py = ids.py();
    let _deferred = defer_shutdown(py);
    if let Ok(array) = ids.cast::<PyUntypedArray>() {
        return read_array(array, sink);
    }
    if let Ok(list) = ids.cast::<PyList>() {
        // it may change while others have their turn
        let mut at = 0;
        while let Some(item) = (at < list.len()).then(|| list.get_item(at)) {
            read_item(&item?, sink)?;
            at += 1;
            take_turns(py, at)?;
        }
        return Ok(());
    }
    if let Ok(tuple) = ids.cast::<PyTuple>() {
        return read_items(tuple.iter().map(Ok), py, sink);
    }
    let text = ids.is_instance_of::<PyString>() || ids.is_instance_of::<PyBytes>();
    if !text && !ids.hasattr("__array__")? && ids.cast::<PySequence>().is_ok() && !has_buffer(ids) {
        // numpy would read ranges and the like without letting anybody else have a turn
        return read_items(ids.try_iter()?, py, sink);
    }
    if ids.hasattr("__array__")? || ids.hasattr("__len__")? {
        let array = py.import("numpy")?.call_method1("asarray", (ids,))?;
        return match array.cast::<PyUntypedArray>() {
            // what numpy takes for a scalar: text, sets, dicts
            Ok(array) if array.ndim() > 0 => read_array(array, sink),
            _ => Err(kind(ids)),
        };
    }
    Err(kind(ids))
}

fn has_buffer(value: &Bound<'_, PyAny>) -> bool {
    PyMemoryView::from(value).is_ok()
}

fn read_items<'py>(
    items: impl Iterator<Item = PyResult<Bound<'py, PyAny>>>,
    py: Python<'py>,
    sink: &mut Sink<'_>,
) -> Result<(), Refused> {
    for (at, item) in (1..).zip(items) {
        read_item(&item?, sink)?;
        take_turns(py, at)?;
    }
    Ok(())
}

/// After every `CHUNK` items, lets other threads and the handlers of signals have their turn.
fn take_turns(py: Python<'_>, items: usize) -> PyResult<()> {
    if items.is_multiple_of(CHUNK) {
        let_others_run(py);
        py.check_signals()?;
    }
    Ok(())
}

fn kind(value: &Bound<'_, PyAny>) -> Refused {
    Refused::Kind(value.get_type().to_string())
}

fn read_item(item: &Bound<'_, PyAny>, sink: &mut Sink<'_>) -> Result<(), Refused> {
    // the usual case, without a call into Python
    if let Ok(integer) = item.cast_exact::<PyInt>()
        && let Ok(id) = integer.extract::<i64>()
    {
        return sink(id.into());
    }
    // a mask is not a list of tokens
    if item.is_instance_of::<PyBool>() {
        return Err(kind(item));
    }
    // `__index__` admits numpy's integers and refuses floats
    if !item.hasattr("__index__")? {
        return Err(kind(item));
    }
    // what else goes wrong there, Ctrl-C included, is not ours to explain
    let index = item.call_method0("__index__").map_err(|raised| {
        if raised.is_instance_of::<PyTypeError>(item.py()) { kind(item) } else { Refused::Raised(raised) }
    })?;
    let id = index.extract::<i128>().unwrap_or(i128::MAX);
    sink(id)
}

fn read_integers<T: Element + Copy>(
    array: &Bound<'_, PyArray1<T>>,
    act: &mut impl FnMut(T) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let (py, stride) = (array.py(), array.strides().first().copied().unwrap_or(0));
    if array.data().addr() % align_of::<T>() != 0 || stride % align_of::<T>() as isize != 0 {
        // numpy reads at any address, and this crate does not
        let copy = array.call_method0("copy")?;
        return read_integers(copy.cast::<PyArray1<T>>().map_err(PyErr::from)?, act);
    }
    let changed = || Refused::Kind("an array that is being written to".into());
    let count = array.len();
    for start in (0..count).step_by(CHUNK) {
        // looked at anew after every turn of others
        let array = array.try_readonly().map_err(|_| changed())?;
        let view = array.as_array();
        if view.len() != count {
            return Err(changed());
        }
        let end = count.min(start + CHUNK);
        view.slice(s![start..end]).iter().try_for_each(|&id| act(id))?;
        take_turns(py, end)?;
    }
    Ok(())
}

fn read_array(array: &Bound<'_, PyUntypedArray>, sink: &mut Sink<'_>) -> Result<(), Refused> {
    if array.ndim() != 1 {
        return Err(Refused::Kind(format!("an array with {} dimensions", array.ndim())));
    }
    if array.is_empty() {
        return Ok(());
    }
    macro_rules! read_as {
        ($($kind:ty),*) => {$(
            if let Ok(array) = array.cast::<PyArray1<$kind>>() {
                return read_integers(array, &mut |id: $kind| sink(i128::from(id)));
            }
        )*};
    }
    read_as!(i64, i32, u32, u64, i16, u16, i8, u8);
    let dtype = array.dtype();
    match dtype.kind() {
        // another byte order, or integers of a width that has its own name
        b'i' | b'u' if dtype.itemsize() <= 8 => {
            let native = PyString::new(array.py(), if dtype.kind() == b'i' { "int64" } else { "uint64" });
            match array.call_method1("astype", (native,))?.cast::<PyUntypedArray>() {
                Ok(native) if native.dtype().is_native_byteorder() == Some(true) => read_array(native, sink),
                _ => Err(Refused::Kind(format!("an array of {dtype}"))),
            }
        }
        b'O' => read_items(array.try_iter()?, array.py(), sink),
        _ => Err(Refused::Kind(format!("an array of {dtype}"))),
    }
}
