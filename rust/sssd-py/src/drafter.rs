//! `sssd.Drafter` and `sssd.Sequence`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict};
use sssd_core::{Corpus, Limits, MAX_NODES, MAX_TOKEN, MemoryFull, Model, Namespace, SOURCES, Sequence};
use sssd_engine::{Engine, Options, Request, RequestError, gate};

use crate::datastore::PyDatastore;
use crate::errors::error;
use crate::shutdown;
use crate::sizing::{PySizingRule, read_sizing};
use crate::tokens::{history, int32, shown, tokens, top};
use crate::tree::PyDraftTree;

/// Longer extensions release the GIL; for a few tokens that would cost more than the work.
const DETACH_TOKENS: usize = 256;

/// The defaults in Python's signatures are the core's.
const _: () = assert!(Limits::DEFAULT.max_nodes == 32 && Limits::DEFAULT.min_prob == 0.001);

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
///     max_bytes: limit of all memory: sequences, and ``live_bytes`` and ``soft_bytes`` of each namespace. No limit if
///         left out. See ``memory``.
///     max_sequence_bytes: limit of each sequence's memory.
///     threads: threads of a batch call, the caller's included; by default the number of cores, at most 8. They are
///         started when first needed.
///     namespace_ttl: seconds after which a named namespace without sequences is forgotten; never if left out.
///
/// Raises:
///     InvalidArgumentError: ``vocab_size`` is not in 1..2^31, or a size is negative.
///     InvalidTokenError: an end token is outside the vocabulary.
///     VocabularyMismatchError: the datastore has more token ids than ``vocab_size``.
///     OSError, DatastoreError: the datastore cannot be opened.
///     MemoryLimitError: ``max_bytes`` is less than ``live_bytes`` and ``soft_bytes``.
#[pyclass(frozen, name = "Drafter", module = "sssd")]
pub struct PyDrafter {
    pub engine: Arc<Engine>,
    pub vocab_size: Option<u32>,
}

