//! Work without the GIL, and the end of the interpreter while such work is under way.
//!
//! Before 3.14 CPython ends a thread that asks for the GIL after the interpreter's end, by unwinding its stack; that
//! aborts the process when there are frames of Rust on it. Such threads are held here instead, as 3.14 holds them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// The thread that ends the interpreter, once it does.
static ENDING: OnceLock<ThreadId> = OnceLock::new();
/// Threads that are about to get the GIL back, or could lose it for a moment.
static RETURNING: AtomicUsize = AtomicUsize::new(0);

/// The interpreter ends after this time, whoever waits for the GIL.
const PATIENCE: Duration = Duration::from_secs(10);
const NAP: Duration = Duration::from_micros(50);

/// Runs `work` without the GIL.
pub fn detach<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    static WATCHED: PyOnceLock<()> = PyOnceLock::new();
    // without the hook there is only CPython's own way to end
    let _ = WATCHED.get_or_try_init(py, || {
        let hook = wrap_pyfunction!(before_end, py)?;
        py.import("atexit")?.call_method1("register", (hook,)).map(drop)
    });
    let result = py.detach(|| {
        let result = work();
        announce();
        result
    });
    RETURNING.fetch_sub(1, Ordering::SeqCst);
    result
}

/// Runs `work` with the GIL, in a thread that has left it.
pub fn attach<T>(work: impl FnOnce(Python<'_>) -> T) -> T {
    announce();
    Python::attach(|py| {
        RETURNING.fetch_sub(1, Ordering::SeqCst);
        work(py)
    })
}

/// While it lives, the interpreter does not end: for calls to numpy and Python, which may let go of the GIL.
#[must_use]
pub struct Stay(());

/// Does not return if it is too late.
pub fn stay(py: Python<'_>) -> Stay {
    if !announced() {
        py.detach(hold);
    }
    Stay(())
}

impl Drop for Stay {
    fn drop(&mut self) {
        RETURNING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Says that this thread wants the GIL back; does not return if it is too late for that.
fn announce() {
    if !announced() {
        hold();
    }
}

fn announced() -> bool {
    RETURNING.fetch_add(1, Ordering::SeqCst);
    let late = ENDING.get().is_some_and(|&ending| ending != thread::current().id());
    if late {
        RETURNING.fetch_sub(1, Ordering::SeqCst);
    }
    !late
}

fn hold() {
    loop {
        thread::park();
    }
}

/// When the interpreter is about to end: lets those have the GIL who wait for it, and holds all others from now on.
#[pyfunction]
fn before_end(py: Python<'_>) {
    let _ = ENDING.set(thread::current().id());
    py.detach(|| {
        let start = Instant::now();
        while RETURNING.load(Ordering::SeqCst) > 0 && start.elapsed() < PATIENCE {
            thread::sleep(NAP);
        }
    });
}

/// In a forked child: nobody else is left.
pub fn alone() {
    RETURNING.store(0, Ordering::SeqCst);
}
