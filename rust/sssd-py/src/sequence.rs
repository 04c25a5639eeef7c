//! `sssd.Sequence`.

use std::sync::Arc;
use std::thread;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use sssd_core::{DraftTree, Limits, Model, Sequence, Token, room_for_a_thread};
use sssd_engine::{Engine, Guide, Plan, Request, Sizing, gate};

use crate::boundary::{
    LONG, call, call_long, int, is_chain, memory_full, node_budget, not_negative, optional_int, probability,
    request_error, wait_for, with_request,
};
use crate::corpora::Corpora;
use crate::errors::error;
use crate::guide::{Said, ask};
use crate::rows::{compared, read_row};
use crate::sizing::{PySizingRule, read_sizing};
use crate::tokens::{Top, history, shown, top};
use crate::tree::PyDraftTree;

/// Longer extensions release the GIL; for a few tokens that would cost more than the work.
const DETACH_TOKENS: usize = 256;

/// The key of the weights in a state dict; names what they fit.
pub const WEIGHTS: &str = "weights.v2";

pub fn state_dict<'py>(py: Python<'py>, model: &Model) -> PyResult<Bound<'py, PyDict>> {
    let state = PyDict::new(py);
    let bytes = model.to_bytes().map_err(|full| memory_full(py, &full))?;
    state.set_item(WEIGHTS, PyBytes::new(py, &bytes))?;
    Ok(state)
}

