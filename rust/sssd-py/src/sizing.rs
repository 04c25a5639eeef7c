//! `sssd.hardware`'s part of the core: costs of passes, the grid of a curve, and the rule.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};
use sssd_engine::{
    Allocation, CostCurve, CostError, DraftCost, Layout, Pace, PassCosts, RuleOptions, Sizing, SizingRule,
    StepTimes,
};

use crate::boundary::{int, not_negative};
use crate::errors::error;
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

impl PyPassCosts {
    pub fn is_packed(&self) -> bool {
        self.0.layout() == Layout::Packed
    }
}

#[pymethods]
impl PyPassCosts {
    #[new]
    #[pyo3(signature = (sizes, seconds, *, packed=false))]
    fn new(py: Python<'_>, sizes: &Bound<'_, PyAny>, seconds: Vec<f64>, packed: bool) -> PyResult<Self> {
        let sizes: Result<Vec<usize>, _> =
            integers(sizes, "sizes")?.into_iter().map(usize::try_from).collect();
        let sizes = sizes.map_err(|_| error(py, "InvalidArgumentError", "sizes must not be negative"))?;
        let costs = PassCosts::new(sizes, seconds, layout(packed)).map_err(|reason| invalid(py, &reason))?;
        Ok(Self(Arc::new(costs)))
    }

    /// The sizes, int64 [n].
    #[getter]
    fn sizes<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        PyArray1::from_iter(py, self.0.sizes().iter().map(|&size| size as i64))
    }

    /// Seconds of a pass of each size, float64 [n].
    #[getter]
    fn seconds<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_slice(py, self.0.seconds())
    }

    /// The number of nodes to verify of each tree; its first nodes are the ones to take.
    ///
    /// Maximises the expected number of accepted tokens minus ``rate`` times the seconds that the pass takes beyond
    /// one without drafts: nodes of all trees compete, the most probable first, and where none pays for itself the
    /// answer is 0 for all.
    ///
    /// Args:
    ///     trees: the draft of each row, None for none.
    ///     rate: what a second is worth, in tokens; see ``SizingRule``.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``rate`` is negative or not finite.
    fn allocate(&self, py: Python<'_>, trees: Trees<'_>, rate: f64) -> PyResult<Vec<usize>> {
        let sizing = Sizing::Costs(Arc::clone(&self.0), Some(rate)).checked();
        let mut trees = allocation(&trees);
        Ok(sizing.map_err(|reason| invalid(py, &reason))?.allocate(0.0, &mut trees, &mut []).to_vec())
    }

    fn __repr__(&self) -> String {
        format!(
            "PassCosts({} sizes up to {} nodes)",
            self.0.sizes().len(),
            self.0.sizes().last().unwrap_or(&0)
        )
    }
}

type Trees<'py> = Vec<Option<PyRef<'py, PyDraftTree>>>;

fn allocation(trees: &Trees<'_>) -> Allocation {
    let mut allocation = Allocation::default();
    for tree in trees {
        allocation.push(tree.as_ref().map_or(&[], |tree| &tree.0.probs));
    }
    allocation
}

fn layout(packed: bool) -> Layout {
    if packed { Layout::Packed } else { Layout::Padded }
}

fn invalid(py: Python<'_>, reason: &CostError) -> PyErr {
    error(py, "InvalidArgumentError", reason.to_string())
}

/// The numbers of a ``CostCurve``: T(batch, width, context) on a grid, linear in between. Beyond it the last slope goes
/// on; before it the first value stands.
///
/// Args:
///     batches: float64 [B], rising from at least 1.
///     tokens: float64 [W], rising from 1.
///     contexts: float64 [C], rising from at least 0.
///     seconds: float64 [B * W * C] in this order, rising along each axis.
///     packed: whether ``tokens`` are those of the whole pass.
///     ready: widths to choose from, rising from 1; all if empty.
///     draft: seconds of drafting per step, per request and per node, and the threads that draft.
///
/// Raises:
///     CostCurveError: the numbers are no such curve.
#[pyclass(frozen, name = "CostGrid", module = "sssd.hardware")]
pub struct PyCostGrid(Arc<CostCurve>);

