//! `sssd.Drafter` and `sssd.Sequence`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, TryLockError};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use sssd_core::{Corpus, Drafter, Knowledge, MAX_NODES, MAX_TOKEN, Model, SOURCES, Sequence};

use crate::datastore::PyDatastore;
use crate::errors::error;
use crate::tokens::{int32, tokens, top};
use crate::tree::PyDraftTree;

/// Longer extensions release the GIL; for a few tokens that would cost more than the work.
const DETACH_TOKENS: usize = 256;

/// The key of the weights in a state dict; names what they fit.
const WEIGHTS: &str = "weights.v2";

/// Drafts continuations of token sequences. One drafter serves any number of sequences and threads.
///
/// Its sequences learn from one another: from what ``Sequence.finish`` and ``commit`` hand over, and from the target's
/// probabilities given to ``extend`` and ``feedback``.
///
/// Args:
///     vocab_size: number of token ids; ids outside are refused everywhere. Any id below 2^31 if left out.
///     end_token_ids: tokens that end a sequence; nothing is drafted after one.
///     datastore: a corpus to match as well: a path, several paths that are one store, or an open ``Datastore``
///         (which may be closed afterwards).
///     load: how to open paths, ``"mmap"`` or ``"ram"``; see ``Datastore.open``.
///     live_bytes: memory for the tokens of finished requests (the live store), about 40 bytes a token, taken with the
///         first of them; 0 keeps none.
///     soft_bytes: memory for the target's own most probable tokens, taken with the first of them; 0 keeps none.
///
/// Raises:
///     InvalidArgumentError: ``vocab_size`` is not in 1..2^31, or a size is negative.
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
    #[pyo3(signature = (*, vocab_size=None, end_token_ids=None, datastore=None, load="mmap",
                        live_bytes=64 << 20, soft_bytes=16 << 20))]
    fn new(
        py: Python<'_>,
        vocab_size: Option<i128>,
        end_token_ids: Option<&Bound<'_, PyAny>>,
        datastore: Option<&Bound<'_, PyAny>>,
        load: &str,
        live_bytes: i128,
        soft_bytes: i128,
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
        let bytes = |name: &str, bytes: i128| match usize::try_from(bytes) {
            Ok(bytes) if bytes <= MOST_BYTES => Ok(bytes),
            _ => {
                let message = format!("{name} must be between 0 and 2^40, got {bytes}");
                Err(error(py, "InvalidArgumentError", message))
            }
        };
        let (live, soft) = (bytes("live_bytes", live_bytes)?, bytes("soft_bytes", soft_bytes)?);
        let knowledge = Knowledge::new(Model::default(), live, soft);
        Ok(Self { drafter: Arc::new(Drafter::new(end_tokens, store, knowledge)), vocab_size })
    }

    /// Starts a sequence (a request).
    ///
    /// Args:
    ///     prompt_ids: its tokens so far, any one-dimensional sequence or array of integers; may be empty.
    ///     prediction: tokens that the output is expected to resemble, such as the file that is to be edited. Drafts
    ///         follow it from the start of the output and find it again after differences; it need not be right.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary.
    #[pyo3(signature = (prompt_ids, prediction=None))]
    fn begin(
        &self,
        prompt_ids: &Bound<'_, PyAny>,
        prediction: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PySequence> {
        let py = prompt_ids.py();
        let prompt = tokens(prompt_ids, self.vocab_size)?;
        let prediction = prediction.map_or(Ok(Vec::new()), |ids| tokens(ids, self.vocab_size))?;
        let drafter = Arc::clone(&self.drafter);
        let sequence = enter(py, true, || drafter.begin(&prompt, &prediction))?;
        Ok(PySequence { sequence: Mutex::new(Some(sequence)), vocab_size: self.vocab_size })
    }

    /// How drafts fared, by source: ``{"drafts": int, "sources": {name: {"drafted": int, "accepted": int,
    /// "predicted": float}}}``.
    ///
    /// A node counts for the source that contributed most to it. ``predicted`` is the sum of the nodes'
    /// probabilities: how many were expected to be accepted. Drafts count once their outcome is known; those of
    /// running sequences are added every 64 drafts.
    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.drafter.stats());
        let sources = PyDict::new(py);
        for (name, source) in SOURCES.iter().zip(&stats.sources) {
            let counts = PyDict::new(py);
            counts.set_item("drafted", source.drafted)?;
            counts.set_item("accepted", source.accepted)?;
            counts.set_item("predicted", source.predicted)?;
            sources.set_item(name, counts)?;
        }
        let out = PyDict::new(py);
        out.set_item("drafts", stats.drafts)?;
        out.set_item("sources", sources)?;
        Ok(out)
    }

    /// What the predictor has learned from finished sequences, as a dict to be saved and loaded.
    ///
    /// Next sequences start with it. It holds no tokens.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        state_dict(py, &self.drafter.model())
    }

    /// Replaces what the predictor has learned, for sequences begun from now on.
    ///
    /// Args:
    ///     state: from ``state_dict`` of a drafter or sequence.
    ///
    /// Raises:
    ///     InvalidArgumentError: the dict is not such a state, or that of another release; nothing changes.
    fn load_state_dict(&self, state: &Bound<'_, PyDict>) -> PyResult<()> {
        let weights = state.get_item(WEIGHTS)?;
        let weights = weights.as_ref().and_then(|weights| weights.cast::<PyBytes>().ok());
        match weights.and_then(|weights| Model::from_bytes(weights.as_bytes())) {
            Some(model) => {
                self.drafter.set_model(model);
                Ok(())
            }
            None => {
                let message = "state must be what state_dict of this release returned";
                Err(error(state.py(), "InvalidArgumentError", message))
            }
        }
    }

    /// Forgets what the predictor has learned: sequences begun from now on start with the weights that ship with
    /// sssd.
    fn reset(&self) {
        self.drafter.set_model(Model::default());
    }

    /// Bytes of memory that its sequences share: live store, target's probabilities, weights. A datastore is not
    /// counted.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.drafter.memory_bytes())
    }

    /// Tokens in the live store.
    #[getter]
    fn live_tokens(&self, py: Python<'_>) -> usize {
        py.detach(|| self.drafter.live_len().0)
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

/// No machine has more, and sums of it do not overflow.
const MOST_BYTES: usize = 1 << 40;

fn state_dict<'py>(py: Python<'py>, model: &Model) -> PyResult<Bound<'py, PyDict>> {
    let state = PyDict::new(py);
    state.set_item(WEIGHTS, PyBytes::new(py, &model.to_bytes()))?;
    Ok(state)
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

