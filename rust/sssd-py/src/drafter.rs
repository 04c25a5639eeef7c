//! `sssd.Drafter`.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use sssd_core::{Limits, MAX_TOKEN, Model, Namespace, SOURCES, WeightsError};
use sssd_engine::{Engine, Interrupted, Options, Request};

use crate::boundary::{
    LONG, bytes, call, call_long, memory_full, name, not_negative, optional_bytes, optional_int,
    request_error, watch_forks,
};
use crate::corpora::{self, Corpora, union_of};
use crate::datastore::PyDatastore;
use crate::errors::{error, raised};
use crate::sequence::{PySequence, WEIGHTS, check_room, state_dict};
use crate::tokens::{history, int32, tokens};

/// The defaults in Python's signatures are the core's.
const _: () = assert!(Limits::DEFAULT.max_nodes == 32 && Limits::DEFAULT.min_prob == 0.001);

/// Drafts continuations of token sequences. One drafter serves any number of sequences and threads.
///
/// Its sequences learn from one another: from what ``Sequence.finish`` and ``commit`` hand over, and from the target's
/// probabilities given to ``extend`` and ``feedback``.
///
/// Args:
///     vocab_size: number of token ids; ids outside are refused everywhere. Any id below 2^31 if left out.
///     end_token_ids: tokens that end a sequence; nothing is drafted after one.
///     datastore: a corpus to match as well: a path, several paths that are one store, the folder of a corpus, or an open
///         ``Datastore`` (which may be closed afterwards). Or several by name, a mapping from names to such: sequences
///         match all of them, or those that ``begin(datastores=...)`` names.
///     load: how to open paths, ``"mmap"``, ``"mmap-wait"`` or ``"ram"``; see ``Datastore.open``.
///     ranking: rank the candidates of probable nodes anew where the datastore has tables for it (``DatastoreBuilder``):
///         more accepted tokens for some microseconds a draft. Without such tables nothing changes.
///     live_bytes: memory that the tokens of finished requests (the live store) may come to take in each namespace, about
///         42 bytes a token; 0 keeps none. Every size is a number or text such as ``"512M"`` (K, M, G, T: powers of
///         1024).
///     soft_bytes: the same for the target's own most probable tokens; 0 keeps none.
///     max_bytes: limit of all memory. No limit if left out. See ``memory``.
///     max_sequence_bytes: limit of each sequence's memory.
///     threads: threads of a batch call, the caller's included; by default the number of cores, at most 8. They are
///         started when first needed.
///     namespace_ttl: seconds after which a named namespace without sequences is forgotten; never if left out.
///
/// Raises:
///     InvalidArgumentError: ``vocab_size`` is not in 1..2^31, or a size is negative.
///     InvalidTokenError: an end token is outside the vocabulary.
///     VocabularyMismatchError: a datastore has more token ids than ``vocab_size``, or datastores differ in vocabulary or
///         tokenizer.
///     OSError, DatastoreError: the datastore cannot be opened.
///     MemoryLimitError: ``max_bytes`` is less than a drafter takes.
#[pyclass(frozen, name = "Drafter", module = "sssd")]
pub struct PyDrafter {
    pub engine: Arc<Engine>,
    pub corpora: Arc<Corpora>,
}

