//! `sssd.Drafter` and `sssd.Sequence`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, TryLockError};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use sssd_core::{Corpus, Drafter, MAX_NODES, MAX_TOKEN, Model, Sequence};

use crate::datastore::PyDatastore;
use crate::errors::error;
use crate::tokens::{int32, tokens};
use crate::tree::PyDraftTree;

/// Longer extensions release the GIL; for a few tokens that would cost more than the work.
const DETACH_TOKENS: usize = 256;

/// Drafts continuations of token sequences. One drafter serves any number of sequences and threads.
///
/// Args:
///     vocab_size: number of token ids; ids outside are refused everywhere. Any id below 2^31 if left out.
///     end_token_ids: tokens that end a sequence; nothing is drafted after one.
///     datastore: a corpus to match as well: a path, several paths that are one store, or an open ``Datastore``
///         (which may be closed afterwards).
///     load: how to open paths, ``"mmap"`` or ``"ram"``; see ``Datastore.open``.
///     weights: the predictor's weights that sequences start with, from ``Sequence.weights``; by default those that
///         ship with sssd.
///
/// Raises:
///     InvalidArgumentError: ``vocab_size`` is not in 1..2^31, or ``weights`` are not such weights.
///     InvalidTokenError: an end token is outside the vocabulary.
///     VocabularyMismatchError: the datastore has more token ids than ``vocab_size``.
///     OSError, DatastoreError: the datastore cannot be opened.
#[pyclass(frozen, name = "Drafter", module = "sssd")]
pub struct PyDrafter {
    drafter: Arc<Drafter>,
    vocab_size: Option<u32>,
}

#[pymethods]
impl PyDrafter {
    #[new]
    #[pyo3(signature = (*, vocab_size=None, end_token_ids=None, datastore=None, load="mmap", weights=None))]
    fn new(
        py: Python<'_>,
        vocab_size: Option<i128>,
        end_token_ids: Option<&Bound<'_, PyAny>>,
        datastore: Option<&Bound<'_, PyAny>>,
        load: &str,
        weights: Option<&[u8]>,
    ) -> PyResult<Self> {
        let vocab_size = match vocab_size {
            Some(size) if !(1..=i128::from(MAX_TOKEN) + 1).contains(&size) => {
                let message = format!("vocab_size must be between 1 and 2^31, got {size}");
                return Err(error(py, "InvalidArgumentError", message));
            }
            size => size.map(|size| size as u32),
        };
        let end_tokens = end_token_ids.map_or(Ok(Vec::new()), |ids| tokens(ids, vocab_size))?;
        let store = datastore.map(|datastore| corpus(datastore, load, vocab_size)).transpose()?;
        let model = weights.map_or(Some(Model::default()), Model::from_bytes).ok_or_else(|| {
            error(py, "InvalidArgumentError", "weights must be bytes from Sequence.weights of this release")
        })?;
        Ok(Self { drafter: Arc::new(Drafter::new(end_tokens, store, model)), vocab_size })
    }

    /// Starts a sequence (a request).
    ///
    /// Args:
    ///     prompt_ids: its tokens so far, any one-dimensional sequence or array of integers; may be empty.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary.
    fn begin(&self, prompt_ids: &Bound<'_, PyAny>) -> PyResult<PySequence> {
        let py = prompt_ids.py();
        let prompt = tokens(prompt_ids, self.vocab_size)?;
        let drafter = Arc::clone(&self.drafter);
        let sequence = enter(py, true, || drafter.begin(&prompt))?;
        Ok(PySequence { sequence: Mutex::new(Some(sequence)), vocab_size: self.vocab_size })
    }

    /// Number of token ids, or None if not given.
    #[getter]
    fn vocab_size(&self) -> Option<u32> {
        self.vocab_size
    }

    /// Tokens that end a sequence, int32 [n].
    #[getter]
    fn end_token_ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        int32(py, self.drafter.end_tokens().iter().map(|&token| token as i32))
    }

    fn __repr__(&self) -> String {
        match self.vocab_size {
            Some(size) => format!("Drafter(vocab_size={size})"),
            None => "Drafter()".into(),
        }
    }
}

/// The corpus of an open datastore, or of one opened from paths.
fn corpus(datastore: &Bound<'_, PyAny>, load: &str, vocab_size: Option<u32>) -> PyResult<Arc<dyn Corpus>> {
    let py = datastore.py();
    let opened;
    let store = match datastore.cast::<PyDatastore>() {
        Ok(store) => store.get(),
        Err(_) => {
            opened = PyDatastore::open(py, datastore, load, None, None)?;
            &opened
        }
    };
    let known = store.vocabulary(py)?;
    match vocab_size {
        Some(size) if known > size => {
            let advice = "open the store that was built with the model's own tokenizer";
            let message = format!("the datastore has {known} token ids and the model only {size}; {advice}");
            Err(error(py, "VocabularyMismatchError", message))
        }
        _ => store.corpus(py),
    }
}

