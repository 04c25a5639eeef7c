//! What callers say of drafts: ``given``, ``given_probs`` and ``allowed``.

use std::sync::Arc;

use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use sssd_core::{Given, GivenError, MAX_NODES, MAX_TOKEN, Mask, Token};
use sssd_engine::{Engine, Guide, Step};

use crate::boundary::{call, memory_full};
use crate::errors::error;
use crate::tokens::{integers, tokens};
use crate::tree::PyDraftTree;

/// Masks speak of at most so many tokens.
const MOST_TOKENS: usize = 1 << 24;

/// What is said of one draft.
#[derive(Clone, Copy, Default)]
pub struct Said<'a, 'py> {
    pub given: Option<&'a Bound<'py, PyAny>>,
    pub given_probs: Option<&'a Bound<'py, PyAny>>,
    pub allowed: Option<&'a Bound<'py, PyAny>>,
}

/// Who is asked for rules, for each request of a batch.
pub type Callables = Vec<Option<Py<PyAny>>>;

impl Said<'_, '_> {
    /// Whether anything is.
    pub fn is_any(&self) -> bool {
        self.given.is_some() || self.given_probs.is_some() || self.allowed.is_some()
    }

    /// Reads it into a guide, and returns whom to ask for further rules.
    pub fn read(
        &self,
        py: Python<'_>,
        vocab_size: Option<u32>,
        guide: &mut Guide,
    ) -> PyResult<Option<Py<PyAny>>> {
        guide.clear();
        match (self.given, self.given_probs) {
            (Some(given), probs) => read_given(given, probs, vocab_size, &mut guide.given)?,
            (None, Some(_)) => return Err(refuse(py, "given_probs go with given: give both or neither")),
            (None, None) => {}
        }
        let Some(allowed) = self.allowed else { return Ok(None) };
        if allowed.is_callable() {
            guide.allowed.set_asks(true);
            return Ok(Some(allowed.clone().unbind()));
        }
        let words = words(allowed, vocab_size)?;
        guide.allowed.insert(&[], Mask::Words(&words)).map_err(|full| memory_full(py, &full))?;
        Ok(None)
    }
}

fn refuse(py: Python<'_>, message: impl Into<String>) -> PyErr {
    error(py, "InvalidArgumentError", message.into())
}

fn read_given(
    given: &Bound<'_, PyAny>,
    probs: Option<&Bound<'_, PyAny>>,
    vocab_size: Option<u32>,
    out: &mut Given,
) -> PyResult<()> {
    let py = given.py();
    let limit = vocab_size.map_or(MAX_TOKEN, |size| size - 1);
    if let Ok(tree) = given.cast::<PyDraftTree>() {
        if probs.is_some() {
            return Err(refuse(py, "given is a tree, which has its own probs: leave given_probs out"));
        }
        let tree = &tree.get().0;
        if let Some(&token) = tree.token_ids.iter().find(|&&token| token > limit) {
            return Err(outside(py, i64::from(token), limit));
        }
        return out.push_tree(tree).map_err(|problem| given_error(py, &problem));
    }
    if let Ok(chain) = integers(given, "given") {
        return push_chain(py, &chain, probs, limit, out);
    }
    let mut rows = probs.map(|probs| probs.try_iter()).transpose()?;
    for (index, chain) in given.try_iter().map_err(|_| not_given(given))?.enumerate() {
        if index > MAX_NODES {
            return Err(given_error(py, &GivenError::Size));
        }
        let chain = integers(&chain?, "each chain of given")?;
        let probs = match &mut rows {
            None => None,
            Some(rows) => match rows.next() {
                Some(row) => Some(row?),
                None => return Err(refuse(py, "given_probs must hold a row for each chain of given")),
            },
        };
        push_chain(py, &chain, probs.as_ref(), limit, out)?;
    }
    match rows.and_then(|mut rows| rows.next()) {
        Some(_) => Err(refuse(py, "given_probs must hold a row for each chain of given, and no more")),
        None => Ok(()),
    }
}

fn not_given(given: &Bound<'_, PyAny>) -> PyErr {
    let message = format!(
        "given must be a DraftTree, a chain of token ids, or several chains, got {}",
        given.get_type()
    );
    refuse(given.py(), message)
}

/// Adds a chain, which ends before its first negative id.
fn push_chain(
    py: Python<'_>,
    chain: &[i64],
    probs: Option<&Bound<'_, PyAny>>,
    limit: Token,
    out: &mut Given,
) -> PyResult<()> {
    let probs = probs.map(|probs| floats(probs, chain.len())).transpose()?;
    let length = chain.iter().position(|&id| id < 0).unwrap_or(chain.len());
    if length > MAX_NODES {
        return Err(given_error(py, &GivenError::Size));
    }
    let mut read = Vec::with_capacity(length);
    for &id in &chain[..length] {
        let token = Token::try_from(id).ok().filter(|&token| token <= limit);
        read.push(token.ok_or_else(|| outside(py, id, limit))?);
    }
    out.push_chain(&read, probs.as_deref()).map_err(|problem| given_error(py, &problem))
}

