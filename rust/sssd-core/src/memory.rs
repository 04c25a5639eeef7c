//! A limit in bytes, and who holds how much of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memmap2::MmapMut;
use thiserror::Error;

/// There is no memory for what was asked; nothing was changed.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum MemoryFull {
    /// A limit would be exceeded.
    #[error(
        "{wanted} more bytes would exceed the {scope} limit of {limit} bytes, of which {used} are in use; finish or \
         close sequences, or raise the limit"
    )]
    Limit {
        /// Whose limit: `"drafter's"` or `"request's"`.
        scope: &'static str,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes held.
        used: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The system has none.
    #[error(
        "the system has no memory for {wanted} more bytes; free some (finish or close sequences, say), or set max_bytes \
         to what the process may take"
    )]
    System {
        /// Bytes asked for.
        wanted: usize,
    },
}

/// Makes room for exactly `more` items, or says that there is none.
pub fn try_reserve<T>(items: &mut Vec<T>, more: usize) -> Result<(), MemoryFull> {
    let wanted = more.saturating_mul(size_of::<T>());
    items.try_reserve_exact(more).map_err(|_| MemoryFull::System { wanted })
}

/// Makes room for `more` items, with some to spare. If there is none it unwinds with [`MemoryFull`], so that whoever
/// called ends with that error: for work that holds nothing which it could not lose.
#[inline]
pub fn make_room<T>(items: &mut Vec<T>, more: usize) {
    if items.capacity() - items.len() < more && items.try_reserve(more).is_err() {
        give_up(more.saturating_mul(size_of::<T>()));
    }
}

/// Adds an item, as [`make_room`] does.
#[inline]
pub fn push<T>(items: &mut Vec<T>, item: T) {
    make_room(items, 1);
    items.push(item);
}

/// Whether there is memory to start a thread: one that finds its stack but no room for its thread-local data ends the
/// process.
pub fn room_for_a_thread() -> bool {
    // of the system itself: allocators keep memory for later that a thread cannot have
    MmapMut::map_anon(8 << 20).is_ok()
}

/// Unwinds with [`MemoryFull`].
#[cold]
pub fn give_up(wanted: usize) -> ! {
    std::panic::resume_unwind(Box::new(MemoryFull::System { wanted }))
}

/// A copy, if there is room for it.
pub fn try_clone<T: Copy>(items: &[T]) -> Result<Vec<T>, MemoryFull> {
    let mut copy = Vec::new();
    try_reserve(&mut copy, items.len())?;
    copy.extend_from_slice(items);
    Ok(copy)
}

/// One part in so many of a limit is kept for requests that run: new ones do not get it.
const KEPT: usize = 8;

/// Counts bytes against a limit.
#[derive(Debug)]
pub struct MemoryPool {
    limit: usize,
    used: AtomicUsize,
    /// Of which for what requests share.
    shared: AtomicUsize,
    peak: AtomicUsize,
    refused: AtomicU64,
}

impl MemoryPool {
    /// Allows at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        let [used, shared, peak] = [const { AtomicUsize::new(0) }; 3];
        Self { limit, used, shared, peak, refused: AtomicU64::new(0) }
    }

    /// Bytes allowed.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes held.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes held for what requests share.
    pub fn shared(&self) -> usize {
        self.shared.load(Ordering::Relaxed)
    }

    /// The most bytes ever held.
    pub fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    /// How often bytes were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn add(&self, wanted: usize, entering: bool) -> Result<(), MemoryFull> {
        let limit = if entering { self.limit - self.limit / KEPT } else { self.limit };
        let fits = |used: usize| used.checked_add(wanted).filter(|&sum| sum <= limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(before) => {
                self.peak.fetch_max(before + wanted, Ordering::Relaxed);
                Ok(())
            }
            Err(used) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Err(MemoryFull::Limit { scope: "drafter's", wanted, used, limit: self.limit })
            }
        }
    }

    fn subtract(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Bytes held by one owner; given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    pool: Arc<MemoryPool>,
    bytes: usize,
    limit: usize,
    entering: bool,
    shared: bool,
}

impl Reservation {
    /// Holds nothing yet, and never more than `limit` bytes. Until it is admitted, part of the pool's limit is
    /// kept for those who are.
    pub fn new(pool: &Arc<MemoryPool>, limit: usize) -> Self {
        Self { pool: Arc::clone(pool), bytes: 0, limit, entering: true, shared: false }
    }

    /// For what requests share: it grows as long as part of the pool's limit is left for those who run.
    pub fn shared(pool: &Arc<MemoryPool>) -> Self {
        Self { pool: Arc::clone(pool), bytes: 0, limit: usize::MAX, entering: true, shared: true }
    }

    /// From now on the whole limit is open to it.
    pub fn admit(&mut self) {
        self.entering = false;
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Another owner under the same limits, who holds nothing yet.
    pub fn new_empty(&self) -> Self {
        let Self { ref pool, limit, shared, .. } = *self;
        Self { pool: Arc::clone(pool), bytes: 0, limit, entering: true, shared }
    }

    /// Holds exactly `bytes` from now on.
    pub fn try_resize(&mut self, bytes: usize) -> Result<(), MemoryFull> {
        match bytes.checked_sub(self.bytes) {
            None => self.pool.subtract(self.bytes - bytes),
            Some(0) => return Ok(()),
            Some(wanted) if bytes > self.limit => {
                self.pool.refused.fetch_add(1, Ordering::Relaxed);
                return Err(MemoryFull::Limit {
                    scope: "request's",
                    wanted,
                    used: self.bytes,
                    limit: self.limit,
                });
            }
            Some(wanted) => self.pool.add(wanted, self.entering)?,
        }
        if self.shared {
            // wraps where it becomes less
            self.pool.shared.fetch_add(bytes.wrapping_sub(self.bytes), Ordering::Relaxed);
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Hands `bytes` of what it holds to another owner.
    pub fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        let Self { ref pool, limit, entering, shared, .. } = *self;
        Self { pool: Arc::clone(pool), bytes, limit, entering, shared }
    }

    /// Takes over what another owner holds, beyond its own limit if need be.
    pub fn merge(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.pool.subtract(self.bytes);
        if self.shared {
            self.pool.shared.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charges_keep_both_limits_and_give_back_what_they_hold() {
        let pool = Arc::new(MemoryPool::new(100));
        let (mut one, mut two) = (Reservation::new(&pool, 80), Reservation::new(&pool, 80));
        one.admit();
        two.try_resize(80).unwrap();
        one.try_resize(20).unwrap();
        two.try_resize(0).unwrap();
        one.try_resize(20).unwrap();
        assert!(two.try_resize(70).is_err(), "part is kept for those who run");
        two.admit();
        one.try_resize(70).unwrap();
        assert!(matches!(one.try_resize(81), Err(MemoryFull::Limit { scope: "request's", .. })));
        assert!(matches!(two.try_resize(31), Err(MemoryFull::Limit { scope: "drafter's", .. })));
        two.try_resize(30).unwrap();
        let part = one.split(50);
        assert_eq!((one.bytes(), part.bytes(), pool.used()), (20, 50, 100));
        drop((one, two));
        assert_eq!((pool.used(), pool.peak(), pool.refused()), (50, 100, 3));
        drop(part);
        assert_eq!(pool.used(), 0);
    }
}
