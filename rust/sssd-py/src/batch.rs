//! Batch calls of `sssd.Drafter`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sssd_core::{Limits, MAX_NODES, make_room};
use sssd_engine::{Failure, Guide, Plan, Request, Work};

use crate::boundary::{
    LONG, call, call_cancelled, int, is_chain, node_budget, not_negative, optional_int, probability,
    request_error,
};
use crate::draft_batch::{MOST, PyDraftBatch, output};
use crate::drafter::PyDrafter;
use crate::errors::error;
use crate::guide::{Callables, Said, ask};
use crate::rows::{compared, read_row};
use crate::sequence::{PySequence, check_room};
use crate::sizing::{PySizingRule, read_sizing};
use crate::tokens::{blocks, history_into, int32, integers, integers_into, top};

/// What a batch call is to draft.
struct Asked<'a, 'py> {
    max_nodes: Option<&'a Bound<'py, PyAny>>,
    total_nodes: Option<i128>,
    min_nodes: Option<&'a Bound<'py, PyAny>>,
    max_depth: Option<&'a Bound<'py, PyAny>>,
    min_prob: f32,
    cost: Option<&'a Bound<'py, PyAny>>,
    rate: Option<f64>,
    rule: Option<&'a Bound<'py, PySizingRule>>,
    shape: &'a str,
    said: Said<'a, 'py>,
    out: Option<&'a Bound<'py, PyDraftBatch>>,
}

/// What the target has produced: flat ids and offsets, or whole rows; and the target's most probable tokens.
#[derive(Default)]
struct Produced<'a, 'py> {
    token_ids: Option<&'a Bound<'py, PyAny>>,
    offsets: Option<&'a Bound<'py, PyAny>>,
    rows: Option<&'a Bound<'py, PyAny>>,
    compare: Option<i128>,
    learn: bool,
    topk_ids: Option<&'a Bound<'py, PyAny>>,
    topk_probs: Option<&'a Bound<'py, PyAny>>,
    feedback_ids: Option<&'a Bound<'py, PyAny>>,
    feedback_probs: Option<&'a Bound<'py, PyAny>>,
}

#[pymethods]
impl PyDrafter {
    /// Appends the tokens that the target model has produced for each of many sequences, in one call.
    ///
    /// Args:
    ///     sequences: n sequences of this drafter, none twice.
    ///     token_ids: their tokens one after another, integers [m].
    ///     offsets: those of sequence i are ``token_ids[offsets[i]:offsets[i + 1]]``; integers [n+1].
    ///     topk_ids, topk_probs: as in ``Sequence.extend``, [m, k].
    ///
    /// Raises:
    ///     InvalidTokenError, InvalidArgumentError: bad input; nothing is appended to any sequence.
    ///     BatchError: sequences are closed, met an internal error or do not fit into memory; the others are extended.
    #[pyo3(signature = (sequences, token_ids, offsets, topk_ids=None, topk_probs=None))]
    fn extend_batch(
        &self,
        sequences: &Bound<'_, PyAny>,
        token_ids: &Bound<'_, PyAny>,
        offsets: &Bound<'_, PyAny>,
        topk_ids: Option<&Bound<'_, PyAny>>,
        topk_probs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (token_ids, offsets) = (Some(token_ids), Some(offsets));
        let produced = Produced { token_ids, offsets, topk_ids, topk_probs, ..Produced::default() };
        self.run(sequences, Some(&produced), None, &mut |_| ()).map(|_| ())
    }

