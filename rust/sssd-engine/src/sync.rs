//! What threads share. The model checkers of `tests/` put their own in its place.

pub use std::hint::spin_loop;
pub use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard, atomic, mpsc};
pub use std::thread;

/// Turns that a thread waits awake before it sleeps.
pub const SPINS: usize = 2000;