/// One request's tokens and their index. Made by ``Drafter.begin``; a context manager that closes itself.
///
/// Calls from several threads are safe and take turns.
#[pyclass(frozen, name = "Sequence", module = "sssd")]
pub struct PySequence {
    sequence: Mutex<Option<Sequence>>,
    vocab_size: Option<u32>,
}

#[pymethods]
impl PySequence {
    /// Appends tokens that the target model has produced. They are matched from the next draft on.
    ///
    /// Args:
    ///     token_ids: any one-dimensional sequence or array of integers.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary; nothing is appended.
    ///     ClosedError: the sequence is closed.
    fn extend(&self, token_ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let tokens = tokens(token_ids, self.vocab_size)?;
        self.with(token_ids.py(), tokens.len() > DETACH_TOKENS, |sequence| sequence.extend(&tokens))
    }

    /// Drafts continuations of the sequence.
    ///
    /// Args:
    ///     max_nodes: the node budget, 0 to 1024. The tree has fewer nodes if fewer are worth drafting.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``max_nodes`` is out of range.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (max_nodes=32))]
    fn draft(&self, py: Python<'_>, max_nodes: i128) -> PyResult<PyDraftTree> {
        match usize::try_from(max_nodes) {
            Ok(nodes) if nodes <= MAX_NODES => {
                self.with(py, true, |sequence| sequence.draft(nodes).clone()).map(PyDraftTree)
            }
            _ => {
                let message = format!("max_nodes must be between 0 and {MAX_NODES}, got {max_nodes}");
                Err(error(py, "InvalidArgumentError", message))
            }
        }
    }

    /// Frees the sequence. Further calls raise ``ClosedError``; closing again does nothing.
    fn close(&self, py: Python<'_>) {
        py.detach(|| match self.sequence.lock() {
            Ok(mut sequence) => *sequence = None,
            Err(poisoned) => *poisoned.into_inner() = None,
        });
    }

    /// Whether ``close`` has been called.
    #[getter]
    fn closed(&self, py: Python<'_>) -> bool {
        py.detach(|| self.sequence.lock().map_or(true, |sequence| sequence.is_none()))
    }

    /// All tokens so far, int32 [len].
    #[getter]
    fn token_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let ids: Vec<i32> =
            self.with(py, true, |sequence| sequence.tokens().iter().map(|&token| token as i32).collect())?;
        Ok(PyArray1::from_vec(py, ids))
    }

    /// The predictor's weights as learned so far, to start another drafter with.
    #[getter]
    fn weights<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let weights = self.with(py, true, |sequence| sequence.model().to_bytes())?;
        Ok(PyBytes::new(py, &weights))
    }

    /// Bytes of memory that the sequence holds.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, false, |sequence| sequence.memory_bytes())
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, false, |sequence| sequence.tokens().len())
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (kind, error, trace, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        trace: &Bound<'_, PyAny>,
    ) {
        let _ = (kind, error, trace);
        self.close(py);
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.with(py, false, |sequence| sequence.tokens().len()) {
            Ok(length) => format!("Sequence({length} tokens)"),
            Err(_) => "Sequence(closed)".into(),
        }
    }
}

impl PySequence {
    /// Runs `work` on the sequence, without the GIL if `detach` or if another thread has the sequence.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        detach: bool,
        work: impl FnOnce(&mut Sequence) -> T + Send,
    ) -> PyResult<T> {
        let busy = !detach && matches!(self.sequence.try_lock(), Err(TryLockError::WouldBlock));
        let result = enter(py, detach || busy, || {
            let mut sequence =
                self.sequence.lock().map_err(|_| "this sequence met an internal error; begin it anew")?;
            sequence.as_mut().map(work).ok_or("")
        })?;
        result.map_err(|problem| match problem {
            "" => error(py, "ClosedError", "the sequence is closed; begin a new one"),
            problem => error(py, "InternalError", problem),
        })
    }
}

/// Runs `work`, without the GIL if `detach`. A panic becomes `InternalError` and poisons what `work` had locked.
pub fn enter<T: Send>(py: Python<'_>, detach: bool, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    let guarded = || catch_unwind(AssertUnwindSafe(work));
    let result = if detach { py.detach(guarded) } else { guarded() };
    result.map_err(|panic| {
        let reason = panic.downcast_ref::<String>().map(String::as_str);
        let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        error(py, "InternalError", format!("internal error, please report it: {reason}"))
    })
}
