//! A request behind a lock, with what can be wrong with it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use sssd_core::{MemoryFull, Outcome, Reservation, Sequence, StoreSlot, Token, TopK};

use crate::sizing::Pace;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError, TryLockError, thread};

/// Tokens that are appended or taken back at a time: some milliseconds.
pub const PIECE: usize = 4096;

const NAP: Duration = Duration::from_millis(1);

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
    /// Somebody has asked for it.
    #[error("the call was interrupted")]
    Interrupted,
}

/// How many of its first tokens a sequence that holds `held` shares with a row, of which `row` are the tokens from `from`
/// on, where those before are the same. None if they cannot be, as the others differ.
pub fn shared_prefix(held: &[Token], from: usize, row: &[Token]) -> Option<usize> {
    let overlap = held.get(from..)?;
    let same = overlap.iter().zip(row).take_while(|(held, new)| held == new).count();
    (from == 0 || same == overlap.len().min(row.len())).then_some(from + same)
}

/// Asked between pieces of long work whether to give it up.
pub type Interrupted<'a> = &'a (dyn Fn() -> bool + Sync);

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
    /// The length that the sequence is to be cut to before anything else.
    cut: Option<usize>,
}

impl Live {
    /// Takes back or indexes part of what is to be.
    fn fill(&mut self, most: usize) -> Result<(), MemoryFull> {
        if let Some(length) = self.cut {
            if !self.sequence.truncate_part(length, most)? {
                return Ok(());
            }
            self.cut = None;
        }
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

    fn is_ready(&self) -> bool {
        self.backlog.is_empty() && self.cut.is_none()
    }

    /// Becomes a request that has just begun, without tokens.
    fn begin_anew(&mut self, learn: bool, interrupted: Interrupted) -> Result<(), RequestError> {
        let renewed = self.sequence.renewed()?;
        let before = std::mem::replace(&mut self.sequence, renewed);
        (self.cut, self.backlog, self.reservation) = (None, Vec::new(), None);
        if learn {
            let finished = before.finish(&mut || interrupted());
            self.sequence.relearn();
            return if finished { Ok(()) } else { Err(RequestError::Interrupted) };
        }
        Ok(())
    }

    /// Takes tokens back, piece by piece.
    fn truncate(&mut self, length: usize, interrupted: Interrupted) -> Result<(), RequestError> {
        self.complete(interrupted)?;
        if !self.sequence.truncate_part(length, PIECE)? {
            self.cut = Some(length);
        }
        self.complete(interrupted)
    }

    /// Does all that is to be done, piece by piece. What is left when it is interrupted is left to the next call.
    fn complete(&mut self, interrupted: Interrupted) -> Result<(), RequestError> {
        while !self.is_ready() {
            self.fill(PIECE)?;
            if !self.is_ready() && interrupted() {
                return Err(RequestError::Interrupted);
            }
        }
        Ok(())
    }

    /// Lets `append` append the pieces from one token to another. If it fails or is interrupted, they are taken back.
    fn append(
        &mut self,
        count: usize,
        interrupted: Interrupted,
        mut append: impl FnMut(&mut Sequence, usize, usize) -> Result<(), MemoryFull>,
    ) -> Result<(), RequestError> {
        self.complete(interrupted)?;
        let before = self.sequence.tokens().len();
        for from in (0..count.max(1)).step_by(PIECE) {
            let to = count.min(from + PIECE);
            let mut done = append(&mut self.sequence, from, to).map_err(RequestError::from);
            if done.is_ok() && to < count && interrupted() {
                done = Err(RequestError::Interrupted);
            }
            if let Err(failure) = done {
                self.cut = (from > 0 || failure == RequestError::Interrupted).then_some(before);
                let _ = self.complete(interrupted);
                return Err(failure);
            }
        }
        Ok(())
    }
}

impl Request {
    /// A request that is there.
    pub fn new(sequence: Sequence) -> Self {
        Self::with_backlog(sequence, Vec::new(), None)
    }