#[pymethods]
impl PyDrafter {
    #[new]
    #[pyo3(signature = (*, vocab_size=None, end_token_ids=None, datastore=None, load="mmap",
                        live_bytes=64 << 20, soft_bytes=16 << 20, max_bytes=None, max_sequence_bytes=None,
                        threads=None, namespace_ttl=None))]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        py: Python<'_>,
        vocab_size: Option<i128>,
        end_token_ids: Option<&Bound<'_, PyAny>>,
        datastore: Option<&Bound<'_, PyAny>>,
        load: &str,
        live_bytes: i128,
        soft_bytes: i128,
        max_bytes: Option<i128>,
        max_sequence_bytes: Option<i128>,
        threads: Option<i128>,
        namespace_ttl: Option<f64>,
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
        let limit =
            |name: &str, limit: Option<i128>| limit.map_or(Ok(usize::MAX), |limit| bytes(name, limit));
        let threads = match threads {
            None => thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST_DEFAULT_THREADS)),
            Some(threads @ 1..=MOST_THREADS) => threads as usize,
            Some(threads) => {
                let message = format!("threads must be between 1 and {MOST_THREADS}, got {threads}");
                return Err(error(py, "InvalidArgumentError", message));
            }
        };
        let namespace_ttl = match namespace_ttl.map(Duration::try_from_secs_f64).transpose() {
            Ok(ttl) => ttl,
            Err(_) => {
                let message = "namespace_ttl must be a number of seconds, not negative";
                return Err(error(py, "InvalidArgumentError", message));
            }
        };
        let options = Options {
            end_tokens,
            store,
            live_bytes: bytes("live_bytes", live_bytes)?,
            soft_bytes: bytes("soft_bytes", soft_bytes)?,
            max_bytes: limit("max_bytes", max_bytes)?,
            max_request_bytes: limit("max_sequence_bytes", max_sequence_bytes)?,
            threads,
            namespace_ttl,
        };
        let engine = Engine::new(options).map_err(|full| memory_full(py, &full))?;
        watch_forks(py)?;
        Ok(Self { engine: Arc::new(engine), vocab_size })
    }

    /// Starts a sequence (a request).
    ///
    /// Args:
    ///     prompt_ids: its tokens so far, any one-dimensional sequence or array of integers; may be empty. Ids outside
    ///         the vocabulary, such as -1 at a picture's place, are held as placeholders, here and in what is appended:
    ///         ``token_ids`` shows -1, they match nothing and are never drafted.
    ///     prediction: tokens that the output is expected to resemble, such as the file that is to be edited. Drafts
    ///         follow it from the start of the output and find it again after differences; it need not be right.
    ///     namespace: whose live store, target's probabilities and weights to use and to add to: a tenant, a model, an
    ///         adapter. Made when first named. Nothing is shared with other namespaces but the datastore.
    ///     max_length: the most tokens that the sequence may have; nothing is drafted beyond.
    ///     background: return at once and let another thread index the prompt. Until it is done ``ready`` is False and
    ///         drafts are empty; other calls wait. With ``threads=1`` the first of these does the work.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer.
    ///     InvalidArgumentError: ``max_length`` is negative.
    ///     MemoryLimitError: the sequence or its namespace does not fit into the limits.
    #[pyo3(signature = (prompt_ids, prediction=None, *, namespace="", max_length=None, background=false))]
    fn begin(
        &self,
        prompt_ids: &Bound<'_, PyAny>,
        prediction: Option<&Bound<'_, PyAny>>,
        namespace: &str,
        max_length: Option<i128>,
        background: bool,
    ) -> PyResult<PySequence> {
        let py = prompt_ids.py();
        let prompt = history(prompt_ids, self.vocab_size)?;
        let prediction = prediction.map_or(Ok(Vec::new()), |ids| history(ids, self.vocab_size))?;
        let max_length = max_length.map(|length| not_negative(py, "max_length", length)).transpose()?;
        let engine = &self.engine;
        let request = if background {
            let begun =
                call(py, true, || engine.begin_in_background(namespace, prompt, &prediction, max_length))?;
            begun.map_err(|full| memory_full(py, &full))?
        } else {
            let mut signal = Ok(());
            let begun = call(py, true, || {
                engine.begin(namespace, &prompt, &prediction, max_length, || {
                    signal = Python::attach(|py| py.check_signals());
                    signal.is_err()
                })
            })?;
            signal?;
            match begun.map_err(|full| memory_full(py, &full))? {
                Some(request) => request,
                None => return Err(error(py, "InternalError", "interrupted without a reason")),
            }
        };
        Ok(self.sequence(request))
    }

    /// How drafts fared, by source: ``{"drafts": int, "sources": {name: {"drafted": int, "accepted": int,
    /// "predicted": float}}}``.
    ///
    /// A node counts for the source that contributed most to it. ``predicted`` is the sum of the nodes'
    /// probabilities: how many were expected to be accepted. Drafts count once their outcome is known; those of
    /// running sequences are added every 64 drafts.
    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let drafter = self.default(py)?;
        let stats = call(py, true, || drafter.stats())?;
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
        state_dict(py, &self.default(py)?.model())
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
        match weights.and_then(|weights| Model::from_bytes(weights.as_bytes()).ok()) {
            Some(model) => {
                self.default(state.py())?.set_model(model);
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
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.default(py)?.set_model(Model::default());
        Ok(())
    }

    /// Bytes of memory that its sequences share: live store, target's probabilities, weights. A datastore is not
    /// counted.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        let drafter = self.default(py)?;
        call(py, true, || drafter.memory_bytes())
    }

    /// Tokens in the live store.
    #[getter]
    fn live_tokens(&self, py: Python<'_>) -> PyResult<usize> {
        let drafter = self.default(py)?;
        call(py, true, || drafter.live_len().0)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| Arc::ptr_eq(&self.engine, &other.get().engine))
    }

    fn __hash__(&self) -> usize {
        Arc::as_ptr(&self.engine).addr()
    }

    /// Number of token ids, or None if not given.
    #[getter]
    fn vocab_size(&self) -> Option<u32> {
        self.vocab_size
    }

    /// Tokens that end a sequence, int32 [n].
    #[getter]
    fn end_token_ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        int32(py, self.engine.options().end_tokens.iter().map(|&token| token as i32))
    }

    fn __repr__(&self) -> String {
        match self.vocab_size {
            Some(size) => format!("Drafter(vocab_size={size})"),
            None => "Drafter()".into(),
        }
    }
}