    /// ``Sequence.follow`` for many sequences in one call.
    ///
    /// Args:
    ///     sequences: n sequences of this drafter, none twice.
    ///     rows: all tokens of each, n sequences or arrays of integers.
    ///     compare, learn: as in ``Sequence.follow``.
    ///
    /// Returns:
    ///     nodes of the last draft that the new tokens have accepted, int32 [n].
    ///
    /// Raises:
    ///     InvalidTokenError, InvalidArgumentError: bad input; no sequence is changed.
    ///     BatchError: sequences are closed, met an internal error or do not fit into memory; the others have followed.
    #[pyo3(signature = (sequences, rows, *, compare=64, learn=false))]
    fn follow_batch<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        rows: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = optional_int)] compare: Option<i128>,
        learn: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let produced = Produced { rows: Some(rows), compare, learn, ..Produced::default() };
        let mut accepted = Vec::new();
        self.run(sequences, Some(&produced), None, &mut |work| {
            work.accepted(|count| accepted.push(count as i32));
        })?;
        Ok(int32(sequences.py(), accepted).into_any())
    }

    /// Drafts for many sequences in one call. The GIL is released, and the drafter's threads share the work.
    ///
    /// Args:
    ///     sequences: n sequences of this drafter, none twice; None where nothing is to be drafted.
    ///     max_nodes: the most nodes of each tree, 0 to 1024: one number or integers [n]. 0 turns a sequence off. By
    ///         default 32, or what the ``rule`` says.
    ///     total_nodes: the most nodes of all trees together. They go to the most probable nodes, whichever sequences
    ///         these belong to. Without it every tree gets what ``Sequence.draft`` gives it.
    ///     min_nodes: nodes that a tree gets before others are considered, if it can have so many; one number or [n].
    ///     max_depth: no node is deeper; one number or [n]. ``max_length`` of a sequence holds as well.
    ///     min_prob: least probability of a node. A ``rule`` has its own.
    ///     cost: what passes cost, ``PassCosts`` or a ``CostCurve``: then all trees together are as large as pays, as
    ///         ``PassCosts.allocate`` has it, with at most ``max_nodes`` each; not together with ``total_nodes``. A
    ///         curve is read at this number of sequences and their mean length.
    ///     rate: what a second is worth then, in tokens; by default what decoding without drafts makes of it.
    ///     rule: a ``SizingRule`` in place of the two: it says how much to draft for each sequence, shares the pass out,
    ///         and learns from both.
    ///     shape: ``"tree"``, or ``"chain"`` as in ``Sequence.draft``. Chains share totals and passes as trees do: a node
    ///         where it is worth more than those of the others. See ``DraftBatch.chains``.
    ///     given, given_probs, allowed: as in ``Sequence.draft``, one for each sequence, None where there is none: lists or
    ///         arrays [n, ...], or a ``DraftBatch`` of n trees. What a callable raises is raised when the step has ended
    ///         without drafts.
    ///     out: where to put the trees; by default a new ``DraftBatch``.
    ///
    /// Returns:
    ///     ``out`` or the new ``DraftBatch``.
    ///
    /// Raises:
    ///     InvalidArgumentError: bad input, or ``out`` has not room enough for all trees at their largest; nothing is
    ///         drafted.
    ///     BatchError: sequences are closed or met an internal error. Its ``batch`` has the trees of the others.
    #[pyo3(signature = (sequences, max_nodes=None, *, total_nodes=None, min_nodes=None, max_depth=None,
                        min_prob=0.001, cost=None, rate=None, rule=None, shape="tree", given=None, given_probs=None,
                        allowed=None, out=None))]
    #[allow(clippy::too_many_arguments)]
    fn draft_batch<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        max_nodes: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = optional_int)] total_nodes: Option<i128>,
        min_nodes: Option<&Bound<'py, PyAny>>,
        max_depth: Option<&Bound<'py, PyAny>>,
        min_prob: f32,
        cost: Option<&Bound<'py, PyAny>>,
        rate: Option<f64>,
        rule: Option<&Bound<'py, PySizingRule>>,
        shape: &str,
        given: Option<&Bound<'py, PyAny>>,
        given_probs: Option<&Bound<'py, PyAny>>,
        allowed: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyDraftBatch>>,
    ) -> PyResult<Bound<'py, PyDraftBatch>> {
        let said = Said { given, given_probs, allowed };
        let asked = Asked {
            max_nodes,
            total_nodes,
            min_nodes,
            max_depth,
            min_prob,
            cost,
            rate,
            rule,
            shape,
            said,
            out,
        };
        let drafted = self.run(sequences, None, Some(&asked), &mut |_| ())?;
        drafted.ok_or_else(|| unreachable(sequences.py()))
    }

    /// One engine step in one call: the target's probabilities after the last drafts, ``extend_batch`` or
    /// ``follow_batch``, then ``draft_batch``, for each sequence in one go.
    ///
    /// Args:
    ///     token_ids, offsets: what the target has produced since the last step, as in ``extend_batch``; or
    ///     rows, compare, learn: all tokens of each sequence, as in ``follow_batch``.
    ///     feedback_ids: the target's k most probable tokens after every node of the last drafts, verified and accepted or
    ///         not, integers [n, rows, k]: row 0 of a sequence after its last token (the root), row i + 1 after node i of
    ///         its last draft; further rows are not looked at. As ``Sequence.feedback``; ``topk_ids`` are not needed then.
    ///     feedback_probs: their probabilities, floats [n, rows, k].
    ///
    ///     The others are those of ``draft_batch``.
    ///
    /// Returns, Raises:
    ///     As these.
    #[pyo3(signature = (sequences, token_ids=None, offsets=None, max_nodes=None, *, rows=None, compare=64, learn=false,
                        total_nodes=None, min_nodes=None, max_depth=None, min_prob=0.001, cost=None, rate=None,
                        rule=None, shape="tree", topk_ids=None, topk_probs=None, feedback_ids=None,
                        feedback_probs=None, given=None, given_probs=None, allowed=None, out=None))]
    #[allow(clippy::too_many_arguments)]
    fn step<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        token_ids: Option<&Bound<'py, PyAny>>,
        offsets: Option<&Bound<'py, PyAny>>,
        max_nodes: Option<&Bound<'py, PyAny>>,
        rows: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = optional_int)] compare: Option<i128>,
        learn: bool,
        #[pyo3(from_py_with = optional_int)] total_nodes: Option<i128>,
        min_nodes: Option<&Bound<'py, PyAny>>,
        max_depth: Option<&Bound<'py, PyAny>>,
        min_prob: f32,
        cost: Option<&Bound<'py, PyAny>>,
        rate: Option<f64>,
        rule: Option<&Bound<'py, PySizingRule>>,
        shape: &str,
        topk_ids: Option<&Bound<'py, PyAny>>,
        topk_probs: Option<&Bound<'py, PyAny>>,
        feedback_ids: Option<&Bound<'py, PyAny>>,
        feedback_probs: Option<&Bound<'py, PyAny>>,
        given: Option<&Bound<'py, PyAny>>,
        given_probs: Option<&Bound<'py, PyAny>>,
        allowed: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyDraftBatch>>,
    ) -> PyResult<Bound<'py, PyDraftBatch>> {
        let produced = Produced {
            token_ids,
            offsets,
            rows,
            compare,
            learn,
            topk_ids,
            topk_probs,
            feedback_ids,
            feedback_probs,
        };
        let said = Said { given, given_probs, allowed };
        let asked = Asked {
            max_nodes,
            total_nodes,
            min_nodes,
            max_depth,
            min_prob,
            cost,
            rate,
            rule,
            shape,
            said,
            out,
        };
        let drafted = self.run(sequences, Some(&produced), Some(&asked), &mut |_| ())?;
        drafted.ok_or_else(|| unreachable(sequences.py()))
    }
}