#[pymethods]
impl PyDrafter {
    #[new]
    #[pyo3(signature = (*, vocab_size=None, end_token_ids=None, datastore=None, load="mmap",
                        ranking=true, live_bytes=67_108_864, soft_bytes=16_777_216, max_bytes=None,
                        max_sequence_bytes=None, threads=None, namespace_ttl=None))]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = optional_int)] vocab_size: Option<i128>,
        end_token_ids: Option<&Bound<'_, PyAny>>,
        datastore: Option<&Bound<'_, PyAny>>,
        load: &str,
        ranking: bool,
        #[pyo3(from_py_with = bytes)] live_bytes: i128,
        #[pyo3(from_py_with = bytes)] soft_bytes: i128,
        #[pyo3(from_py_with = optional_bytes)] max_bytes: Option<i128>,
        #[pyo3(from_py_with = optional_bytes)] max_sequence_bytes: Option<i128>,
        #[pyo3(from_py_with = optional_int)] threads: Option<i128>,
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
        let named =
            datastore.map(|datastore| corpora::open(datastore, load)).transpose()?.unwrap_or_default();
        corpora::check(py, &named, vocab_size)?;
        let store = corpora::union(&named, None).map_err(|failure| raised(py, failure))?;
        let limit =
            |name: &str, limit: Option<i128>| limit.map_or(Ok(usize::MAX), |limit| size(py, name, limit));
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
            vocab_size,
            end_tokens,
            store,
            ranking,
            live_bytes: size(py, "live_bytes", live_bytes)?,
            soft_bytes: size(py, "soft_bytes", soft_bytes)?,
            max_bytes: limit("max_bytes", max_bytes)?,
            max_request_bytes: limit("max_sequence_bytes", max_sequence_bytes)?,
            threads,
            namespace_ttl,
        };
        let engine = Engine::new(options).map_err(|full| memory_full(py, &full))?;
        watch_forks(py)?;
        let corpora = Corpora::new(named, engine.store(), vocab_size);
        Ok(Self { engine: Arc::new(engine), corpora: Arc::new(corpora) })
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
    ///     datastores: names of those of the drafter's datastores that this sequence and its forks match; none if empty, all
    ///         by default. A datastore that was given alone is named ``""``.
    ///     end_token_ids: tokens that end this sequence, at most 256, in place of the drafter's; none if empty.
    ///     background: return at once and let another thread index the prompt. Until it is done ``ready`` is False and
    ///         drafts are empty; other calls wait. With ``threads=1`` the first of these does the work.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer, or an end token is outside the vocabulary.
    ///     InvalidArgumentError: ``max_length`` is negative, there is no datastore of a name, or there are more end tokens.
    ///     MemoryLimitError: the sequence or its namespace does not fit into the limits.
    #[pyo3(
        signature = (prompt_ids, prediction=None, *, namespace=String::new(), max_length=None, datastores=None,
                     end_token_ids=None, background=false),
        text_signature = "($self, prompt_ids, prediction=None, *, namespace='', max_length=None, datastores=None, \
                          end_token_ids=None, background=False)"
    )]
    #[allow(clippy::too_many_arguments)]
    fn begin(
        &self,
        prompt_ids: &Bound<'_, PyAny>,
        prediction: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = name)] namespace: String,
        #[pyo3(from_py_with = optional_int)] max_length: Option<i128>,
        datastores: Option<&Bound<'_, PyAny>>,
        end_token_ids: Option<&Bound<'_, PyAny>>,
        background: bool,
    ) -> PyResult<PySequence> {
        let py = prompt_ids.py();
        let names = datastores.map_or(Ok(None), corpora::names)?;
        let chosen = names.map_or(Ok(None), |names| self.corpora.choose(py, names))?;
        let end_tokens =
            end_token_ids.map(|ids| tokens(ids, self.engine.options().vocab_size)).transpose()?;
        if let Some(count) = end_tokens.as_ref().map(Vec::len).filter(|&count| count > MOST_END_TOKENS) {
            let message = format!("end_token_ids must be at most {MOST_END_TOKENS}, got {count}");
            return Err(error(py, "InvalidArgumentError", message));
        }
        check_room(&self.engine, prompt_ids)?;
        let prompt = history(prompt_ids, self.engine.options().vocab_size)?;
        let prediction = match prediction {
            None => Vec::new(),
            Some(prediction) => {
                check_room(&self.engine, prediction)?;
                history(prediction, self.engine.options().vocab_size)?
            }
        };
        let max_length = max_length.map(|length| not_negative(py, "max_length", length)).transpose()?;
        let engine = Arc::clone(&self.engine);
        let long = prediction.len() > LONG || (prompt.len() > LONG && !background);
        let begin = move |interrupted: Interrupted| {
            if background {
                engine.begin_in_background(&namespace, prompt, &prediction, max_length, interrupted)
            } else {
                engine.begin(&namespace, &prompt, &prediction, max_length, interrupted)
            }
        };
        let begun = if long { call_long(py, begin)? } else { call(py, true, || begin(&|| false))? };
        let request = begun.map_err(|failure| request_error(py, &failure))?;
        if let Some(store) = &chosen {
            call(py, true, || request.set_store(store))?.map_err(|failure| request_error(py, &failure))?;
        }
        if let Some(end_tokens) = end_tokens {
            let set = call(py, true, || request.set_end_tokens(&end_tokens))?;
            set.map_err(|failure| request_error(py, &failure))?;
        }
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
        state_dict(py, &self.default(py)?.with_model(Model::clone))
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
        let py = state.py();
        let drafter = self.default(py)?;
        let set = weights.map(|weights| drafter.set_weights(weights.as_bytes()));
        match set {
            Some(Ok(())) => Ok(()),
            Some(Err(WeightsError::Memory(full))) => Err(memory_full(py, &full)),
            _ => {
                let message = "state must be what state_dict of this release returned";
                Err(error(py, "InvalidArgumentError", message))
            }
        }
    }

    /// Forgets all that was learned: live stores, the target's probabilities and weights of every namespace, as if the
    /// drafter were new. Sequences that run go on with what they know, and hand it on to nobody. The datastore stays.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        let engine = Arc::clone(&self.engine);
        call_long(py, move |_| engine.forget())
    }

    /// Forgets the default namespace's weights: sequences begun from now on start with those that ship with sssd. The
    /// live store stays; see ``clear``.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.default(py)?.reset_model();
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

    /// Opens the datastores anew, as they are now in the same places (of a corpus: its newest version), or others, and has
    /// drafts match them from the next one on, those of running sequences too. Each draft goes by one version; nobody
    /// waits meanwhile. What a sequence has chosen stays chosen; names that are gone match nothing. The files of the old
    /// version are closed when nobody uses them any more.
    ///
    /// Args:
    ///     datastore: others, as in ``Drafter(datastore=...)``.
    ///     load: how to open them, if they are given; else it stays as it was.
    ///
    /// Returns:
    ///     Whether anything has changed. If not, only headers have been read.
    ///
    /// Raises:
    ///     VocabularyMismatchError: vocabulary or tokenizer is not that of the datastores before, or of the drafter.
    ///     OSError, DatastoreError: a datastore cannot be opened.
    ///
    /// After an error everything is as it was.
    #[pyo3(signature = (datastore=None, *, load="mmap"))]
    fn reopen(&self, py: Python<'_>, datastore: Option<&Bound<'_, PyAny>>, load: &str) -> PyResult<bool> {
        self.corpora.reopen(py, datastore.map(|datastore| (datastore, load)))
    }

    /// What sequences match by default: all datastores as one, open for look-up, or None. Closing it does not take it from
    /// the drafter.
    #[getter]
    fn datastore(&self, py: Python<'_>) -> PyResult<Option<PyDatastore>> {
        let store = union_of(&self.corpora.named(), None).map_err(|failure| raised(py, failure))?;
        Ok(store.map(|store| PyDatastore::new(store, None)))
    }

    /// The datastores by name, without corpora that are empty; ``""`` is one that was given alone.
    #[getter]
    fn datastores<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for (name, named) in self.corpora.named() {
            if let Some(store) = named.store {
                out.set_item(name, PyDatastore::new(store, Some(named.source)).into_pyobject(py)?)?;
            }
        }
        Ok(out)
    }

    /// Number of token ids, or None if not given.
    #[getter]
    fn vocab_size(&self) -> Option<u32> {
        self.engine.options().vocab_size
    }

    /// Tokens that end a sequence, int32 [n].
    #[getter]
    fn end_token_ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        int32(py, self.engine.options().end_tokens.iter().map(|&token| token as i32))
    }

    fn __repr__(&self) -> String {
        match self.engine.options().vocab_size {
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
        PySequence { request, engine: Arc::clone(&self.engine), corpora: Arc::clone(&self.corpora) }
    }
}

const MOST_THREADS: i128 = 256;
/// Every expansion looks a token up among them.
const MOST_END_TOKENS: usize = 256;
/// More threads than this have too little to do in a batch.
const MOST_DEFAULT_THREADS: usize = 8;

/// No machine has more, and sums of it do not overflow.
const MOST_BYTES: usize = 1 << 40;

#[pymethods]
impl PySequence {
    /// The drafter that it belongs to.
    #[getter]
    fn drafter(&self) -> PyDrafter {
        PyDrafter { engine: Arc::clone(&self.engine), corpora: Arc::clone(&self.corpora) }
    }
}

/// A number of bytes.
fn size(py: Python<'_>, name: &str, bytes: i128) -> PyResult<usize> {
    match usize::try_from(bytes) {
        Ok(bytes) if bytes <= MOST_BYTES => Ok(bytes),
        _ => {
            let message = format!("{name} must be between 0 and 2^40, got {bytes}");
            Err(error(py, "InvalidArgumentError", message))
        }
    }
}
