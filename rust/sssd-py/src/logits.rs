//! `sssd._core.top_k`.

use numpy::ndarray::Axis;
use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;
use sssd_core::TOP_K;

use crate::boundary::{call, int};
use crate::errors::error;
use crate::shutdown::defer_shutdown;

/// Fewer logits than this are read before another thread could have taken the GIL.
const DETACH_FROM: usize = 1 << 16;

/// Ids and probabilities.
type Top<'py> = (Bound<'py, PyArrayDyn<i64>>, Bound<'py, PyArrayDyn<f32>>);

/// The most probable tokens under logits, and their probabilities, in one pass. The GIL is released.
///
/// Args:
///     logits: float32 [..., vocabulary], of which the last axis is contiguous.
///     k: tokens wanted, at most 8; no more than the vocabulary has are given.
///
/// Returns:
///     ids int64 [..., k], the most probable first, the first of equals first; probs float32 [..., k], which sum to at
///     most 1. Where logits are no distribution (NaN, infinite) probs are 0, and the first NaN comes first.
///
/// Raises:
///     InvalidArgumentError: logits of another type or layout, no vocabulary, or ``k`` is not in 1 to 8.
#[pyfunction]
pub fn top_k<'py>(logits: &Bound<'py, PyAny>, #[pyo3(from_py_with = int)] k: i128) -> PyResult<Top<'py>> {
    let py = logits.py();
    let refuse = |message: String| error(py, "InvalidArgumentError", message);
    let k = usize::try_from(k).ok().filter(|k| (1..=TOP_K).contains(k));
    let k = k.ok_or_else(|| refuse(format!("k must be between 1 and {TOP_K}")))?;
    let kind = || refuse("logits must be a float32 array [..., vocabulary]".into());
    let array = logits.cast::<PyArrayDyn<f32>>().map_err(|_| kind())?;
    let Some((&vocabulary, outer)) = array.shape().split_last() else { return Err(kind()) };
    if vocabulary == 0 {
        return Err(refuse("the vocabulary of logits is empty".into()));
    }
    let k = k.min(vocabulary);
    let mut shape = outer.to_vec();
    shape.push(k);
    let deferred = defer_shutdown(py);
    let ids = PyArrayDyn::<i64>::zeros(py, shape.clone(), false);
    let probs = PyArrayDyn::<f32>::zeros(py, shape, false);
    drop(deferred);
    {
        let logits = array.try_readonly().map_err(|_| refuse("logits are being written to".into()))?;
        let logits = logits.as_array();
        if vocabulary > 1 && logits.strides().last() != Some(&1) {
            return Err(refuse("the last axis of logits must be contiguous".into()));
        }
        let (mut ids, mut probs) = (ids.readwrite(), probs.readwrite());
        let (ids, probs) = (ids.as_slice_mut()?, probs.as_slice_mut()?);
        call(py, logits.len() > DETACH_FROM, || {
            let rows = logits.lanes(Axis(logits.ndim() - 1));
            for (row, (ids, probs)) in rows.into_iter().zip(ids.chunks_mut(k).zip(probs.chunks_mut(k))) {
                // a single token has any stride
                match row.to_slice() {
                    Some(row) => sssd_core::top_k(row, ids, probs),
                    None => sssd_core::top_k(&row.to_vec(), ids, probs),
                }
            }
        })?;
    }
    Ok((ids, probs))
}