impl PyDrafter {
    fn default(&self, py: Python<'_>) -> PyResult<Arc<Namespace>> {
        self.engine.namespace("").map_err(|full| memory_full(py, &full))
    }

    fn sequence(&self, request: Arc<Request>) -> PySequence {
        PySequence { request, engine: Arc::clone(&self.engine), vocab_size: self.vocab_size }
    }
}

const MOST_THREADS: i128 = 256;
/// More threads than this have too little to do in a batch.
const MOST_DEFAULT_THREADS: usize = 8;

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
    pub request: Arc<Request>,
    pub engine: Arc<Engine>,
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
    ///     InvalidTokenError: an id is not an integer; nothing is appended.
    ///     InvalidArgumentError: shapes do not fit, or a row of probabilities is not within 0..1 and sums to at most
    ///         1; nothing is appended.
    ///     MemoryLimitError: the sequence would not fit into the limits; nothing is appended.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (token_ids, topk_ids=None, topk_probs=None))]
    fn extend(
        &self,
        token_ids: &Bound<'_, PyAny>,
        topk_ids: Option<&Bound<'_, PyAny>>,
        topk_probs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let tokens = history(token_ids, self.vocab_size)?;
        let top = top(topk_ids, topk_probs, tokens.len(), self.vocab_size)?;
        let soft = top.as_ref().map(|top| top.view());
        let py = token_ids.py();
        let detach = tokens.len() > DETACH_TOKENS || self.request.is_busy();
        let done = call(py, detach, || self.engine.extend(&self.request, &tokens, soft))?;
        done.map_err(|failure| request_error(py, &failure))
    }

    /// Appends tokens that the target model has not produced: more of the prompt, as it is prefilled in pieces, or
    /// what a user or a tool adds later. For the prompt it makes no difference how many pieces it comes in.
    ///
    /// Args:
    ///     token_ids: any one-dimensional sequence or array of integers.
    ///
    /// Raises:
    ///     As ``extend``.
    fn prefill(&self, token_ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let tokens = history(token_ids, self.vocab_size)?;
        let detach = tokens.len() > DETACH_TOKENS;
        let py = token_ids.py();
        let done = self.with(py, detach, |sequence| sequence.prefill(&tokens))?;
        done.map_err(|full| memory_full(py, &full))
    }

    /// Takes the newest tokens back, as if they had never come: a rejected overlap step, a beam that is given up.
    /// What the weights, the live store and the target's probabilities have learned stays learned. Takes time
    /// proportional to the number of tokens taken back.
    ///
    /// Args:
    ///     length: tokens that remain, at most as many as there are.
    ///
    /// Raises:
    ///     InvalidArgumentError: there are fewer tokens.
    ///     MemoryLimitError: tokens shared with a fork cannot be taken back within the limits; nothing changes.
    ///     ClosedError: the sequence is closed.
    fn truncate(&self, py: Python<'_>, length: i128) -> PyResult<()> {
        let done = self.with(py, true, |sequence| {
            let held = sequence.tokens().len();
            match usize::try_from(length) {
                Ok(length) if length <= held => sequence.truncate(length).map_err(Ok),
                _ => Err(Err(held)),
            }
        })?;
        done.map_err(|refused| match refused {
            Ok(full) => memory_full(py, &full),
            Err(held) => {
                let message =
                    format!("length must be between 0 and the sequence's {held} tokens, got {length}");
                error(py, "InvalidArgumentError", message)
            }
        })
    }

    /// Another sequence with the same tokens, weights and namespace: a beam, a further sample of the same prompt. The
    /// two share the index of what they have in common; the time is proportional to what was appended or taken
    /// back since the last fork, and four bytes per token are copied. What came of the last draft is learned by
    /// this sequence only.
    ///
    /// Raises:
    ///     MemoryLimitError: the fork does not fit into the limits.
    ///     ClosedError: the sequence is closed.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let fork = call(py, true, || self.engine.fork(&self.request))?;
        let request = fork.map_err(|failure| request_error(py, &failure))?;
        Ok(Self { request, engine: Arc::clone(&self.engine), vocab_size: self.vocab_size })
    }

    /// Whether the prompt is indexed; see ``Drafter.begin(background=True)``.
    ///
    /// Raises:
    ///     ClosedError: the sequence is closed.
    #[getter]
    fn ready(&self, py: Python<'_>) -> PyResult<bool> {
        let ready = call(py, true, || self.request.with_ready(|_| ()))?;
        ready.map(|ready| ready.is_some()).map_err(|failure| request_error(py, &failure))
    }

    /// Compares everything the sequence holds with what it should hold. For tests; takes milliseconds per thousand
    /// tokens.
    ///
    /// Raises:
    ///     InternalError: something is wrong; the message says what.
    ///     ClosedError: the sequence is closed.
    fn check_integrity(&self, py: Python<'_>) -> PyResult<()> {
        let checked = self.with(py, true, |sequence| sequence.check())?;
        checked.map_err(|problem| error(py, "InternalError", problem))
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
    ///     InvalidTokenError: an id of `topk_ids` is not an integer or outside the vocabulary; nothing is learned.
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
    ///     max_nodes: the most nodes, 0 to 1024. The tree has fewer if fewer are worth drafting.
    ///     min_prob: least probability of a node, 0 to 1. A ``rule`` has its own.
    ///     max_depth: no node is deeper; the longest path that is of use.
    ///     cost: what passes cost, ``PassCosts`` or a ``CostCurve``: then the tree is as large as pays, as
    ///         ``PassCosts.allocate`` has it. A curve is read at one sequence of this length.
    ///     rate: what a second is worth then, in tokens; by default what decoding without drafts makes of it.
    ///     rule: a ``SizingRule`` in place of the two, which learns them.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``max_nodes``, ``min_prob``, ``max_depth`` or ``rate`` is out of range, ``cost`` is
    ///         neither, there is a ``rate`` without it, or a ``rule`` as well.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (max_nodes=32, *, min_prob=0.001, max_depth=None, cost=None, rate=None, rule=None))]
    #[allow(clippy::too_many_arguments)]
    fn draft<'py>(
        &self,
        py: Python<'py>,
        max_nodes: i128,
        min_prob: f32,
        max_depth: Option<i128>,
        cost: Option<&Bound<'py, PyAny>>,
        rate: Option<f64>,
        rule: Option<&Bound<'py, PySizingRule>>,
    ) -> PyResult<PyDraftTree> {
        let max_nodes = node_budget(py, "max_nodes", max_nodes)?;
        let min_prob = probability(py, "min_prob", min_prob)?;
        let max_depth = max_depth.map_or(Ok(usize::MAX), |depth| not_negative(py, "max_depth", depth))?;
        let limits = Limits { max_nodes, max_depth, min_prob };
        let sizing = read_sizing(py, cost, rate, rule, max_nodes)?;
        let tree = call(py, true, || self.engine.draft(&self.request, limits, sizing.as_ref()))?;
        tree.map(PyDraftTree).map_err(|failure| request_error(py, &failure))
    }

    /// Cuts the last draft to its first ``nodes`` nodes; does nothing if it has no more. For callers who verify less
    /// than they have drafted, to be called before ``extend``: the sequence then learns what a draft of that size
    /// teaches, and ``Drafter.stats`` and ``Drafter.metrics`` count those nodes only.
    ///
    /// Args:
    ///     nodes: the number of nodes that are verified, as in ``DraftTree.first``.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``nodes`` is negative.
    ///     ClosedError: the sequence is closed.
    fn cut_draft(&self, py: Python<'_>, nodes: i128) -> PyResult<()> {
        let nodes = not_negative(py, "nodes", nodes)?;
        self.with(py, false, |sequence| sequence.cut_draft(nodes))
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
        let done = call(py, true, || self.engine.finish(&self.request))?;
        done.map_err(|failure| request_error(py, &failure))
    }

    /// Frees the sequence; nothing is learned from it, as after an abort. Further calls raise ``ClosedError``; closing
    /// again does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        call(py, true, || self.request.close())
    }

    /// The drafter that it belongs to.
    #[getter]
    fn drafter(&self) -> PyDrafter {
        PyDrafter { engine: Arc::clone(&self.engine), vocab_size: self.vocab_size }
    }

    /// Whether ``close`` has been called.
    #[getter]
    fn closed(&self, py: Python<'_>) -> PyResult<bool> {
        call(py, true, || self.request.closed())
    }

    /// All tokens so far, int32 [len].
    #[getter]
    fn token_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let ids: Vec<i32> =
            self.with(py, true, |sequence| sequence.tokens().iter().map(|&token| shown(token)).collect())?;
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
        self.close(py)
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
        let result = call(py, detach || self.request.is_busy(), || self.request.with(work))?;
        result.map_err(|failure| request_error(py, &failure))
    }
}