/// As many probabilities as a chain has tokens.
fn floats(probs: &Bound<'_, PyAny>, count: usize) -> PyResult<Vec<f32>> {
    let py = probs.py();
    let wrong =
        |got: String| refuse(py, format!("given_probs must hold {count} floats for its chain, got {got}"));
    let array = py.import("numpy")?.call_method1("asarray", (probs, "float32"));
    let array = array.map_err(|problem| wrong(problem.to_string()))?;
    let array = array.cast::<PyArray1<f32>>().map_err(|_| wrong(probs.get_type().to_string()))?;
    let read = array.to_vec()?;
    if read.len() == count { Ok(read) } else { Err(wrong(read.len().to_string())) }
}

fn outside(py: Python<'_>, id: i64, limit: Token) -> PyErr {
    error(py, "InvalidTokenError", format!("given holds the id {id}; ids must be between 0 and {limit}"))
}

fn given_error(py: Python<'_>, problem: &GivenError) -> PyErr {
    match problem {
        GivenError::Memory(full) => memory_full(py, full),
        problem => refuse(py, problem.to_string()),
    }
}

/// The words of a mask.
fn words(mask: &Bound<'_, PyAny>, vocab_size: Option<u32>) -> PyResult<Vec<u32>> {
    let py = mask.py();
    if mask.is_instance_of::<PyList>() || mask.is_instance_of::<PyTuple>() {
        return id_words(mask, vocab_size);
    }
    let wrong = |got: String| {
        let message = format!(
            "allowed must be bools [vocabulary], 32-bit words [vocabulary / 32] with a bit for each token, a list of \
             ids, or a callable, got {got}"
        );
        refuse(py, message)
    };
    let array = py.import("numpy")?.call_method1("ascontiguousarray", (mask,));
    let array = array.map_err(|problem| wrong(problem.to_string()))?;
    let (held, bits) = if let Ok(bools) = array.cast::<PyArray1<bool>>() {
        let bools = bools.to_vec()?;
        let mut words = vec![0; bools.len().div_ceil(32)];
        bools.iter().enumerate().for_each(|(at, &bit)| words[at / 32] |= u32::from(bit) << (at % 32));
        (words, bools.len())
    } else if let Ok(words) = array.cast::<PyArray1<i32>>() {
        let words: Vec<u32> = words.to_vec()?.into_iter().map(|word| word as u32).collect();
        let bits = 32 * words.len();
        (words, bits)
    } else if let Ok(words) = array.cast::<PyArray1<u32>>() {
        let words = words.to_vec()?;
        let bits = 32 * words.len();
        (words, bits)
    } else {
        return Err(wrong(format!("{} of {}", array.get_type(), array.getattr("dtype")?)));
    };
    if bits > MOST_TOKENS || vocab_size.is_some_and(|size| bits < size as usize) {
        let message = format!(
            "allowed speaks of {bits} tokens; it must be of the vocabulary's {} at least, and of at most {MOST_TOKENS}",
            vocab_size.unwrap_or(0)
        );
        return Err(refuse(py, message));
    }
    Ok(held)
}

fn id_words(ids: &Bound<'_, PyAny>, vocab_size: Option<u32>) -> PyResult<Vec<u32>> {
    let py = ids.py();
    let ids = tokens(ids, vocab_size)?;
    let most = ids.iter().max().map_or(0, |&id| id as usize + 1);
    if most > MOST_TOKENS {
        return Err(refuse(py, format!("allowed must hold ids below {MOST_TOKENS}, got {}", most - 1)));
    }
    let mut words = vec![0; most.div_ceil(32)];
    ids.iter().for_each(|&id| words[id as usize / 32] |= 1 << (id % 32));
    Ok(words)
}

/// Asks for the rules that the drafts of a step lack, and has it go on, until they lack none. Nothing is locked while
/// Python is asked. What it raises is raised when the step has ended without drafts.
pub fn ask(
    py: Python<'_>,
    engine: &Engine,
    step: &Arc<Step>,
    callables: &Callables,
    vocab_size: Option<u32>,
) -> PyResult<()> {
    loop {
        let answered = answer(py, step, callables, vocab_size);
        if let Err(raised) = answered {
            call(py, true, || engine.give_up(step))?;
            return Err(raised);
        }
        if call(py, true, || engine.resume(step))? {
            return Ok(());
        }
    }
}

fn answer(py: Python<'_>, step: &Arc<Step>, callables: &Callables, vocab_size: Option<u32>) -> PyResult<()> {
    // copied, for the callables may do what they like
    let places = step.lock().places().0.to_vec();
    let mut answered = false;
    for (item, path) in &places {
        // a path that what was answered meanwhile forbids is none
        if !step.lock().places().1.get(*item).is_some_and(|guide| guide.allowed.permits(path)) {
            continue;
        }
        let rule = match callables.get(*item).and_then(Option::as_ref) {
            Some(callable) => callable.bind(py).call1((PyTuple::new(py, path)?,))?,
            None => py.None().into_bound(py),
        };
        let words = if rule.is_none() { None } else { Some(words(&rule, vocab_size)?) };
        let mask = words.as_deref().map_or(Mask::Anything, Mask::Words);
        if let Some(guide) = step.lock().places().1.get_mut(*item) {
            guide.allowed.insert(path, mask).map_err(|full| memory_full(py, &full))?;
            answered = true;
        }
    }
    // the first place is always one that the rules permit: without an answer this would go on for ever
    if answered {
        return Ok(());
    }
    Err(error(py, "InternalError", "a draft lacks rules that none can give; please report it"))
}