    /// A request that is over: it has nothing, and nothing can be done with it.
    pub fn over() -> Self {
        let (batch, pace) = (AtomicU64::new(0), Mutex::new(None));
        Self { state: Mutex::new(State::Over(RequestError::Closed)), batch, pace }
    }

    /// A request whose prompt is still to be indexed, by [`Request::fill`] or by who needs it first.
    pub fn with_backlog(
        sequence: Sequence,
        mut prompt: Vec<Token>,
        reservation: Option<Reservation>,
    ) -> Self {
        prompt.reverse();
        let live = Live { sequence, backlog: prompt, unattended: false, reservation, cut: None };
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

    /// The same at once, if nobody else has it and nothing is to be done first; else `work` is given back.
    pub fn try_with<T, F: FnOnce(&mut Sequence) -> T>(&self, work: F) -> Result<Result<T, RequestError>, F> {
        let Ok(mut state) = self.state.try_lock() else { return Err(work) };
        if matches!(&*state, State::Live(live) if !live.is_ready()) {
            return Err(work);
        }
        Ok(Self::guard(&mut state, |live| Ok(work(&mut live.sequence))))
    }

    /// Matches another corpus from the next draft on, and so do its forks.
    pub fn set_store(&self, store: &Arc<StoreSlot>) -> Result<(), RequestError> {
        self.guarded(|live| {
            live.sequence.set_store(store);
            Ok(())
        })
    }

    /// Does what is to be done before anything else: indexing the prompt, or taking tokens back.
    pub fn complete(&self, interrupted: Interrupted) -> Result<(), RequestError> {
        self.guarded(|live| live.complete(interrupted))
    }

    /// Appends tokens that the target has produced.
    pub fn extend(
        &self,
        tokens: &[Token],
        top: Option<TopK>,
        interrupted: Interrupted,
    ) -> Result<Option<Outcome>, RequestError> {
        self.guarded(|live| {
            live.append(tokens.len(), interrupted, |sequence, from, to| {
                let rows = |top: TopK<'_>| from * top.k..to * top.k;
                let top =
                    top.map(|top| TopK { ids: &top.ids[rows(top)], probs: &top.probs[rows(top)], ..top });
                sequence.extend_part(&tokens[from..to], top)
            })?;
            Ok(live.sequence.learn(tokens))
        })
    }

    /// Appends tokens that the target has not produced.
    pub fn prefill(&self, tokens: &[Token], interrupted: Interrupted) -> Result<(), RequestError> {
        self.guarded(|live| {
            live.append(tokens.len(), interrupted, |sequence, from, to| sequence.prefill(&tokens[from..to]))
        })
    }

    /// Takes tokens back, down to `length`. Interrupted, the next call does the rest.
    pub fn truncate(&self, length: usize, interrupted: Interrupted) -> Result<(), RequestError> {
        self.guarded(|live| live.truncate(length, interrupted))
    }

    /// Makes the text that of a row: its first `keep` tokens, which it shares with the row, and then `tokens`, which the
    /// target has produced. Where nothing is shared it begins anew with `tokens` as its prompt, and others learn from what
    /// it was if `learn`. If it fails or is interrupted, it holds what it shares, or all that it has held.
    pub fn follow(
        &self,
        keep: usize,
        tokens: &[Token],
        learn: bool,
        interrupted: Interrupted,
    ) -> Result<Option<Outcome>, RequestError> {
        self.guarded(|live| {
            live.complete(interrupted)?;
            let held = live.sequence.tokens().len();
            if keep == 0 {
                if held > 0 {
                    live.begin_anew(learn, interrupted)?;
                }
                live.append(tokens.len(), interrupted, |sequence, from, to| {
                    sequence.prefill(&tokens[from..to])
                })?;
                return Ok(None);
            }
            if keep < held {
                live.truncate(keep, interrupted)?;
            }
            live.append(tokens.len(), interrupted, |sequence, from, to| {
                sequence.extend_part(&tokens[from..to], None)
            })?;
            Ok(live.sequence.learn(tokens))
        })
    }

    /// Begins anew without tokens; others learn from what it was if `learn`.
    pub fn clear(&self, learn: bool, interrupted: Interrupted) -> Result<(), RequestError> {
        self.guarded(|live| {
            if learn {
                live.complete(interrupted)?;
            }
            live.begin_anew(learn, interrupted)
        })
    }

    /// Sets the tokens after which nothing is drafted.
    pub fn set_end_tokens(&self, end_tokens: &[Token]) -> Result<(), RequestError> {
        self.guarded(|live| Ok(live.sequence.set_end_tokens(end_tokens)?))
    }

    /// The same as `with`, unless the prompt is still being indexed; if no thread does it, by a piece in each call.
    pub fn with_ready<T>(&self, work: impl FnOnce(&mut Sequence) -> T) -> Result<Option<T>, RequestError> {
        self.guarded(|live| {
            if live.unattended || live.cut.is_some() {
                live.fill(PIECE)?;
            }
            Ok(live.is_ready().then(|| work(&mut live.sequence)))
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
            Ok(live.is_ready())
        });
        filled.unwrap_or(true)
    }

    fn guarded<T>(&self, work: impl FnOnce(&mut Live) -> Result<T, RequestError>) -> Result<T, RequestError> {
        Self::guard(&mut self.lock(), work)
    }

    fn guard<T>(
        state: &mut State,
        work: impl FnOnce(&mut Live) -> Result<T, RequestError>,
    ) -> Result<T, RequestError> {
        let live = match state {
            State::Live(live) => live,
            State::Over(reason) => return Err(reason.clone()),
        };
        let indexing = !live.backlog.is_empty();
        let mut unwound = true;
        let done = catch_unwind(AssertUnwindSafe(|| {
            let done = work(live);
            unwound = false;
            done
        }))
        .unwrap_or_else(|panic| Err(ended_by(&*panic)));
        match &done {
            Err(failure @ RequestError::Failed(_)) => Self::end(state, failure.clone()),
            // a prompt that does not fit cannot be taken back, nor what was left half done
            Err(full @ RequestError::Memory(_)) if indexing || unwound => Self::end(state, full.clone()),
            _ => {}
        }
        done
    }

    /// The sequence to look at, unless somebody else has it.
    pub(crate) fn peek(&self) -> Option<Peek<'_>> {
        self.state.try_lock().ok().map(Peek)
    }

