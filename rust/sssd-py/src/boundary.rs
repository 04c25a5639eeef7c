//! The border between Python and the core: arguments that are numbers, errors of the engine, the GIL, panics, forks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString};
use sssd_core::{MAX_NODES, MemoryFull, Sequence, room_for_a_thread};
use sssd_engine::{Interrupted, Request, RequestError, gate, panic_reason};
use sssd_store::Progress;

use crate::errors::error;
use crate::shutdown;

/// The exception for what is wrong with a request.
pub fn request_error(py: Python<'_>, failure: &RequestError) -> PyErr {
    match failure {
        RequestError::Closed => error(py, "ClosedError", failure.to_string()),
        RequestError::Failed(_) => error(py, "InternalError", failure.to_string()),
        RequestError::Memory(full) => memory_full(py, full),
        // whoever interrupts raises what is to be raised
        RequestError::Interrupted => PyKeyboardInterrupt::new_err(failure.to_string()),
    }
}

pub fn memory_full(py: Python<'_>, full: &MemoryFull) -> PyErr {
    error(py, "MemoryLimitError", full.to_string())
}

/// An argument that is an integer. What is too large for any is shown as the largest there is.
pub fn int(value: &Bound<'_, PyAny>) -> PyResult<i128> {
    match value.extract::<i128>() {
        Err(raised) if raised.is_instance_of::<PyOverflowError>(value.py()) => {
            Ok(if value.lt(0)? { i128::MIN } else { i128::MAX })
        }
        extracted => extracted,
    }
}

pub fn optional_int(value: &Bound<'_, PyAny>) -> PyResult<Option<i128>> {
    if value.is_none() { Ok(None) } else { int(value).map(Some) }
}

/// An argument that is a number of bytes: an integer, or text such as ``"512M"``.
pub fn bytes(value: &Bound<'_, PyAny>) -> PyResult<i128> {
    let Ok(text) = value.cast::<PyString>() else { return int(value) };
    let text = name(text)?;
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_uppercase();
    let power = match unit.trim_end_matches('B').trim_end_matches('I') {
        "" if unit.is_empty() || unit == "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => -1,
    };
    match digits.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && power >= 0 => Ok((number * f64::powi(2.0, power)) as i128),
        _ => {
            let message = format!(
                "a number of bytes is an integer or text such as \"512M\" or \"1.5 GiB\" (K, M, G, T: powers of \
                 1024), got {text:?}"
            );
            Err(error(value.py(), "InvalidArgumentError", message))
        }
    }
}

pub fn optional_bytes(value: &Bound<'_, PyAny>) -> PyResult<Option<i128>> {
    if value.is_none() { Ok(None) } else { bytes(value).map(Some) }
}

/// An argument that is a name.
pub fn name(value: &Bound<'_, PyAny>) -> PyResult<String> {
    let py = value.py();
    let text = value
        .cast::<PyString>()
        .map_err(|_| PyTypeError::new_err(format!("a name must be a str, got {}", value.get_type())))?;
    text.to_str().map(str::to_owned).map_err(|_| {
        error(py, "InvalidArgumentError", "text has surrogates, which no encoding writes; replace them")
    })
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

/// Whether drafts of this shape are chains.
pub fn is_chain(py: Python<'_>, shape: &str) -> PyResult<bool> {
    match shape {
        "tree" => Ok(false),
        "chain" => Ok(true),
        _ => {
            let message = format!("shape must be \"tree\" or \"chain\", got {shape:?}");
            Err(error(py, "InvalidArgumentError", message))
        }
    }
}

/// A probability.
pub fn probability(py: Python<'_>, name: &str, value: f32) -> PyResult<f32> {
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    Err(error(py, "InvalidArgumentError", format!("{name} must be between 0 and 1, got {value}")))
}

/// Work on more tokens than this takes so long that signals are to be heeded meanwhile.
pub const LONG: usize = 1 << 15;
/// How often they are looked for, and how long what a signal has ended may take to end.
const TICK: Duration = Duration::from_millis(20);
const GRACE: Duration = Duration::from_millis(100);

/// Runs long work on a drafter, in a thread of its own: this one lets Python's handlers of signals run, which may call
/// the drafter. If one raises, the work is told and left to end by itself.
pub fn call_long<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce(Interrupted) -> T + Send + 'static,
) -> PyResult<T> {
    call_cancelled(py, Arc::default(), work)
}

/// The same, with the flag that tells the work.
pub fn call_cancelled<T: Send + 'static>(
    py: Python<'_>,
    cancelled: Arc<AtomicBool>,
    work: impl FnOnce(Interrupted) -> T + Send + 'static,
) -> PyResult<T> {
    let flag = Arc::clone(&cancelled);
    let running = Running::start(py, move || {
        let _pass = gate::enter();
        work(&|| flag.load(Ordering::Relaxed))
    });
    heed_signals(py, running, GRACE, || cancelled.store(true, Ordering::Relaxed))
}

