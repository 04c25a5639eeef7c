//! Work whose items a caller shares with helpers, who may come late or not at all.
//!
//! Whoever works holds the lock for reading and takes items from a counter; who fills the work or reads its results
//! holds it for writing. A helper that comes late, even one from an earlier round, finds items of this round or none.

use std::ops::Range;

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{PoisonError, RwLock, RwLockWriteGuard};

/// Work that falls into items, to be done in any order.
pub trait Items {
    /// How many a thread takes at a time while `left` are not taken, at least 1.
    fn group(&self, left: usize) -> usize {
        left.min(1)
    }

    /// How many there are.
    fn items(&self) -> usize;

    /// Does some of them.
    fn run(&self, items: Range<usize>);
}

/// Work, and how far it is.
#[derive(Default)]
pub struct Share<W> {
    work: RwLock<W>,
    /// The next item to be taken.
    next: AtomicUsize,
}

impl<W: Items> Share<W> {
    /// The work, to fill it or to read its results. Waits for helpers that come late.
    pub fn lock(&self) -> RwLockWriteGuard<'_, W> {
        self.work.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all items done, by this thread and those that `call` asks to [`Share::help`].
    pub(crate) fn run(&self, work: RwLockWriteGuard<'_, W>, call: impl FnOnce()) -> RwLockWriteGuard<'_, W> {
        // before anybody can see the items: helpers of an earlier round may still come, without being called
        self.next.store(0, Ordering::Relaxed);
        drop(work);
        call();
        self.help();
        // all items are taken; who has one that is not done has the lock
        self.lock()
    }

    /// Takes items until there are none.
    pub(crate) fn help(&self) {
        let work = self.work.read().unwrap_or_else(PoisonError::into_inner);
        let (mut taken, items) = (self.next.load(Ordering::Relaxed), work.items());
        while taken < items {
            let end = taken + work.group(items - taken);
            match self.next.compare_exchange(taken, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    work.run(taken..end);
                    taken = self.next.load(Ordering::Relaxed);
                }
                Err(next) => taken = next,
            }
        }
    }
}
