//! `fork()` waits until no call is under way, so that the child finds every lock open and every structure whole.
//!
//! Whoever works takes a [`Pass`]; the hooks that run around a fork close the gate and open it again. Threads do
//! not survive in the child: [`generation`] tells those who had some.

use std::time::{Duration, Instant};

use crate::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use crate::sync::thread;

static ACTIVE: AtomicUsize = AtomicUsize::new(0);
static CLOSED: AtomicUsize = AtomicUsize::new(0);
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// A fork goes ahead after this time, whatever is under way.
const PATIENCE: Duration = Duration::from_secs(10);
const NAP: Duration = Duration::from_micros(50);

/// Permission to work. Passes do not nest.
#[must_use]
pub struct Pass(());

/// Waits while a fork is under way.
pub fn enter() -> Pass {
    loop {
        if let Some(pass) = try_enter() {
            return pass;
        }
        thread::sleep(NAP);
    }
}

/// Nothing while a fork is under way.
pub fn try_enter() -> Option<Pass> {
    ACTIVE.fetch_add(1, Ordering::SeqCst);
    if CLOSED.load(Ordering::SeqCst) == 0 {
        return Some(Pass(()));
    }
    ACTIVE.fetch_sub(1, Ordering::SeqCst);
    None
}

impl Drop for Pass {
    fn drop(&mut self) {
        ACTIVE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Before a fork: lets nobody in and waits for those inside.
pub fn close() {
    CLOSED.fetch_add(1, Ordering::SeqCst);
    let start = Instant::now();
    while ACTIVE.load(Ordering::SeqCst) > 0 && start.elapsed() < PATIENCE {
        thread::sleep(NAP);
    }
}

/// After a fork, in the parent.
pub fn open() {
    CLOSED.fetch_sub(1, Ordering::SeqCst);
}

/// After a fork, in the child: nobody else is left.
pub fn open_in_child() {
    ACTIVE.store(0, Ordering::SeqCst);
    GENERATION.fetch_add(1, Ordering::SeqCst);
    CLOSED.store(0, Ordering::SeqCst);
}

/// Changes in a forked child.
pub fn generation() -> u32 {
    GENERATION.load(Ordering::SeqCst)
}
