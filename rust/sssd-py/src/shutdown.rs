//! The end of the interpreter while other threads are in calls.
//!
//! Before 3.14 CPython ends a thread that asks for the GIL after the interpreter's end, by unwinding its stack. PyO3
//! lets that happen where work runs detached. In calls to numpy and Python, which may let go of the GIL as well, it
//! would abort the process: the end waits for those, and who comes later is held, as 3.14 holds it.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// The thread that ends the interpreter, once it does.
static ENDS_IN: OnceLock<ThreadId> = OnceLock::new();
/// Threads that the end waits for.
static DEFERRALS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Of this thread: calls to Python may come back.
    static NESTED: Cell<usize> = const { Cell::new(0) };
}

/// The interpreter ends after this time, whatever is under way.
const PATIENCE: Duration = Duration::from_secs(10);
const NAP: Duration = Duration::from_micros(50);

/// While it lives, the interpreter does not end.
#[must_use]
pub struct Deferred(());

/// For calls to numpy and Python. Does not return if the interpreter is ending already.
pub fn defer_shutdown(py: Python<'_>) -> Deferred {
    static WATCHED: PyOnceLock<()> = PyOnceLock::new();
    // without the hook the interpreter ends as it does without this crate
    let _ = WATCHED.get_or_try_init(py, || {
        let hook = wrap_pyfunction!(before_shutdown, py)?;
        py.import("atexit")?.call_method1("register", (hook,)).map(drop)
    });
    let nested = NESTED.get();
    NESTED.set(nested + 1);
    if nested == 0 {
        DEFERRALS.fetch_add(1, Ordering::SeqCst);
    }
    let deferred = Deferred(());
    if nested == 0 && ENDS_IN.get().is_some_and(|&ends| ends != thread::current().id()) {
        drop(deferred);
        loop {
            py.detach(thread::park);
        }
    }
    deferred
}

impl Drop for Deferred {
    fn drop(&mut self) {
        NESTED.set(NESTED.get() - 1);
        if NESTED.get() == 0 {
            DEFERRALS.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[pyfunction]
fn before_shutdown(py: Python<'_>) {
    let _ = ENDS_IN.set(thread::current().id());
    py.detach(|| {
        let start = Instant::now();
        while DEFERRALS.load(Ordering::SeqCst) > 0 && start.elapsed() < PATIENCE {
            thread::sleep(NAP);
        }
    });
}

/// In a forked child nobody else is left.
pub fn reset_in_child() {
    DEFERRALS.store(0, Ordering::SeqCst);
}