/// Waits for work while Python's handlers of signals run. If one raises, the work is told by `cancel`, and left to end by
/// itself after `grace`.
pub fn heed_signals<T: Send + 'static>(
    py: Python<'_>,
    mut running: Running<T>,
    grace: Duration,
    cancel: impl Fn(),
) -> PyResult<T> {
    let mut ended: Option<(PyErr, Instant)> = None;
    loop {
        match (running.wait(py)?, ended) {
            (Some(_), Some((signal, _))) => return Err(signal),
            (Some(done), None) => return Ok(done),
            (None, Some((signal, since))) if since.elapsed() > grace => return Err(signal),
            (None, Some(waiting)) => ended = Some(waiting),
            (None, None) => {
                ended = py.check_signals().err().map(|signal| (signal, Instant::now()));
                if ended.is_some() {
                    cancel();
                }
            }
        }
    }
}

/// Runs `work` without the GIL. If it is long, on another thread, so that this one can heed Ctrl-C, upon which it cancels
/// `watch`; a signal's handler may use the same objects.
pub fn watched<T: Send + 'static>(
    py: Python<'_>,
    long: bool,
    watch: &Progress,
    work: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    if !long {
        return enter(py, true, work);
    }
    watch.renew();
    // it ends at the next occasion, and the next call would wait for it
    heed_signals(py, Running::start(py, work), Duration::MAX, || watch.cancel())
}

/// Work on another thread, and where its result comes to.
pub struct Running<T>(Receiver<thread::Result<T>>);

impl<T: Send + 'static> Running<T> {
    /// Where no thread is to be had, the work is done when this returns.
    pub fn start(py: Python<'_>, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, receiver) = sync_channel(1);
        // a thread that does not start would take the work with it
        let work = Arc::new(Mutex::new(Some(move || {
            let done = catch_unwind(AssertUnwindSafe(work));
            let _ = sender.send(done); // nobody may listen after Ctrl-C
        })));
        let theirs = Arc::clone(&work);
        let thread = thread::Builder::new().name("sssd-call".into());
        if !room_for_a_thread() || thread.spawn(move || run(&theirs)).is_err() {
            py.detach(|| run(&work));
        }
        Self(receiver)
    }

    /// Waits a moment for it.
    pub fn wait(&mut self, py: Python<'_>) -> PyResult<Option<T>> {
        let receiver = &mut self.0;
        match py.detach(move || receiver.recv_timeout(TICK)) {
            Ok(done) => done.map(Some).map_err(|panic| panicked(py, &*panic)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(error(py, "InternalError", "the work stopped without a result; please report it"))
            }
        }
    }
}

fn run(work: &Mutex<Option<impl FnOnce()>>) {
    let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(work) = work {
        work();
    }
}

/// Lets go of the GIL for long enough that who waits for it wakes up: a thread that takes it back at once can keep it for
/// ever.
pub fn let_others_run(py: Python<'_>) {
    py.detach(|| thread::sleep(Duration::from_micros(50)));
}

/// Waits until no other call has the request, as long as no signal ends the wait.
pub fn wait_for(py: Python<'_>, request: &Arc<Request>) -> PyResult<()> {
    if request.is_taken() {
        let request = Arc::clone(request);
        call_long(py, move |interrupted| request.wait(interrupted))?;
    }
    Ok(())
}

/// Runs `work` on the sequence of a request, without the GIL if `detach` or if there is anything to be done first.
pub fn with_request<T: Send>(
    py: Python<'_>,
    request: &Arc<Request>,
    detach: bool,
    work: impl FnOnce(&mut Sequence) -> T + Send,
) -> PyResult<Result<T, RequestError>> {
    match call(py, detach, || request.try_with(work))? {
        Ok(result) => Ok(result),
        Err(work) => {
            let theirs = Arc::clone(request);
            match call_long(py, move |interrupted| theirs.complete(interrupted))? {
                Ok(()) => call(py, true, || request.with(work)),
                Err(failure) => Ok(Err(failure)),
            }
        }
    }
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
    result.map_err(|panic| panicked(py, &*panic))
}

fn panicked(py: Python<'_>, panic: &(dyn Any + Send)) -> PyErr {
    if let Some(full) = panic.downcast_ref::<MemoryFull>() {
        return memory_full(py, full);
    }
    let reason = panic_reason(panic);
    error(py, "InternalError", format!("internal error, please report it: {reason}"))
}