fn unreachable(py: Python<'_>) -> PyErr {
    error(py, "InternalError", "a batch that was to draft has no trees")
}

impl PyDrafter {
    fn run<'py>(
        &self,
        sequences: &Bound<'py, PyAny>,
        produced: Option<&Produced<'_, 'py>>,
        asked: Option<&Asked<'_, 'py>>,
        done: &mut dyn FnMut(&Work),
    ) -> PyResult<Option<Bound<'py, PyDraftBatch>>> {
        let py = sequences.py();
        let step = self.engine.idle_step();
        let mut work = step.lock();
        let absent = self.read_sequences(sequences, &mut work)?;
        let mut callables = Callables::new();
        let cut = produced.map_or(Ok(0), |produced| self.read_produced(produced, &mut work, py))?;
        let out = match asked {
            None => None,
            Some(asked) => {
                let most = read_plans(py, asked, &mut work)?;
                callables = self.read_said(py, &asked.said, &mut work)?;
                Some(output(py, asked.out, work.requests.len(), most)?)
            }
        };
        if let Some(repeated) = work.repeated() {
            let message = format!("sequences[{repeated}] is in the batch twice");
            return Err(error(py, "InvalidArgumentError", message));
        }
        // whatever is wrong with `out` is found before anything changes, and nothing can go wrong with it later
        let lent = out.as_ref().map(|out| out.get().lend(py)).transpose()?;
        let (long, cancelled) = (work.tokens.len() + cut > LONG, Arc::clone(&work.cancelled));
        drop(work);
        let vocab_size = self.engine.options().vocab_size;
        let ended = if long {
            let (engine, step) = (Arc::clone(&self.engine), Arc::clone(&step));
            call_cancelled(py, cancelled, move |_| engine.run(&step))?
        } else {
            call(py, true, || self.engine.run(&step))?
        };
        let asked = if ended { Ok(()) } else { ask(py, &self.engine, &step, &callables, vocab_size) };
        let work = step.lock();
        if let (Some(out), Some(lent)) = (&out, lent) {
            out.get().fill(lent, work.requests.len(), |act| work.trees(act))?;
            out.get().tell_step(&work);
        }
        done(&work);
        let failed = work.failures().filter(|failure| !absent.contains(&failure.index));
        let failures: Vec<_> = failed.collect();
        drop(work);
        self.engine.put_back(step);
        asked?;
        if failures.is_empty() {
            return Ok(out);
        }
        Err(batch_error(py, &failures, out)?)
    }

    /// Reads the sequences, and returns the places where there is none.
    fn read_sequences(&self, sequences: &Bound<'_, PyAny>, work: &mut Work) -> PyResult<Vec<usize>> {
        let py = sequences.py();
        let refuse = |message: String| error(py, "InvalidArgumentError", message);
        let mut absent = Vec::new();
        for (index, item) in sequences.try_iter()?.enumerate() {
            let item = item?;
            if item.is_none() {
                absent.push(index);
                work.requests.push(Arc::new(Request::over()));
                continue;
            }
            let Ok(sequence) = item.cast::<PySequence>() else {
                return Err(refuse(format!(
                    "sequences[{index}] must be a Sequence or None, got {}",
                    item.get_type()
                )));
            };
            let sequence = sequence.get();
            if !Arc::ptr_eq(&sequence.engine, &self.engine) {
                return Err(refuse(format!("sequences[{index}] belongs to another drafter")));
            }
            work.requests.push(sequence.request.clone());
        }
        if work.requests.len() > MOST / MAX_NODES {
            return Err(refuse(format!("a batch has at most {} sequences", MOST / MAX_NODES)));
        }
        Ok(absent)
    }

    /// Reads what is said of the drafts, and returns who is asked for rules.
    fn read_said(&self, py: Python<'_>, said: &Said<'_, '_>, work: &mut Work) -> PyResult<Callables> {
        if !said.is_any() {
            return Ok(Callables::new());
        }
        let (n, vocab_size) = (work.requests.len(), self.engine.options().vocab_size);
        let given = rows(said.given, "given", n)?;
        let probs = rows(said.given_probs, "given_probs", n)?;
        let allowed = rows(said.allowed, "allowed", n)?;
        let missing = n.saturating_sub(work.guides.len());
        make_room(&mut work.guides, missing);
        work.guides.resize_with(n.max(work.guides.len()), Guide::default);
        work.guided = true;
        let mut callables = Callables::new();
        for (at, guide) in work.guides[..n].iter_mut().enumerate() {
            let [given, given_probs, allowed] =
                [&given, &probs, &allowed].map(|rows| rows.get(at).filter(|row| !row.is_none()));
            let said = Said { given, given_probs, allowed };
            callables.push(said.read(py, vocab_size, guide)?);
        }
        Ok(callables)
    }

    /// Reads what is to be appended, and returns how many tokens are taken back before.
    fn read_produced(&self, produced: &Produced<'_, '_>, work: &mut Work, py: Python<'_>) -> PyResult<usize> {
        let refuse = |message: &str| Err(error(py, "InvalidArgumentError", message));
        work.extend = true;
        let cut = match (produced.token_ids, produced.offsets, produced.rows) {
            (Some(token_ids), Some(offsets), None) => {
                self.read_tokens(token_ids, offsets, work).map(|()| 0)?
            }
            (None, None, Some(_)) if produced.topk_ids.is_some() || produced.topk_probs.is_some() => {
                return refuse("topk_ids go with token_ids and offsets; give feedback_ids with rows");
            }
            (None, None, Some(rows)) => {
                work.learn = produced.learn;
                self.read_rows(rows, compared(py, produced.compare)?, work)?
            }
            _ => return refuse("give token_ids and offsets, or rows"),
        };
        let (vocab_size, n, m) = (self.engine.options().vocab_size, work.requests.len(), work.tokens.len());
        if let Some(top) = top(produced.topk_ids, produced.topk_probs, m, vocab_size)? {
            (work.k, work.top_ids, work.top_probs) = top.into_parts();
        }
        let feedback = blocks(produced.feedback_ids, produced.feedback_probs, n, vocab_size)?;
        if let Some((rows, feedback)) = feedback {
            work.feedback_rows = rows;
            (work.feedback_k, work.feedback_ids, work.feedback_probs) = feedback.into_parts();
        }
        Ok(cut)
    }

    fn read_tokens(
        &self,
        token_ids: &Bound<'_, PyAny>,
        offsets: &Bound<'_, PyAny>,
        work: &mut Work,
    ) -> PyResult<()> {
        check_room(&self.engine, token_ids)?;
        history_into(token_ids, self.engine.options().vocab_size, &mut work.tokens)?;
        let (n, m) = (work.requests.len(), work.tokens.len());
        let held = &mut work.offsets;
        let mut sound = true;
        integers_into(offsets, "offsets", &mut |offset: i64| {
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            sound &= offset >= held.last().copied().unwrap_or(0);
            held.push(offset);
        })?;
        if !sound || held.len() != n + 1 || held[0] != 0 || held[n] != m {
            let message = format!("offsets must be {} numbers that rise from 0 to the {m} tokens", n + 1);
            return Err(error(token_ids.py(), "InvalidArgumentError", message));
        }
        Ok(())
    }

    fn read_rows(&self, rows: &Bound<'_, PyAny>, compare: Option<usize>, work: &mut Work) -> PyResult<usize> {
        let n = work.requests.len();
        let (mut given, mut cut) = (0, 0);
        work.offsets.push(0);
        for row in rows.try_iter()? {
            let row = row?;
            if let Some(request) = work.requests.get(given) {
                // what is wrong with a sequence is found again when it is served
                let overlap = read_row(&self.engine, request, &row, compare, &mut work.tokens)?;
                let overlap = overlap.unwrap_or_default();
                cut += overlap.held - overlap.keep;
                work.keeps.push(overlap.keep);
                work.offsets.push(work.tokens.len());
            }
            given += 1;
        }
        if given != n {
            let message = format!("rows must hold the tokens of each of {n} sequences, got {given} rows");
            return Err(error(rows.py(), "InvalidArgumentError", message));
        }
        Ok(cut)
    }
}

