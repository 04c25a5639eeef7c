//! How far work is, and whether it is still wanted.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{Error, Result};

/// Watches and cancels what takes long from another thread.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Symbols (tokens and document ends) indexed so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Makes the work fail with [`crate::Error::Cancelled`] at the next occasion (not while a segment is being sorted).
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Takes back what came too late to cancel anything.
    pub fn renew(&self) {
        self.cancelled.store(false, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self, symbols: u64) -> io::Result<()> {
        self.done.fetch_add(symbols, Ordering::Relaxed);
        if self.cancelled() { Err(io::Error::other("cancelled")) } else { Ok(()) }
    }

    pub(crate) fn count(&self, symbols: u64) -> Result<()> {
        self.done.fetch_add(symbols, Ordering::Relaxed);
        self.check()
    }

    /// Shows how far other work is, and passes on to it that it is not wanted any more.
    pub(crate) fn follow(&self, other: &Self) {
        self.done.fetch_max(other.done(), Ordering::Relaxed);
        if self.cancelled() {
            other.cancel();
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    pub(crate) fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