/// The exception for what is wrong with a request.
pub fn request_error(py: Python<'_>, failure: &RequestError) -> PyErr {
    match failure {
        RequestError::Closed => error(py, "ClosedError", failure.to_string()),
        RequestError::Failed(_) => error(py, "InternalError", failure.to_string()),
        RequestError::Memory(full) => memory_full(py, full),
    }
}

pub fn memory_full(py: Python<'_>, full: &MemoryFull) -> PyErr {
    error(py, "MemoryLimitError", full.to_string())
}

/// A node budget.
pub fn node_budget(py: Python<'_>, name: &str, nodes: i128) -> PyResult<usize> {
    usize::try_from(nodes).ok().filter(|&nodes| nodes <= MAX_NODES).ok_or_else(|| {
        let message = format!("{name} must be between 0 and {MAX_NODES}, got {nodes}");
        error(py, "InvalidArgumentError", message)
    })
}

/// A number that says how many.
pub fn not_negative(py: Python<'_>, name: &str, value: i128) -> PyResult<usize> {
    usize::try_from(value)
        .map_err(|_| error(py, "InvalidArgumentError", format!("{name} must not be negative, got {value}")))
}

/// A probability.
pub fn probability(py: Python<'_>, name: &str, value: f32) -> PyResult<f32> {
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    Err(error(py, "InvalidArgumentError", format!("{name} must be between 0 and 1, got {value}")))
}