/// The error that says which requests of a batch failed, with the trees of the others.
fn batch_error(
    py: Python<'_>,
    failures: &[Failure],
    out: Option<Bound<'_, PyDraftBatch>>,
) -> PyResult<PyErr> {
    let raised = PyDict::new(py);
    for failure in failures {
        raised.set_item(failure.index, request_error(py, &failure.error).value(py))?;
    }
    let places: Vec<_> = failures.iter().map(|failure| failure.index.to_string()).collect();
    let first = failures.first().map_or(String::new(), |failure| failure.error.to_string());
    let message = format!("sequences {} of the batch failed; first: {first}", places.join(", "));
    let raise = error(py, "BatchError", message);
    raise.value(py).setattr("failures", raised)?;
    raise.value(py).setattr("batch", out)?;
    Ok(raise)
}

/// What is said of each sequence, if anything is.
fn rows<'py>(said: Option<&Bound<'py, PyAny>>, name: &str, n: usize) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let Some(said) = said else { return Ok(Vec::new()) };
    let wrong = |got: String| {
        let message = format!("{name} must hold one item for each of {n} sequences, got {got}");
        error(said.py(), "InvalidArgumentError", message)
    };
    if let Ok(batch) = said.cast::<PyDraftBatch>() {
        let trees = (0..batch.len()?).map(|at| batch.get_item(at)).collect::<PyResult<Vec<_>>>()?;
        return if trees.len() == n { Ok(trees) } else { Err(wrong(format!("{} trees", trees.len()))) };
    }
    let items = said.try_iter().map_err(|_| wrong(said.get_type().to_string()))?;
    let items = items.take(n + 1).collect::<PyResult<Vec<_>>>()?;
    match items.len() {
        held if held == n => Ok(items),
        held => Err(wrong(if held > n { "more".into() } else { held.to_string() })),
    }
}