#[pymethods]
impl PyCostGrid {
    #[new]
    #[pyo3(signature = (batches, tokens, contexts, seconds, *, packed, ready, draft))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        batches: Vec<f64>,
        tokens: Vec<f64>,
        contexts: Vec<f64>,
        seconds: Vec<f64>,
        packed: bool,
        ready: Vec<usize>,
        draft: (f64, f64, f64, usize),
    ) -> PyResult<Self> {
        let (step, request, node, threads) = draft;
        let draft = DraftCost { step, request, node, threads };
        CostCurve::new([batches, tokens, contexts], seconds, layout(packed), ready, draft)
            .map(|curve| Self(Arc::new(curve)))
            .map_err(|reason| error(py, "CostCurveError", reason.to_string()))
    }

    /// Seconds of a pass over ``width`` tokens of each of ``batch`` requests, ``context`` tokens long on average.
    fn time(&self, batch: f64, width: f64, context: f64) -> f64 {
        self.0.time(batch, width, context)
    }

    /// Seconds of passes of these sizes, float64 [n].
    fn times<'py>(
        &self,
        py: Python<'py>,
        batch: usize,
        sizes: Vec<f64>,
        context: f64,
    ) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_iter(py, sizes.into_iter().map(|size| self.0.size_time(batch, size, context)))
    }

    /// The widths to choose from, up to ``max_width``.
    fn widths(&self, max_width: usize) -> Vec<usize> {
        self.0.widths(max_width)
    }

    /// Numbers of nodes to choose from: of each row, or of the whole pass where it is packed.
    fn sizes(&self, batch: usize, max_width: usize) -> Vec<usize> {
        self.0.sizes(batch, max_width)
    }

    /// The part of the curve that one step chooses from, kept for contexts within a few percent.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``batch`` or ``max_width`` is less than 1, or ``context`` is no number of tokens.
    fn costs(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = int)] batch: i128,
        context: f64,
        max_width: i128,
    ) -> PyResult<PyPassCosts> {
        let (batch, max_width) =
            (at_least_one(py, "batch", batch)?, at_least_one(py, "max_width", max_width)?);
        check_context(py, context)?;
        Ok(PyPassCosts(self.0.costs(batch, context, max_width)))
    }

    fn __repr__(&self) -> String {
        "CostGrid()".into()
    }
}

fn at_least_one(py: Python<'_>, name: &str, value: i128) -> PyResult<usize> {
    match usize::try_from(value) {
        Ok(value) if value > 0 => Ok(value),
        _ => Err(error(py, "InvalidArgumentError", format!("{name} must be at least 1, got {value}"))),
    }
}

fn check_context(py: Python<'_>, context: f64) -> PyResult<()> {
    if context.is_finite() && context >= 0.0 {
        return Ok(());
    }
    Err(error(py, "InvalidArgumentError", format!("context must be a number of tokens, got {context}")))
}

/// What a ``SizingRule`` remembers of one request whose trees are drafted elsewhere. Made by ``SizingRule.pace``.
#[pyclass(frozen, name = "Pace", module = "sssd.hardware")]
pub struct PyPace(Mutex<Pace>);

impl PyPace {
    fn lock(&self) -> MutexGuard<'_, Pace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PyPace {
    fn __repr__(&self) -> String {
        let Pace { limit, wait, .. } = *self.lock();
        format!("Pace(limit={limit}, wait={wait})")
    }
}

/// Sizes the drafts of batches by a cost curve, and corrects the curve by the times of steps.
///
/// At each step::
///
///     batch = drafter.step(sequences, token_ids, offsets, rule=rule)
///     ...                  # verify the trees
///     rule.observe(batch=len(batch), size=..., context=batch.context, seconds=..., tokens=...)
///
/// Nodes of all trees compete, the most probable first. What maximises tokens per second over many steps is to maximise,
/// in each, *expected tokens - rate * seconds*, with the rate at which tokens come at large. The rate is learned, and
/// at least that of decoding without drafts. When times show that the whole machine has become slower or faster, those
/// before are forgotten and some steps without drafts are asked for.
///
/// Three things keep speculation from costing more than it brings: the rate never falls below plain decoding's;
/// measured times count only relative to one another and within bounds, kept monotone in the width; and when tokens
/// that drafts brought, minus those that plain decoding would have made in the extra time, sink below a bound,
/// drafting pauses, longer every time.
///
/// One rule serves any number of requests, batches and threads.
///
/// Args:
///     curve: T(batch, width, context), a ``CostCurve``.
///     max_nodes: most nodes to verify of one request, 0 to 1023; by default 256, or what the widest pass that is ready
///         has room for.
///     options: constants to change, by name, to measure what they are worth; see ``options``.
///
/// Raises:
///     InvalidArgumentError: ``curve`` is none, ``max_nodes`` is out of range, or an option is unknown or out of range.
#[pyclass(frozen, name = "SizingRule", module = "sssd.hardware")]
pub struct PySizingRule {
    rule: Arc<SizingRule>,
    curve: Py<PyAny>,
}