/// Runs `work` on a drafter: as `enter`, and not while the process forks.
pub fn call<T: Send>(py: Python<'_>, detach: bool, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    if !detach && let Some(_pass) = gate::try_enter() {
        return enter(py, false, work);
    }
    enter(py, true, || {
        let _pass = gate::enter();
        work()
    })
}

/// From the first drafter on, forks wait for calls in other threads.
fn watch_forks(py: Python<'_>) -> PyResult<()> {
    static WATCHED: PyOnceLock<()> = PyOnceLock::new();
    WATCHED.get_or_try_init(py, || {
        let hooks = PyDict::new(py);
        hooks.set_item("before", wrap_pyfunction!(before_fork, py)?)?;
        hooks.set_item("after_in_parent", wrap_pyfunction!(after_fork, py)?)?;
        hooks.set_item("after_in_child", wrap_pyfunction!(after_fork_in_child, py)?)?;
        let os = py.import("os")?;
        // not on Windows
        if os.hasattr("register_at_fork")? {
            os.call_method("register_at_fork", (), Some(&hooks))?;
        }
        Ok::<(), PyErr>(())
    })?;
    Ok(())
}

#[pyfunction]
fn before_fork(py: Python<'_>) {
    py.detach(gate::close);
}

#[pyfunction]
fn after_fork() {
    gate::open();
}

#[pyfunction]
fn after_fork_in_child() {
    gate::open_in_child();
    shutdown::reset_in_child();
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