    /// Takes the sequence out, if it is there.
    pub fn take(&self, interrupted: Interrupted) -> Result<Sequence, RequestError> {
        self.complete(interrupted)?;
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
            Ok(state) => matches!(&*state, State::Live(live) if !live.is_ready()),
            Err(_) => true,
        }
    }

    /// Whether another call has it.
    pub fn is_taken(&self) -> bool {
        matches!(self.state.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// Waits until no other call has it.
    pub fn wait(&self, interrupted: Interrupted) {
        while self.is_taken() && !interrupted() {
            thread::sleep(NAP);
        }
    }

    /// Gives what is new to the live store.
    pub fn commit(&self, interrupted: Interrupted) -> Result<(), RequestError> {
        self.guarded(|live| {
            live.complete(interrupted)?;
            if live.sequence.commit(&mut || interrupted()) { Ok(()) } else { Err(RequestError::Interrupted) }
        })
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

/// What a panic, or a draft that the system had no memory for, makes of a request.
fn ended_by(panic: &(dyn Any + Send)) -> RequestError {
    match panic.downcast_ref::<MemoryFull>() {
        Some(&full) => RequestError::Memory(full),
        None => RequestError::Failed(panic_reason(panic)),
    }
}

/// What a panic said.
pub fn panic_reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}