/// Reads what is to be drafted, and returns the most nodes that may come of it.
fn read_plans(py: Python<'_>, asked: &Asked<'_, '_>, work: &mut Work) -> PyResult<usize> {
    let refuse = |message: String| error(py, "InvalidArgumentError", message);
    work.draft = true;
    let n = work.requests.len();
    let min_prob = probability(py, "min_prob", asked.min_prob)?;
    let max_nodes = if asked.rule.is_some() { MAX_NODES } else { Limits::DEFAULT.max_nodes };
    let limits = Limits { max_nodes, min_prob, chain: is_chain(py, asked.shape)?, ..Limits::DEFAULT };
    work.plans.resize(n, Plan { min_nodes: 0, limits });
    each(asked.max_nodes, "max_nodes", work, |plan, nodes| {
        plan.limits.max_nodes = node_budget(py, "max_nodes", nodes)?;
        Ok(())
    })?;
    each(asked.min_nodes, "min_nodes", work, |plan, nodes| {
        plan.min_nodes = node_budget(py, "min_nodes", nodes)?;
        Ok(())
    })?;
    each(asked.max_depth, "max_depth", work, |plan, depth| {
        plan.limits.max_depth = not_negative(py, "max_depth", depth)?;
        Ok(())
    })?;
    let sum: usize = work.plans.iter().map(|plan| plan.limits.max_nodes).sum();
    let least: usize = work.plans.iter().map(|plan| plan.min_nodes.min(plan.limits.max_nodes)).sum();
    let most = work.plans.iter().map(|plan| plan.limits.max_nodes).max().unwrap_or(0);
    work.sizing = read_sizing(py, asked.cost, asked.rate, asked.rule, most)?;
    if work.sizing.is_some() {
        return match asked.total_nodes {
            Some(_) => Err(refuse("give total_nodes, or cost or rule, not both".into())),
            None => Ok(sum),
        };
    }
    work.total_nodes = asked.total_nodes.map(|total| not_negative(py, "total_nodes", total)).transpose()?;
    match work.total_nodes {
        Some(total) if least > total => {
            Err(refuse(format!("total_nodes is {total}, but min_nodes are {least} in all")))
        }
        Some(total) if total >= sum => {
            work.total_nodes = None;
            Ok(sum)
        }
        Some(total) => Ok(total),
        None => Ok(sum),
    }
}

/// Gives each plan its value: the same for all, or one each.
fn each(
    values: Option<&Bound<'_, PyAny>>,
    name: &str,
    work: &mut Work,
    mut set: impl FnMut(&mut Plan, i128) -> PyResult<()>,
) -> PyResult<()> {
    let Some(values) = values else { return Ok(()) };
    if let Ok(value) = int(values) {
        return work.plans.iter_mut().try_for_each(|plan| set(plan, value));
    }
    let values_read = integers(values, name)?;
    if values_read.len() != work.plans.len() {
        let message = format!("{name} must be one number or {}, got {}", work.plans.len(), values_read.len());
        return Err(error(values.py(), "InvalidArgumentError", message));
    }
    work.plans.iter_mut().zip(values_read).try_for_each(|(plan, value)| set(plan, value.into()))
}