#[pymethods]
impl PySizingRule {
    #[new]
    #[pyo3(signature = (curve, *, max_nodes=None, options=None))]
    fn new(
        curve: &Bound<'_, PyAny>,
        max_nodes: Option<&Bound<'_, PyAny>>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let py = curve.py();
        let refuse = |message: String| error(py, "InvalidArgumentError", message);
        let Some(grid) = grid(curve) else {
            return Err(refuse(format!("curve must be a CostCurve, got {}", curve.get_type())));
        };
        let max_nodes = match max_nodes {
            None => None,
            Some(given) => match given.extract::<usize>() {
                Ok(nodes) if nodes < 1024 && !given.is_instance_of::<PyBool>() => Some(nodes),
                _ => return Err(refuse(format!("max_nodes must be an integer in 0..1023, not {given}"))),
            },
        };
        let mut constants = RuleOptions::default();
        for (name, value) in options.into_iter().flatten() {
            let (name, value) = (name.extract::<String>()?, value.extract::<f64>()?);
            if !constants.set(&name, value) {
                return Err(refuse(format!("there is no option {name} of value {value}")));
            }
        }
        let rule = Arc::new(SizingRule::new(grid, max_nodes, constants));
        Ok(Self { rule, curve: curve.clone().unbind() })
    }

    /// The constants by name: ``(default, unit and effect)``. What each is worth is in
    /// ``benches/results/rule-constants.md``.
    #[staticmethod]
    fn options(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let options = PyDict::new(py);
        for (name, value, effect) in RuleOptions::default().list() {
            options.set_item(name, (value, effect.trim()))?;
        }
        Ok(options)
    }

    /// The curve that it was made with.
    #[getter]
    fn curve(&self, py: Python<'_>) -> Py<PyAny> {
        self.curve.clone_ref(py)
    }

    /// Most nodes to verify of one request.
    #[getter]
    fn max_nodes(&self) -> usize {
        self.rule.max_nodes()
    }

    /// Tokens per second at large, over those of plain decoding.
    #[getter]
    fn speedup(&self) -> f64 {
        self.rule.speedup()
    }

    /// Least probability of a node worth drafting: somewhat below the least that was verified lately.
    #[getter]
    fn min_prob(&self) -> f64 {
        self.rule.min_prob()
    }

    /// The state of a new request whose trees are drafted elsewhere; sequences of a drafter carry their own.
    fn pace(&self) -> PyPace {
        PyPace(Mutex::new(self.rule.pace()))
    }

    /// Begins a step for trees that are drafted elsewhere: the number of nodes to draft for each request, down to
    /// ``min_prob``; 0 where drafting would not pay. ``Drafter.step`` does it by itself.
    ///
    /// Args:
    ///     paces: the state of each request.
    fn limits(&self, paces: Vec<PyRef<'_, PyPace>>) -> Vec<usize> {
        let drafts = self.rule.begin_step().is_some();
        let limit = |pace: &PyRef<'_, PyPace>| if drafts { self.rule.limit(&mut pace.lock()) } else { 0 };
        paces.iter().map(limit).collect()
    }

    /// The number of nodes to verify of each of the trees drafted elsewhere: its first ones, which are its best.
    ///
    /// Args:
    ///     trees: draft of each request of the step, None for none.
    ///     context: mean length of the requests, tokens.
    ///     paces: their states, which learn from it.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``context`` is no number of tokens, or there is not one state for each tree.
    #[pyo3(signature = (trees, context, paces=None))]
    fn allocate(
        &self,
        py: Python<'_>,
        trees: Trees<'_>,
        context: f64,
        paces: Option<Vec<PyRef<'_, PyPace>>>,
    ) -> PyResult<Vec<usize>> {
        check_context(py, context)?;
        if let Some(paces) = paces.as_ref().filter(|paces| paces.len() != trees.len()) {
            let message = format!("there are {} paces for {} trees", paces.len(), trees.len());
            return Err(error(py, "InvalidArgumentError", message));
        }
        let mut held = vec![None; trees.len()];
        for ((held, pace), tree) in held.iter_mut().zip(paces.iter().flatten()).zip(&trees) {
            *held = tree.as_ref().map(|_| *pace.lock());
        }
        let sizing = Sizing::Rule(Arc::clone(&self.rule));
        let counts = sizing.allocate(context, &mut allocation(&trees), &mut held).to_vec();
        for (held, pace) in held.into_iter().zip(paces.iter().flatten()) {
            if let Some(held) = held {
                *pace.lock() = held;
            }
        }
        Ok(counts)
    }

