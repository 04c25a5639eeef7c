//! A request behind a lock, with what can be wrong with it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use sssd_core::{MemoryFull, Reservation, Sequence, Token};

use crate::sizing::Pace;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// Prompt tokens that are indexed at a time in the background.
const PIECE: usize = 4096;

/// Why a request cannot do what was asked of it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// It was finished or closed.
    #[error("the sequence is closed; begin a new one")]
    Closed,
    /// It panicked, now or earlier.
    #[error("this sequence met an internal error, begin it anew; please report: {0}")]
    Failed(String),
    /// It would need more memory than it may have.
    #[error(transparent)]
    Memory(#[from] MemoryFull),
}

/// One request. Calls from several threads take turns.
pub struct Request {
    state: Mutex<State>,
    /// The newest batch it was in, to notice repetitions.
    batch: AtomicU64,
    /// What the rule remembers of it.
    pace: Mutex<Option<Pace>>,
}

enum State {
    Live(Box<Live>),
    Over(RequestError),
}

struct Live {
    sequence: Sequence,
    /// Prompt tokens that are not indexed yet, last one first, and what they are charged with.
    backlog: Vec<Token>,
    /// Whether no thread indexes them in the background.
    unattended: bool,
    reservation: Option<Reservation>,
}

impl Live {
    /// Indexes part of the backlog.
    fn fill(&mut self, most: usize) -> Result<(), MemoryFull> {
        let rest = self.backlog.len().saturating_sub(most);
        if rest < self.backlog.len() {
            self.backlog[rest..].reverse();
            self.sequence.prefill(&self.backlog[rest..])?;
            self.backlog.truncate(rest);
        }
        if rest == 0 {
            self.backlog = Vec::new();
            self.reservation = None;
        }
        Ok(())
    }
}

impl Request {
    /// A request that is there.
    pub fn new(sequence: Sequence) -> Self {
        Self::with_backlog(sequence, Vec::new(), None)
    }

    /// A request whose prompt is still to be indexed, by [`Request::fill`] or by who needs it first.
    pub fn with_backlog(
        sequence: Sequence,
        mut prompt: Vec<Token>,
        reservation: Option<Reservation>,
    ) -> Self {
        prompt.reverse();
        let live = Live { sequence, backlog: prompt, unattended: false, reservation };
        Self {
            state: Mutex::new(State::Live(Box::new(live))),
            batch: AtomicU64::new(0),
            pace: Mutex::new(None),
        }
    }

    /// Runs `work` on the sequence, once its prompt is indexed. A panic ends this request and no other.
    pub fn with<T>(&self, work: impl FnOnce(&mut Sequence) -> T) -> Result<T, RequestError> {
        self.guarded(|live| {
            live.fill(usize::MAX)?;
            Ok(work(&mut live.sequence))
        })
    }

    /// The same, unless the prompt is still being indexed; if no thread does it, by a piece in each call.
    pub fn with_ready<T>(&self, work: impl FnOnce(&mut Sequence) -> T) -> Result<Option<T>, RequestError> {
        self.guarded(|live| {
            if live.unattended {
                live.fill(PIECE)?;
            }
            Ok(live.backlog.is_empty().then(|| work(&mut live.sequence)))
        })
    }

    /// No thread has room for its prompt.
    pub(crate) fn leave_to_callers(&self) {
        if let State::Live(live) = &mut *self.lock() {
            live.unattended = true;
        }
    }

    /// Indexes a piece of the prompt and tells whether that was all.
    pub fn fill(&self) -> bool {
        let filled = self.guarded(|live| {
            live.fill(PIECE)?;
            Ok(live.backlog.is_empty())
        });
        filled.unwrap_or(true)
    }

    fn guarded<T>(&self, work: impl FnOnce(&mut Live) -> Result<T, RequestError>) -> Result<T, RequestError> {
        let mut state = self.lock();
        let live = match &mut *state {
            State::Live(live) => live,
            State::Over(reason) => return Err(reason.clone()),
        };
        let indexing = !live.backlog.is_empty();
        let done = catch_unwind(AssertUnwindSafe(|| work(live)))
            .unwrap_or_else(|panic| Err(RequestError::Failed(reason(&*panic))));
        match &done {
            Err(failure @ RequestError::Failed(_)) => Self::end(&mut state, failure.clone()),
            // a prompt that does not fit cannot be taken back
            Err(full @ RequestError::Memory(_)) if indexing => Self::end(&mut state, full.clone()),
            _ => {}
        }
        done
    }

    /// The sequence to look at, unless somebody else has it.
    pub(crate) fn peek(&self) -> Option<Peek<'_>> {
        self.state.try_lock().ok().map(Peek)
    }

    /// Takes the sequence out, if it is there.
    pub fn take(&self) -> Result<Sequence, RequestError> {
        self.with(|_| ())?;
        match std::mem::replace(&mut *self.lock(), State::Over(RequestError::Closed)) {
            State::Live(live) => Ok(live.sequence),
            State::Over(reason) => Err(reason),
        }
    }

    /// Frees the sequence. Closing again does nothing.
    pub fn close(&self) {
        Self::end(&mut self.lock(), RequestError::Closed);
    }

    fn end(state: &mut State, reason: RequestError) {
        let before = std::mem::replace(state, State::Over(reason));
        // what panicked once may do so again
        let _ = catch_unwind(AssertUnwindSafe(|| drop(before)));
    }

    /// Whether nothing more can be done with it.
    pub fn closed(&self) -> bool {
        matches!(&*self.lock(), State::Over(_))
    }

    /// Whether a call may take long: another thread has it, or its prompt is to be indexed first.
    pub fn is_busy(&self) -> bool {
        match self.state.try_lock() {
            Ok(state) => matches!(&*state, State::Live(live) if !live.backlog.is_empty()),
            Err(_) => true,
        }
    }

    /// Marks it as part of a batch; false if it is already.
    pub(crate) fn join(&self, batch: u64) -> bool {
        self.batch.swap(batch, Ordering::Relaxed) != batch
    }

    /// What the rule remembers of it.
    pub(crate) fn pace(&self) -> MutexGuard<'_, Option<Pace>> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // every statement leaves it whole: panics are caught inside
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is looked at.
pub(crate) struct Peek<'a>(MutexGuard<'a, State>);

impl Peek<'_> {
    pub fn sequence(&self) -> Option<&Sequence> {
        match &*self.0 {
            State::Live(live) => Some(&live.sequence),
            State::Over(_) => None,
        }
    }
}

/// What a panic said.
pub fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}