/// One request's tokens and their index. Made by ``Drafter.begin``; a context manager that finishes the sequence, or
/// closes it on an exception.
///
/// Calls from several threads are safe and take turns.
#[pyclass(frozen, name = "Sequence", module = "sssd")]
pub struct PySequence {
    pub request: Arc<Request>,
    pub engine: Arc<Engine>,
    pub corpora: Arc<Corpora>,
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
        let py = token_ids.py();
        let tokens = self.read(token_ids)?;
        let top = top(topk_ids, topk_probs, tokens.len(), self.engine.options().vocab_size)?;
        let done = if tokens.len() > LONG || self.request.is_busy() {
            let (engine, request) = self.parts();
            call_long(py, move |interrupted| {
                engine.extend(&request, &tokens, top.as_ref().map(Top::view), interrupted)
            })?
        } else {
            let top = top.as_ref().map(Top::view);
            let detach = tokens.len() > DETACH_TOKENS;
            call(py, detach, || self.engine.extend(&self.request, &tokens, top, &|| false))?
        };
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
        let py = token_ids.py();
        let tokens = self.read(token_ids)?;
        let done = if tokens.len() > LONG || self.request.is_busy() {
            let request = Arc::clone(&self.request);
            call_long(py, move |interrupted| request.prefill(&tokens, interrupted))?
        } else {
            call(py, tokens.len() > DETACH_TOKENS, || self.request.prefill(&tokens, &|| false))?
        };
        done.map_err(|failure| request_error(py, &failure))
    }

    /// Makes the sequence that of a whole row, as an engine has it now: keeps the first tokens that the two share, takes
    /// back what it has beyond them, and appends the rest of the row as ``extend`` does. Where they share none it begins
    /// anew with the row as its prompt: with the same namespace, ``max_length`` and end tokens, and no prediction.
    ///
    /// Only the end of what both have is read and compared, as engines change rows nowhere else: the time does not depend
    /// on the length of the text. Where the ends differ, all is compared.
    ///
    /// Args:
    ///     token_ids: all tokens of the request, any one-dimensional sequence or array of integers.
    ///     compare: how many tokens at the end of what both have are compared; None for all.
    ///     learn: whether other requests learn from a text that is begun anew, as by ``finish``.
    ///
    /// Returns:
    ///     nodes of the last draft that the new tokens have accepted.
    ///
    /// Raises:
    ///     InvalidTokenError, InvalidArgumentError: an id is not an integer, or ``compare`` is negative; nothing changes.
    ///     MemoryLimitError: the row does not fit into the limits. The sequence then holds what the two share.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (token_ids, *, compare=64, learn=false))]
    fn follow(
        &self,
        token_ids: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = optional_int)] compare: Option<i128>,
        learn: bool,
    ) -> PyResult<usize> {
        let (py, mut new) = (token_ids.py(), Vec::new());
        let compare = compared(py, compare)?;
        let common = read_row(&self.engine, &self.request, token_ids, compare, &mut new)?
            .map_err(|failure| request_error(py, &failure))?;
        let (keep, cut) = (common.keep, common.held - common.keep);
        let done = if new.len() > LONG || cut > LONG || self.request.is_busy() {
            let (engine, request) = self.parts();
            call_long(py, move |interrupted| engine.follow(&request, keep, &new, learn, interrupted))?
        } else {
            let detach = new.len() + cut > DETACH_TOKENS;
            call(py, detach, || self.engine.follow(&self.request, keep, &new, learn, &|| false))?
        };
        done.map_err(|failure| request_error(py, &failure))
    }

    /// Forgets all tokens, as if the sequence had just begun without a prompt: with the same namespace, ``max_length`` and
    /// end tokens, and no prediction.
    ///
    /// Args:
    ///     learn: whether other requests learn from the text, as by ``finish``.
    ///
    /// Raises:
    ///     MemoryLimitError: there is no memory for another sequence; nothing changes.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (*, learn=false))]
    fn clear(&self, py: Python<'_>, learn: bool) -> PyResult<()> {
        let request = Arc::clone(&self.request);
        let done = if self.is_long(py)? {
            call_long(py, move |interrupted| request.clear(learn, interrupted))?
        } else {
            call(py, true, || request.clear(learn, &|| false))?
        };
        done.map_err(|failure| request_error(py, &failure))
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
    fn truncate(&self, py: Python<'_>, #[pyo3(from_py_with = int)] length: i128) -> PyResult<()> {
        let held = self.with(py, false, |sequence| sequence.tokens().len())?;
        let Some(length) = usize::try_from(length).ok().filter(|&length| length <= held) else {
            let message = format!("length must be between 0 and the sequence's {held} tokens, got {length}");
            return Err(error(py, "InvalidArgumentError", message));
        };
        let done = if held - length > LONG {
            let request = Arc::clone(&self.request);
            call_long(py, move |interrupted| request.truncate(length, interrupted))?
        } else {
            call(py, true, || self.request.truncate(length, &|| false))?
        };
        done.map_err(|failure| request_error(py, &failure))
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
        let (engine, request) = self.parts();
        let fork = if self.is_long(py)? {
            call_long(py, move |_| engine.fork(&request))?
        } else {
            call(py, true, || engine.fork(&request))?
        };
        let request = fork.map_err(|failure| request_error(py, &failure))?;
        Ok(Self { request, engine: Arc::clone(&self.engine), corpora: Arc::clone(&self.corpora) })
    }

    /// Whether the prompt is indexed; see ``Drafter.begin(background=True)``.
    ///
    /// Raises:
    ///     ClosedError: the sequence is closed.
    #[getter]
    fn ready(&self, py: Python<'_>) -> PyResult<bool> {
        wait_for(py, &self.request)?;
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
        let top =
            top(Some(topk_ids), Some(topk_probs), tree_ref.len() + 1, self.engine.options().vocab_size)?;
        match top {
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
    ///     shape: ``"tree"``, or ``"chain"`` for verifiers that take no trees: after each token the most probable one, a
    ///         path of at most ``max_nodes`` nodes.
    ///     given: what another drafter proposes: a ``DraftTree``, a chain of token ids (which ends before the first negative
    ///         one) or several chains; at most 1024 nodes. Of each place the first 64 tokens are heard. It is one more
    ///         source: how far it is trusted is learned, its leaves are extended, and useless ones fade.
    ///     given_probs: of each token of a chain its probability given those before it, floats of the same shape. A tree has
    ///         its own; if all of these are 0, or none are given, they are learned by depth and rank.
    ///     allowed: which tokens may follow: bools [vocabulary], 32-bit words [vocabulary / 32] (bit ``t % 32`` of word
    ///         ``t // 32`` for token t) or a list of ids, for the first place; or a callable that gets the tuple of a
    ///         path's tokens, () first, and returns such a mask for what follows it, or None for anything. Nothing else
    ///         is drafted, and what is forced is. The callable is asked for each node that is worth it, and some more.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``max_nodes``, ``min_prob``, ``max_depth`` or ``rate`` is out of range, ``cost`` or
    ///         ``shape`` is neither, there is a ``rate`` without it, or a ``rule`` as well; ``given``, ``given_probs`` or
    ///         ``allowed`` is none.
    ///     InvalidTokenError: an id of ``given`` or ``allowed`` is outside the vocabulary.
    ///     ClosedError: the sequence is closed.
    #[pyo3(signature = (max_nodes=32, *, min_prob=0.001, max_depth=None, cost=None, rate=None, rule=None,
                        shape="tree", given=None, given_probs=None, allowed=None))]
    #[allow(clippy::too_many_arguments)]
    fn draft<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = int)] max_nodes: i128,
        min_prob: f32,
        #[pyo3(from_py_with = optional_int)] max_depth: Option<i128>,
        cost: Option<&Bound<'py, PyAny>>,
        rate: Option<f64>,
        rule: Option<&Bound<'py, PySizingRule>>,
        shape: &str,
        given: Option<&Bound<'py, PyAny>>,
        given_probs: Option<&Bound<'py, PyAny>>,
        allowed: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<PyDraftTree> {
        let max_nodes = node_budget(py, "max_nodes", max_nodes)?;
        let min_prob = probability(py, "min_prob", min_prob)?;
        let max_depth = max_depth.map_or(Ok(usize::MAX), |depth| not_negative(py, "max_depth", depth))?;
        let limits =
            Limits { max_nodes, max_depth, min_prob, chain: is_chain(py, shape)?, ..Limits::DEFAULT };
        let sizing = read_sizing(py, cost, rate, rule, max_nodes)?;
        let (said, mut guide) = (Said { given, given_probs, allowed }, Guide::default());
        let callable = said.read(py, self.engine.options().vocab_size, &mut guide)?;
        wait_for(py, &self.request)?;
        if callable.is_some() {
            return self.draft_ruled(py, Plan { min_nodes: 0, limits }, sizing, guide, callable);
        }
        let tree = call(py, true, || self.engine.draft_with(&self.request, limits, sizing.as_ref(), &guide))?;
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
    fn cut_draft(&self, py: Python<'_>, #[pyo3(from_py_with = int)] nodes: i128) -> PyResult<()> {
        let nodes = not_negative(py, "nodes", nodes)?;
        self.with(py, false, |sequence| sequence.cut_draft(nodes))
    }

    /// Hands the tokens so far to the live store, for other sequences of the drafter. ``finish`` does it by itself.
    ///
    /// Raises:
    ///     ClosedError: the sequence is closed.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        let done = if self.is_long(py)? {
            let request = Arc::clone(&self.request);
            call_long(py, move |interrupted| request.commit(interrupted))?
        } else {
            call(py, true, || self.request.commit(&|| false))?
        };
        done.map_err(|failure| request_error(py, &failure))
    }

    /// Ends the request and frees the sequence. Later sequences of the drafter learn from it: its tokens go to the
    /// live store and what the predictor has learned is merged. Finishing or closing again does nothing.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        let (engine, request) = self.parts();
        let done = if self.is_long(py)? {
            call_long(py, move |interrupted| engine.finish(&request, interrupted))?
        } else {
            call(py, true, || engine.finish(&request, &|| false))?
        };
        done.map_err(|failure| request_error(py, &failure))
    }

    /// Frees the sequence; nothing is learned from it, as after an abort. Further calls raise ``ClosedError``; closing
    /// again does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        wait_for(py, &self.request)?;
        call(py, true, || self.request.close())
    }

    /// Whether ``close`` has been called.
    #[getter]
    fn closed(&self, py: Python<'_>) -> PyResult<bool> {
        wait_for(py, &self.request)?;
        call(py, true, || self.request.closed())
    }

    /// All tokens so far, int32 [len].
    #[getter]
    fn token_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let ids: Vec<i32> =
            self.with(py, true, |sequence| sequence.tokens().iter().map(|&token| shown(token)).collect())?;
        Ok(PyArray1::from_vec(py, ids))
    }

    /// The name of its namespace.
    #[getter]
    fn namespace(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, false, |sequence| sequence.namespace().to_string())
    }

    /// What the predictor has learned so far in this sequence, for ``Drafter.load_state_dict``.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let model = self.with(py, true, |sequence| sequence.model())?;
        let model = model.map_err(|full| memory_full(py, &full))?;
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
    /// Tokens that may fit into memory: those that cannot are not even copied.
    fn read(&self, token_ids: &Bound<'_, PyAny>) -> PyResult<Vec<Token>> {
        check_room(&self.engine, token_ids)?;
        history(token_ids, self.engine.options().vocab_size)
    }

    fn parts(&self) -> (Arc<Engine>, Arc<Request>) {
        (Arc::clone(&self.engine), Arc::clone(&self.request))
    }

    /// Drafts within rules that are asked for, as a step of one request.
    fn draft_ruled(
        &self,
        py: Python<'_>,
        plan: Plan,
        sizing: Option<Sizing>,
        guide: Guide,
        callable: Option<Py<PyAny>>,
    ) -> PyResult<PyDraftTree> {
        let step = self.engine.idle_step();
        {
            let mut work = step.lock();
            work.requests.push(Arc::clone(&self.request));
            work.plans.push(plan);
            (work.draft, work.guided, work.sizing) = (true, true, sizing);
            work.guides.clear();
            work.guides.push(guide);
        }
        let mut done = Ok(());
        if !call(py, true, || self.engine.run(&step))? {
            done = ask(py, &self.engine, &step, &vec![callable], self.engine.options().vocab_size);
        }
        let mut tree = DraftTree::default();
        let work = step.lock();
        work.trees(|_, drafted| tree.copy_from(drafted));
        let failure = work.failures().next();
        drop(work);
        self.engine.put_back(step);
        done?;
        match failure {
            Some(failure) => Err(request_error(py, &failure.error)),
            None => Ok(PyDraftTree(tree)),
        }
    }

    /// Whether work on all of its tokens takes long, or there is other work to be done first.
    fn is_long(&self, py: Python<'_>) -> PyResult<bool> {
        let long = call(py, false, || self.request.try_with(|sequence| sequence.tokens().len() > LONG))?;
        Ok(long.map_or(true, |long| long.unwrap_or(false)))
    }

    /// Runs `work` on the sequence, without the GIL if `detach` or if there is anything to be done first.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        detach: bool,
        work: impl FnOnce(&mut Sequence) -> T + Send,
    ) -> PyResult<T> {
        with_request(py, &self.request, detach, work)?.map_err(|failure| request_error(py, &failure))
    }
}

/// Longer sequences are freed in a thread of their own: it takes milliseconds, and this one has the GIL.
const FREED_APART: usize = 1 << 18;

impl Drop for PySequence {
    fn drop(&mut self) {
        let long = |sequence: &mut Sequence| sequence.tokens().len() > FREED_APART;
        if Arc::strong_count(&self.request) == 1
            && matches!(self.request.try_with(long), Ok(Ok(true)) | Err(_))
        {
            let request = Arc::clone(&self.request);
            if !room_for_a_thread() {
                return;
            }
            let freed = thread::Builder::new().name("sssd-free".into()).spawn(move || {
                let _pass = gate::enter();
                request.close();
            });
            drop(freed);
        }
    }
}

/// Refuses tokens that would not fit into memory, before they are copied.
pub fn check_room(engine: &Engine, token_ids: &Bound<'_, PyAny>) -> PyResult<()> {
    match token_ids.len() {
        Ok(count) if count > LONG => {
            engine.may_hold(count).map_err(|full| memory_full(token_ids.py(), &full))
        }
        _ => Ok(()),
    }
}
