//! Namespaces, memory, metrics and saved state of `sssd.Drafter`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use sssd_core::MemoryFull;
use sssd_engine::{Histogram, Interrupted, StateError, StateReader, Undrafted};

use crate::boundary::{self as argument, LONG, call, call_long, memory_full, request_error};
use crate::datastore::PyDatastoreBuilder;
use crate::drafter::PyDrafter;
use crate::errors::{error, os_error};
use crate::sequence::check_room;
use crate::tokens::{history, int32};

#[pymethods]
impl PyDrafter {
    /// Bytes of memory: ``{"limit": int | None, "used": int, "peak": int, "shared": int, "sequences": int, "refused":
    /// int}``.
    ///
    /// ``used`` never exceeds ``limit``. It counts ``shared``, what namespaces hold (live stores, target's probabilities,
    /// weights, names) and what is kept to draft and step with, and ``sequences``, what each sequence holds; what forks
    /// share counts once. Not counted: the datastore, stacks of threads, and a draft or step under way. ``refused`` counts
    /// what did not fit.
    #[getter]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let memory = call(py, true, || self.engine.memory())?;
        let out = PyDict::new(py);
        out.set_item("limit", (memory.limit != usize::MAX).then_some(memory.limit))?;
        out.set_item("used", memory.used)?;
        out.set_item("peak", memory.peak)?;
        out.set_item("shared", memory.shared)?;
        out.set_item("sequences", memory.used.saturating_sub(memory.shared))?;
        out.set_item("refused", memory.refused)?;
        Ok(out)
    }

    /// Counters and histograms since the drafter was made, as plain numbers.
    ///
    /// Counters: ``begun``, ``finished``, ``failed`` sequences; ``tokens`` appended. ``datastore_lost``: 1 if a file of the
    /// mapped datastore was changed in place, so that drafts go without the store, else 0. ``undrafted``: empty drafts by
    /// reason: ``budget`` (no node was allowed, or all went to others), ``unprofitable`` (by the rule or the costs),
    /// ``indexing`` (a prompt is read in the background), ``no_match`` (no continuation was known, or the text is over).
    /// Histograms, each ``{"bounds": [...], "counts": [...], "sum": number}``: ``nodes`` of each draft whose outcome is
    /// known, and how many were ``accepted``; ``draft_seconds`` of each single draft; ``batch_seconds`` and
    /// ``batch_sequences`` of each batch call. ``counts[i]`` values are at most ``bounds[i]`` and above the bound before;
    /// bounds are always the same, the last one is infinite.
    ///
    /// A name for an exporter: ``sssd.metrics``.
    #[getter]
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metrics = self.engine.metrics();
        let out = PyDict::new(py);
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        out.set_item("begun", count(&metrics.begun))?;
        out.set_item("finished", count(&metrics.finished))?;
        out.set_item("failed", count(&metrics.failed))?;
        out.set_item("tokens", count(&metrics.tokens))?;
        let store = self.engine.store().corpus();
        out.set_item(
            "datastore_lost",
            py.detach(|| u64::from(store.is_some_and(|store| !store.is_readable()))),
        )?;
        let undrafted = PyDict::new(py);
        for (why, counter) in Undrafted::ALL.iter().zip(&metrics.undrafted) {
            undrafted.set_item(why.name(), count(counter))?;
        }
        out.set_item("undrafted", undrafted)?;
        out.set_item("nodes", histogram(py, &metrics.nodes, 1.0)?)?;
        out.set_item("accepted", histogram(py, &metrics.accepted, 1.0)?)?;
        out.set_item("draft_seconds", histogram(py, &metrics.draft_ns, 1e9)?)?;
        out.set_item("batch_seconds", histogram(py, &metrics.step_ns, 1e9)?)?;
        out.set_item("batch_sequences", histogram(py, &metrics.batch, 1.0)?)?;
        Ok(out)
    }

    /// The namespaces that are there, by name: ``{name: {"sequences": int, "live_tokens": int, "memory_bytes": int,
    /// "idle_seconds": float}}``. The default one is named ``""``.
    fn namespaces<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for info in call(py, true, || self.engine.namespaces())? {
            let entry = PyDict::new(py);
            entry.set_item("sequences", info.requests)?;
            entry.set_item("live_tokens", info.live_tokens)?;
            entry.set_item("memory_bytes", info.memory_bytes)?;
            entry.set_item("idle_seconds", info.idle.as_secs_f64())?;
            out.set_item(info.name, entry)?;
        }
        Ok(out)
    }

    /// Forgets what a namespace has learned. Its running sequences go on with what they know and hand it on to nobody.
    ///
    /// Returns:
    ///     Whether there was one of that name.
    fn remove_namespace(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = argument::name)] name: String,
    ) -> PyResult<bool> {
        call(py, true, || self.engine.remove_namespace(&name))
    }

    /// Learns a text that was decoded elsewhere, such as by another replica (``sssd.sharing``), as if a sequence that
    /// holds it had finished here: later sequences of the namespace match it. Takes about a microsecond a token, in slices
    /// between which others draft; the oldest texts make room.
    ///
    /// Args:
    ///     token_ids: any one-dimensional sequence or array of integers. Ids outside the vocabulary end a text, and the
    ///         next begins after them.
    ///     namespace: which learns; made when first named.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer.
    ///     MemoryLimitError: the text or the namespace does not fit into the limits.
    #[pyo3(
        signature = (token_ids, *, namespace=String::new()),
        text_signature = "($self, token_ids, *, namespace='')"
    )]
    fn learn(
        &self,
        token_ids: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = argument::name)] namespace: String,
    ) -> PyResult<()> {
        let py = token_ids.py();
        check_room(&self.engine, token_ids)?;
        let tokens = history(token_ids, self.engine.options().vocab_size)?;
        let engine = Arc::clone(&self.engine);
        let long = tokens.len() > LONG;
        let learn = move |interrupted: Interrupted| engine.learn(&namespace, &tokens, interrupted);
        let learned = if long { call_long(py, learn)? } else { call(py, true, || learn(&|| false))? };
        learned.map_err(|failure| request_error(py, &failure))
    }

    /// Writes what the drafter has learned from finished sequences, of all namespaces, into a folder: live stores,
    /// target's probabilities, weights. Atomic: whatever happens, the folder has the old state or the new one.
    ///
    /// Args:
    ///     folder: made if need be. It may hold one state.
    ///
    /// Raises:
    ///     OSError: the folder cannot be written.
    fn save(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        let engine = Arc::clone(&self.engine);
        let saved = call_long(py, move |interrupted| engine.save(&folder, interrupted))?;
        saved.map_err(|failure| state_error(py, &failure))
    }

    /// A drafter that knows what another one has saved.
    ///
    /// Args:
    ///     folder: as given to ``save``.
    ///     options: of the new drafter, as in ``Drafter(...)``. ``vocab_size``, ``end_token_ids``, ``live_bytes`` and
    ///         ``soft_bytes`` are those of the saved one unless given; a datastore is always to be given. What does not fit
    ///         is left out.
    ///
    /// Raises:
    ///     OSError: the file cannot be read.
    ///     CorruptStateError: it is damaged or no saved state.
    ///     StateVersionError: another release wrote it.
    ///     VocabularyMismatchError: ``vocab_size`` is not that of the saved drafter.
    ///     As ``Drafter``.
    #[staticmethod]
    #[pyo3(signature = (folder, **options))]
    fn load<'py>(
        py: Python<'py>,
        folder: PathBuf,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, Self>> {
        let opened = call_long(py, move |interrupted| StateReader::open(&folder, interrupted))?;
        let mut reader = opened.map_err(|failure| state_error(py, &failure))?;
        let state = reader.identity();
        let options = options.map_or_else(|| Ok(PyDict::new(py)), |given| given.copy())?;
        let vocab_size = (state.vocab_size > 0).then_some(state.vocab_size);
        if let (Some(given), Some(saved)) = (options.get_item("vocab_size")?, vocab_size)
            && !given.is_none()
            && given.extract::<u64>().ok() != Some(saved)
        {
            let message = format!("the saved drafter has {saved} token ids, not {given}");
            return Err(error(py, "VocabularyMismatchError", message));
        }
        let end_tokens = int32(py, state.end_tokens.iter().map(|&token| token as i32));
        for (name, value) in [
            ("vocab_size", vocab_size.into_pyobject(py)?.into_any()),
            ("end_token_ids", end_tokens.into_any()),
            ("live_bytes", state.live_bytes.into_pyobject(py)?.into_any()),
            ("soft_bytes", state.soft_bytes.into_pyobject(py)?.into_any()),
        ] {
            if !options.contains(name)? {
                options.set_item(name, value)?;
            }
        }
        let drafter = py.get_type::<Self>().call((), Some(&options))?.cast_into::<Self>()?;
        let engine = Arc::clone(&drafter.get().engine);
        let restored = call_long(py, move |interrupted| engine.restore(&mut reader, interrupted))?;
        restored.map_err(|failure| state_error(py, &failure))?;
        Ok(drafter)
    }

    /// Adds a namespace's live store to a datastore in the making, to be mapped by other processes when it is
    /// finished::
    ///
    ///     with DatastoreBuilder("learned.sssd", vocab_size=...) as builder:
    ///         drafter.freeze(builder)
    ///
    /// Returns:
    ///     The number of documents. Runs of tokens that several requests had in common are there once.
    ///
    /// Raises:
    ///     InvalidArgumentError: there is no such namespace.
    ///     As ``DatastoreBuilder.add``.
    #[pyo3(
        signature = (builder, *, namespace=String::new()),
        text_signature = "($self, builder, *, namespace='')"
    )]
    fn freeze(
        &self,
        builder: &Bound<'_, PyDatastoreBuilder>,
        #[pyo3(from_py_with = argument::name)] namespace: String,
    ) -> PyResult<usize> {
        let py = builder.py();
        let Some(held) = call(py, true, || self.engine.find_namespace(&namespace))? else {
            return Err(error(py, "InvalidArgumentError", format!("there is no namespace '{namespace}'")));
        };
        // what users have said is for nobody else to read
        builder.get().with(py, |builder| builder.make_private())?;
        let mut documents = 0;
        let added = builder.get().with(py, |builder| {
            let added: Result<(), Freeze> = held.for_each_document(|tokens, _| {
                documents += 1;
                builder.add_document(tokens).map_err(Freeze::Store)
            });
            match added {
                Err(Freeze::Store(failure)) => Err(failure),
                Err(Freeze::Memory(full)) => Ok(Some(full)),
                Ok(()) => Ok(None),
            }
        })?;
        added.map_or(Ok(documents), |full| Err(memory_full(py, &full)))
    }
}