    /// What the next pass may cost and what a second is worth: ``cost=`` and ``rate=`` of drafting calls.
    ///
    /// Args:
    ///     batch: requests of the step, at least 1.
    ///     context: their mean length, tokens.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``batch`` is less than 1, or ``context`` is no number of tokens.
    fn costs(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = int)] batch: i128,
        context: f64,
    ) -> PyResult<(PyPassCosts, f64)> {
        check_context(py, context)?;
        let batch = at_least_one(py, "batch", batch)?;
        let (costs, rate) = self.rule.costs(batch, context);
        Ok((PyPassCosts(costs), rate))
    }

    /// Learns from a step.
    ///
    /// Args:
    ///     batch: requests of the step.
    ///     size: nodes that the pass had room for: of each row, or of all where rows are packed.
    ///     context: mean length of the requests, tokens.
    ///     seconds: time of the verify pass, or None where it is not known: the step's tokens count then, its time does
    ///         not. Values that are no time are ignored.
    ///     tokens: tokens that the step produced, at least one per request.
    ///     draft_seconds: time of drafting.
    ///     prefill_tokens: prompt tokens that the same pass has read, for requests that are not among the ``batch``: its
    ///         time then tells nothing of drafts, and is not looked at. Where every step reads prompts, the curve is
    ///         gone by as it is.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``batch`` is less than 1, ``size`` or ``prefill_tokens`` negative, or ``context`` no number
    ///         of tokens.
    #[pyo3(signature = (*, batch, size, context, seconds, tokens, draft_seconds=0.0, prefill_tokens=0))]
    #[allow(clippy::too_many_arguments)]
    fn observe(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = int)] batch: i128,
        #[pyo3(from_py_with = int)] size: i128,
        context: f64,
        seconds: Option<f64>,
        tokens: f64,
        draft_seconds: f64,
        #[pyo3(from_py_with = int)] prefill_tokens: i128,
    ) -> PyResult<()> {
        check_context(py, context)?;
        let (batch, size) = (at_least_one(py, "batch", batch)?, not_negative(py, "size", size)?);
        let prefill_tokens = not_negative(py, "prefill_tokens", prefill_tokens)?;
        self.rule.observe(&StepTimes {
            batch,
            size,
            context,
            seconds,
            prefill_tokens,
            tokens,
            draft_seconds,
        });
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("SizingRule(max_nodes={}, speedup={:.2})", self.rule.max_nodes(), self.rule.speedup())
    }
}

/// The grid of a `CostCurve`.
fn grid(curve: &Bound<'_, PyAny>) -> Option<Arc<CostCurve>> {
    let grid = curve.getattr("grid").ok()?;
    Some(Arc::clone(&grid.cast::<PyCostGrid>().ok()?.get().0))
}

/// How trees are to be sized, of at most `max_nodes` each.
pub fn read_sizing<'py>(
    py: Python<'py>,
    cost: Option<&Bound<'py, PyAny>>,
    rate: Option<f64>,
    rule: Option<&Bound<'py, PySizingRule>>,
    max_nodes: usize,
) -> PyResult<Option<Sizing>> {
    let refuse = |message: String| Err(error(py, "InvalidArgumentError", message));
    let sizing = match (cost, rule) {
        (None, None) if rate.is_some() => return refuse("rate needs cost".into()),
        (None, None) => return Ok(None),
        (None, Some(rule)) if rate.is_none() => Sizing::Rule(Arc::clone(&rule.get().rule)),
        (_, Some(_)) => return refuse("give rule, or cost and rate, not both".into()),
        (Some(cost), None) => match (cost.cast::<PyPassCosts>(), grid(cost)) {
            (Ok(costs), _) => Sizing::Costs(Arc::clone(&costs.get().0), rate),
            (_, Some(curve)) => Sizing::Curve(curve, max_nodes, rate),
            _ => return refuse(format!("cost must be PassCosts or a CostCurve, got {}", cost.get_type())),
        },
    };
    sizing.checked().map(Some).map_err(|reason| invalid(py, &reason))
}
