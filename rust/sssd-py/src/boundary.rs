//! The border between Python and the core: arguments that are numbers, errors of the engine, the GIL, panics, forks.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use sssd_core::{MAX_NODES, MemoryFull};
use sssd_engine::{RequestError, gate};

use crate::errors::error;
use crate::shutdown;

/// The exception for what is wrong with a request.
pub fn request_error(py: Python<'_>, failure: &RequestError) -> PyErr {
    match failure {
        RequestError::Closed => error(py, "ClosedError", failure.to_string()),
        RequestError::Failed(_) => error(py, "InternalError", failure.to_string()),
        RequestError::Memory(full) => memory_full(py, full),
    }
}

pub fn memory_full(py: Python<'_>, full: &MemoryFull) -> PyErr {
    error(py, "MemoryLimitError", full.to_string())
}

/// A node budget.
pub fn node_budget(py: Python<'_>, name: &str, nodes: i128) -> PyResult<usize> {
    usize::try_from(nodes).ok().filter(|&nodes| nodes <= MAX_NODES).ok_or_else(|| {
        let message = format!("{name} must be between 0 and {MAX_NODES}, got {nodes}");
        error(py, "InvalidArgumentError", message)
    })
}

/// A number that says how many.
pub fn not_negative(py: Python<'_>, name: &str, value: i128) -> PyResult<usize> {
    usize::try_from(value)
        .map_err(|_| error(py, "InvalidArgumentError", format!("{name} must not be negative, got {value}")))
}

/// A probability.
pub fn probability(py: Python<'_>, name: &str, value: f32) -> PyResult<f32> {
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    Err(error(py, "InvalidArgumentError", format!("{name} must be between 0 and 1, got {value}")))
}

/// Runs `work` on a drafter: as `enter`, and not while the process forks.
pub fn call<T: Send>(py: Python<'_>, detach: bool, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    if !detach && let Some(_pass) = gate::try_enter() {
        return enter(py, false, work);
    }
    enter(py, true, || {
        let _pass = gate::enter();
        work()
    })
}

/// From the first drafter on, forks wait for calls in other threads.
pub fn watch_forks(py: Python<'_>) -> PyResult<()> {
    static WATCHED: PyOnceLock<()> = PyOnceLock::new();
    WATCHED.get_or_try_init(py, || {
        let hooks = PyDict::new(py);
        hooks.set_item("before", wrap_pyfunction!(before_fork, py)?)?;
        hooks.set_item("after_in_parent", wrap_pyfunction!(after_fork, py)?)?;
        hooks.set_item("after_in_child", wrap_pyfunction!(after_fork_in_child, py)?)?;
        let os = py.import("os")?;
        // not on Windows
        if os.hasattr("register_at_fork")? {
            os.call_method("register_at_fork", (), Some(&hooks))?;
        }
        Ok::<(), PyErr>(())
    })?;
    Ok(())
}

#[pyfunction]
fn before_fork(py: Python<'_>) {
    py.detach(gate::close);
}

#[pyfunction]
fn after_fork() {
    gate::open();
}

#[pyfunction]
fn after_fork_in_child() {
    gate::open_in_child();
    shutdown::reset_in_child();
}

/// Runs `work`, without the GIL if `detach`. A panic becomes `InternalError` and poisons what `work` had locked.
pub fn enter<T: Send>(py: Python<'_>, detach: bool, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    let guarded = || catch_unwind(AssertUnwindSafe(work));
    let result = if detach { py.detach(guarded) } else { guarded() };
    result.map_err(|panic| {
        let reason = panic.downcast_ref::<String>().map(String::as_str);
        let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        error(py, "InternalError", format!("internal error, please report it: {reason}"))
    })
}
