//! What threads share without locks. `tests/loom.rs` puts loom's in its place.

pub use std::sync::atomic::{AtomicU64, Ordering, fence};