/// One request's tokens and their index. Made by ``Drafter.begin``; a context manager that finishes the sequence, or
/// closes it on an exception.
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
    ///     token_ids: any one-dimensional sequence or array of n integers.
    ///     topk_ids: the target's k most probable tokens at each of them, integers [n, k]: row i is the distribution
    ///         that token i came from. The eight most probable ones are kept.
    ///     topk_probs: their probabilities, floats [n, k].
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary; nothing is appended.
    ///     InvalidArgumentError: shapes do not fit, or a row of probabilities is not within 0..1 and sums to at most
    ///         1; nothing is appended.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (token_ids, topk_ids=None, topk_probs=None))]
    fn extend(
        &self,
        token_ids: &Bound<'_, PyAny>,
        topk_ids: Option<&Bound<'_, PyAny>>,
        topk_probs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let tokens = tokens(token_ids, self.vocab_size)?;
        let top = top(topk_ids, topk_probs, tokens.len(), self.vocab_size)?;
        let soft = top.as_ref().map(|top| top.view());
        self.with(token_ids.py(), tokens.len() > DETACH_TOKENS, |sequence| sequence.extend(&tokens, soft))
    }

    /// Hands over the target's probabilities after every node of a verified tree, accepted or not.
    ///
    /// Rejected nodes count too: they are distributions of the target for real contexts. Call it before ``extend``;
    /// ``extend`` then needs no ``topk_ids``.
    ///
    /// Args:
    ///     tree: the tree of n nodes that was verified after the sequence's last token.
    ///     topk_ids: the target's k most probable tokens, integers [n+1, k]: row 0 after the root, row i+1 after node i.
    ///     topk_probs: their probabilities, floats [n+1, k].
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary; nothing is learned.
    ///     InvalidArgumentError: shapes do not fit, or a row of probabilities is not within 0..1 and sums to at most
    ///         1; nothing is learned.
    ///     ClosedError: the sequence is closed.
    fn feedback(
        &self,
        tree: &Bound<'_, PyDraftTree>,
        topk_ids: &Bound<'_, PyAny>,
        topk_probs: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let tree_ref = &tree.get().0;
        match top(Some(topk_ids), Some(topk_probs), tree_ref.len() + 1, self.vocab_size)? {
            Some(top) => self.with(tree.py(), false, |sequence| sequence.feedback(tree_ref, top.view())),
            None => Ok(()),
        }
    }

    /// Drafts continuations of the sequence.
    ///
    /// Args:
    ///     max_nodes: the node budget, 0 to 1024. The tree has fewer nodes if fewer are worth drafting.
    ///     min_prob: least probability of a node, 0 to 1.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``max_nodes`` or ``min_prob`` is out of range.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (max_nodes=32, *, min_prob=0.001))]
    fn draft(&self, py: Python<'_>, max_nodes: i128, min_prob: f32) -> PyResult<PyDraftTree> {
        if !(0.0..=1.0).contains(&min_prob) {
            let message = format!("min_prob must be between 0 and 1, got {min_prob}");
            return Err(error(py, "InvalidArgumentError", message));
        }
        match usize::try_from(max_nodes) {
            Ok(nodes) if nodes <= MAX_NODES => {
                self.with(py, true, |sequence| sequence.draft(nodes, min_prob).clone()).map(PyDraftTree)
            }
            _ => {
                let message = format!("max_nodes must be between 0 and {MAX_NODES}, got {max_nodes}");
                Err(error(py, "InvalidArgumentError", message))
            }
        }
    }

    /// Hands the tokens so far to the live store, for other sequences of the drafter. ``finish`` does it by itself.
    ///
    /// Raises:
    ///     ClosedError: the sequence is closed.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, true, Sequence::commit)
    }

    /// Ends the request and frees the sequence. Later sequences of the drafter learn from it: its tokens go to the
    /// live store and what the predictor has learned is merged. Finishing or closing again does nothing.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, true, || {
            if let Ok(mut sequence) = self.sequence.lock()
                && let Some(sequence) = sequence.take()
            {
                sequence.finish();
            }
        })
    }

    /// Frees the sequence; nothing is learned from it, as after an abort. Further calls raise ``ClosedError``; closing again does nothing.
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

    /// What the predictor has learned so far in this sequence, for ``Drafter.load_state_dict``.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let model = self.with(py, true, |sequence| sequence.model().clone())?;
        state_dict(py, &model)
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
    ) -> PyResult<()> {
        let _ = (error, trace);
        if kind.is_none() {
            return self.finish(py);
        }
        self.close(py);
        Ok(())
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
