//! What threads share without locks. `tests/loom.rs` puts loom's in its place.

pub use std::sync::atomic::{AtomicU64, Ordering, fence};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is behind these locks is whole after every statement, whoever panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
