//! What threads share. The model checkers of `tests/` put their own in its place.

pub use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard, TryLockError, atomic, mpsc,
};
pub use std::thread;