/// Why a live store cannot become a datastore.
enum Freeze {
    Store(sssd_store::Error),
    Memory(MemoryFull),
}

impl From<MemoryFull> for Freeze {
    fn from(full: MemoryFull) -> Self {
        Self::Memory(full)
    }
}

fn histogram<'py>(py: Python<'py>, histogram: &Histogram, unit: f64) -> PyResult<Bound<'py, PyDict>> {
    let (counts, sum) = histogram.read();
    // bucket i holds values below 2^i, the last one all others
    let last = Histogram::BUCKETS - 1;
    let bound = |at: usize| if at < last { ((1u64 << at) - 1) as f64 / unit } else { f64::INFINITY };
    let out = PyDict::new(py);
    out.set_item("bounds", PyList::new(py, (0..=last).map(bound))?)?;
    out.set_item("counts", PyList::new(py, counts)?)?;
    out.set_item("sum", sum as f64 / unit)?;
    Ok(out)
}

fn state_error(py: Python<'_>, failure: &StateError) -> PyErr {
    match failure {
        StateError::Io { path, source } => os_error(path, source),
        StateError::Corrupt { .. } => error(py, "CorruptStateError", failure.to_string()),
        StateError::Version { .. } | StateError::Weights { .. } => {
            error(py, "StateVersionError", failure.to_string())
        }
        StateError::Memory(full) => memory_full(py, full),
        StateError::Interrupted => PyKeyboardInterrupt::new_err(failure.to_string()),
    }
}
