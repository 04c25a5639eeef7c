//! `sssd.hardware.PassCosts`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use sssd_engine::{Allocation, CostError, Layout, PassCosts, Sizing};

use crate::errors::error;
use crate::shutdown::defer_shutdown;
use crate::tokens::integers;
use crate::tree::PyDraftTree;

/// Seconds of a verify pass by its size, for one batch size and context length; sizes draft trees by them.
///
/// Args:
///     sizes: numbers of nodes that the verifier has ready, rising from 0 (a pass without drafts): nodes of each
///         row, to which all rows are padded, or of the whole pass where it is packed.
///     seconds: time of a pass of each size, not falling.
///     packed: whether rows lie end to end, so that sizes count the nodes of all rows together.
///
/// Raises:
///     InvalidArgumentError: the numbers are no such sizes or times.
#[pyclass(frozen, name = "PassCosts", module = "sssd.hardware")]
pub struct PyPassCosts(Arc<PassCosts>);

#[pymethods]
impl PyPassCosts {
    #[new]
    #[pyo3(signature = (sizes, seconds, *, packed=false))]
    fn new(py: Python<'_>, sizes: &Bound<'_, PyAny>, seconds: Vec<f64>, packed: bool) -> PyResult<Self> {
        let sizes: Result<Vec<usize>, _> =
            integers(sizes, "sizes")?.into_iter().map(usize::try_from).collect();
        let sizes = sizes.map_err(|_| error(py, "InvalidArgumentError", "sizes must not be negative"))?;
        let layout = if packed { Layout::Packed } else { Layout::Padded };
        let costs = PassCosts::new(sizes, seconds, layout).map_err(|reason| invalid(py, &reason))?;
        Ok(Self(Arc::new(costs)))
    }

    /// The number of nodes to verify of each tree; its first nodes are the ones to take.
    ///
    /// Maximises the expected number of accepted tokens minus ``rate`` times the seconds that the pass takes beyond
    /// one without drafts: nodes of all trees compete, the most probable first, and where none pays for itself the
    /// answer is 0 for all.
    ///
    /// Args:
    ///     trees: the draft of each row, None for none.
    ///     rate: what a second is worth, in tokens; see ``Budget``.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``rate`` is negative or not finite.
    fn allocate(
        &self,
        py: Python<'_>,
        trees: Vec<Option<PyRef<'_, PyDraftTree>>>,
        rate: f64,
    ) -> PyResult<Vec<usize>> {
        let sizing = Sizing::new(Arc::clone(&self.0), Some(rate), trees.len());
        let mut allocation = Allocation::default();
        for tree in &trees {
            allocation.push(tree.as_ref().map_or(&[], |tree| &tree.0.probs));
        }
        Ok(sizing.map_err(|reason| invalid(py, &reason))?.allocate(&mut allocation).to_vec())
    }

    fn __repr__(&self) -> String {
        "PassCosts()".into()
    }
}

fn invalid(py: Python<'_>, reason: &CostError) -> PyErr {
    error(py, "InvalidArgumentError", reason.to_string())
}

/// How trees are to be sized: by given costs, or by what a given `CostCurve` says of this batch.
///
/// `context` is the mean length of the requests, `max_nodes` the most nodes of one of them.
pub fn read_sizing(
    py: Python<'_>,
    cost: Option<&Bound<'_, PyAny>>,
    rate: Option<f64>,
    batch: usize,
    context: impl FnOnce() -> f64,
    max_nodes: usize,
) -> PyResult<Option<Sizing>> {
    let Some(cost) = cost else {
        return match rate {
            Some(_) => Err(error(py, "InvalidArgumentError", "rate needs cost")),
            None => Ok(None),
        };
    };
    let costs = match cost.cast::<PyPassCosts>() {
        Ok(costs) => costs.clone(),
        Err(_) => read_curve(cost, batch, context(), max_nodes)?,
    };
    let sizing = Sizing::new(Arc::clone(&costs.get().0), rate, batch);
    sizing.map(Some).map_err(|reason| invalid(py, &reason))
}

/// What a `CostCurve` says of a batch.
fn read_curve<'py>(
    cost: &Bound<'py, PyAny>,
    batch: usize,
    context: f64,
    max_nodes: usize,
) -> PyResult<Bound<'py, PyPassCosts>> {
    let py = cost.py();
    let _deferred = defer_shutdown(py);
    static CURVE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if !cost.is_instance(CURVE.import(py, "sssd.hardware.curve", "CostCurve")?)? {
        let message = format!("cost must be PassCosts or a CostCurve, got {}", cost.get_type());
        return Err(error(py, "InvalidArgumentError", message));
    }
    let costs = cost.call_method1("costs", (batch.max(1), context, max_nodes + 1))?;
    Ok(costs.cast_into::<PyPassCosts>()?)
}
