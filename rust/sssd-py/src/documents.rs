//! Documents out of a `Datastore`, and from one into a `DatastoreBuilder`.

use std::collections::TryReserveError;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use sssd_core::Token;
use sssd_store::{Document, DocumentReader, Error, Progress};

use crate::boundary::{Running, enter, not_negative, optional_int};
use crate::datastore::{PyDatastore, PyDatastoreBuilder, add, array, finished};
use crate::errors::{error, raised};
use crate::shutdown::defer_shutdown;

/// Tokens, and documents, read at once.
const TOKENS: usize = 1 << 16;
const DOCUMENTS: usize = 1 << 10;
/// Symbols and documents passed between two looks at whether a signal has come.
const PASSED: u64 = 1 << 22;

/// The documents of a datastore, in their order: an iterator of int32 arrays, None for dead ones. Made by
/// ``Datastore.documents``. It keeps the files until it is gone, also if the datastore is closed.
#[pyclass(frozen, name = "Documents", module = "sssd.datastore")]
pub struct PyDocuments(Mutex<Documents>);

struct Documents {
    reader: DocumentReader,
    start: u64,
    stop: u64,
    /// A long document whose tokens are being read.
    open: Option<Document>,
    /// Read and not yet given out: the tokens, where each document ends, and whether it is dead.
    tokens: Vec<Token>,
    ends: Vec<(usize, bool)>,
    given: usize,
    /// Raised once the documents before it have been given out.
    failure: Option<Error>,
}

impl Documents {
    /// The next document, if one has been read; the end, if there is none.
    fn next(&mut self) -> sssd_store::Result<Next> {
        if self.given == self.ends.len() {
            match self.failure.take().map_or_else(|| self.read(), Err) {
                Ok(true) => {}
                Ok(false) => return Ok(Next::End),
                Err(failure) => self.fail(failure)?,
            }
        }
        let Some(&(end, is_dead)) = self.ends.get(self.given) else { return Ok(Next::Later) };
        let start = self.given.checked_sub(1).map_or(0, |before| self.ends[before].0);
        let mut tokens = Vec::new();
        tokens.try_reserve_exact(end - start).map_err(memory)?;
        tokens.extend_from_slice(&self.tokens[start..end]);
        self.given += 1;
        Ok(Next::Document((!is_dead).then_some(tokens)))
    }

    /// It ends with this.
    fn fail(&mut self, failure: Error) -> sssd_store::Result<()> {
        (self.stop, self.open) = (0, None);
        if self.given == self.ends.len() {
            return Err(failure);
        }
        self.failure = Some(failure);
        Ok(())
    }

    /// Reads on for a moment. Whether there is something to give out, or will be.
    fn read(&mut self) -> sssd_store::Result<bool> {
        if self.open.is_none() {
            self.tokens.clear();
            self.ends.clear();
            self.given = 0;
        }
        let mut passed = 0;
        while passed < PASSED && self.ends.len() < DOCUMENTS && self.tokens.len() < TOKENS
            || self.open.is_some()
        {
            let document = match self.open.take() {
                Some(document) => document,
                None => match self.reader.next_document()? {
                    Some(document) if document.number < self.stop => document,
                    _ => return Ok(!self.ends.is_empty()),
                },
            };
            passed += document.length + 1;
            if document.number >= self.start && !self.read_tokens(document)? {
                break;
            }
        }
        Ok(true)
    }

    /// Whether the document was read to its end.
    fn read_tokens(&mut self, document: Document) -> sssd_store::Result<bool> {
        let first = self.ends.last().map_or(0, |last| last.0);
        let most = (self.tokens.len() - first) as u64 + PASSED;
        loop {
            let from = (self.tokens.len() - first) as u64;
            if document.is_dead || from == document.length {
                self.ends.try_reserve(1).map_err(memory)?;
                self.ends.push((self.tokens.len(), document.is_dead));
                return Ok(true);
            }
            if from >= most {
                self.open = Some(document);
                return Ok(false);
            }
            let tokens = self.reader.tokens(&document, from)?;
            self.tokens.try_reserve(tokens.len()).map_err(memory)?;
            self.tokens.extend_from_slice(tokens);
        }
    }
}

enum Next {
    /// None for one that is dead.
    Document(Option<Vec<Token>>),
    /// Not yet read.
    Later,
    End,
}

fn memory(_: TryReserveError) -> Error {
    Error::OutOfMemory("the tokens".into())
}

#[pymethods]
impl PyDocuments {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[allow(clippy::type_complexity)]
    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Option<Bound<'py, PyArray1<i32>>>>> {
        loop {
            let next = enter(py, true, || self.0.lock().unwrap_or_else(PoisonError::into_inner).next())?;
            match next.map_err(|failure| raised(py, failure))? {
                Next::Document(tokens) => {
                    return tokens.map(|tokens| array(py, &tokens)).transpose().map(Some);
                }
                Next::Later => py.check_signals()?,
                Next::End => return Ok(None),
            }
        }
    }
}

#[pymethods]
impl PyDatastore {
    /// The documents in their order, those of the first file first, as they were added (one longer than a segment in
    /// several). They are read in pieces, through the file and not the map.
    ///
    /// Args:
    ///     start: the first that is wanted, counted from 0 over all files; ``info.documents`` says how many there are.
    ///     stop: the one to stop before; by default all are read.
    ///
    /// Returns:
    ///     An iterator of int32 arrays, with None in the place of a document that tombstones name.
    ///
    /// Raises:
    ///     InvalidArgumentError: ``start`` or ``stop`` is negative.
    ///     CorruptDatastoreError, DatastoreChangedError, OSError: when a file turns out to be damaged, changed or
    ///         unreadable. The documents are not compared with their checksums; ``verify`` is for that.
    ///     MemoryError: there is no memory for a document.
    ///     ClosedError: the datastore is closed.
    #[pyo3(signature = (start=0, stop=None), text_signature = "($self, start=0, stop=None)")]
    fn documents(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = crate::boundary::int)] start: i128,
        #[pyo3(from_py_with = optional_int)] stop: Option<i128>,
    ) -> PyResult<PyDocuments> {
        let number = |name, value: i128| {
            not_negative(py, name, value.min(isize::MAX as i128)).map(|number| number as u64)
        };
        let start = number("start", start)?;
        let stop = stop.map_or(Ok(u64::MAX), |stop| number("stop", stop))?;
        let mut reader = DocumentReader::new(self.store(py)?);
        reader.skip_to(start);
        Ok(PyDocuments(Mutex::new(Documents {
            reader,
            start,
            stop,
            open: None,
            tokens: Vec::new(),
            ends: Vec::new(),
            given: 0,
            failure: None,
        })))
    }
}

#[pymethods]
impl PyDatastoreBuilder {
    /// Adds the documents of an open datastore, those of its first file first, without tokenizing again and in little
    /// memory. Their bytes are compared with the checksums first.
    ///
    /// Args:
    ///     store: the datastore.
    ///     keep: bool [documents], which of its documents (``store.info.documents``) to add; all by default. Documents that
    ///         its tombstones name are never added.
    ///     progress: called about twenty times a second with the tokens and document ends done with and their total.
    ///
    /// Returns:
    ///     bool [documents]: which were added; with ``deduplicate`` those that were added before are not.
    ///
    /// Raises:
    ///     VocabularyMismatchError: the store has another vocabulary or tokenizer.
    ///     InvalidArgumentError: ``keep`` is not one bool per document, or ``max_memory`` would give more than 64 segments.
    ///     CorruptDatastoreError: the store is damaged; nothing of the damaged file is added.
    ///     DatastoreChangedError: a file of the store has been changed in place since it was opened.
    ///     OSError: the temporary file cannot be written, or the store's cannot be read.
    ///     MemoryError: there is no memory for it.
    ///     ClosedError: the builder is finished or closed, or the store is closed.
    ///
    /// Ctrl-C, and what ``progress`` raises, ends it after some documents; the builder goes on unless it was in the middle
    /// of one, after which it closes itself.
    #[pyo3(signature = (store, keep=None, *, progress=None))]
    fn add_datastore<'py>(
        &self,
        py: Python<'py>,
        store: &PyDatastore,
        keep: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<bool>>> {
        let store = store.store(py)?;
        let mut chosen = mask(py, keep, store.documents())?;
        let total = store.files().map(|file| file.tokens + file.documents).sum::<u64>();
        let watch = self.with(py, |builder| Ok(builder.watch()))?;
        watch.renew();
        let before = watch.done();
        let builder = Arc::clone(&self.builder);
        let running = Running::start(py, move || {
            let added = add(&builder, |builder| builder.add_datastore(&store, &mut chosen));
            added.map(|added| added.map(|()| chosen))
        });
        let added = reported(py, running, &watch, |done| {
            progress.map_or(Ok(()), |call| call.call1((done - before, total)).map(drop))
        })?;
        let added = added.ok_or_else(|| finished(py))?.map_err(|failure| raised(py, failure))?;
        Ok(PyArray1::from_vec(py, added))
    }
}

/// Waits for work, reports how far it is, and cancels it if that or a signal's handler raises.
pub fn reported<T: Send + 'static>(
    py: Python<'_>,
    mut running: Running<T>,
    watch: &Progress,
    mut report: impl FnMut(u64) -> PyResult<()>,
) -> PyResult<T> {
    let mut interrupted = Ok(());
    loop {
        if let Some(done) = running.wait(py)? {
            return interrupted.map(|()| done);
        }
        if interrupted.is_ok() {
            interrupted = py.check_signals().and_then(|()| report(watch.done()));
            if interrupted.is_err() {
                watch.cancel();
            }
        }
    }
}

/// One bool a document: `given`, or all true.
pub fn mask(py: Python<'_>, given: Option<&Bound<'_, PyAny>>, documents: u64) -> PyResult<Vec<bool>> {
    let memory = || raised(py, Error::OutOfMemory("a bool for every document".into()));
    let count = usize::try_from(documents).map_err(|_| memory())?;
    let mut out = Vec::new();
    let Some(given) = given else {
        out.try_reserve_exact(count).map_err(|_| memory())?;
        out.resize(count, true);
        return Ok(out);
    };
    let refused = |found: String| {
        error(
            py,
            "InvalidArgumentError",
            format!("one bool for each of the {documents} documents, not {found}"),
        )
    };
    let _deferred = defer_shutdown(py);
    let array = py.import("numpy")?.call_method1("asarray", (given,))?;
    let Ok(bools) = array.extract::<PyReadonlyArray1<'_, bool>>() else {
        let (kind, shape) = (array.getattr("dtype")?, array.getattr("shape")?);
        return Err(refused(format!("{kind} of shape {shape}")));
    };
    let bools = bools.as_array();
    if bools.len() != count {
        return Err(refused(format!("{} of them", bools.len())));
    }
    out.try_reserve_exact(count).map_err(|_| memory())?;
    out.extend(bools.iter());
    Ok(out)
}

/// Writes which documents of a datastore file are dead, for ``Datastore.open(tombstones=...)``. They are passed over by all
/// that is looked up; the file itself stays as it is. The target appears, or is replaced, in one durable step.
///
/// Args:
///     store: an open datastore of one file. Documents that its own tombstones name stay dead.
///     dead: bool [documents], which are dead.
///     path: the file to write.
///     progress: called about twenty times a second with how much is done and of how much.
///
/// Returns:
///     How many tokens the dead documents have.
///
/// Raises:
///     InvalidArgumentError: the store has several files, or ``dead`` is not one bool per document.
///     CorruptDatastoreError, DatastoreChangedError: the store is damaged, or changed since it was opened.
///     OSError: the file cannot be written, or ``path`` is a folder, a pipe or a device.
///     MemoryError: there is no memory for it: a quarter of a byte per token of the largest segment.
///     ClosedError: the store is closed.
#[pyfunction]
#[pyo3(signature = (store, dead, path, *, progress=None))]
pub fn write_tombstones(
    py: Python<'_>,
    store: &PyDatastore,
    dead: &Bound<'_, PyAny>,
    path: PathBuf,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<u64> {
    let store = store.store(py)?;
    let dead = mask(py, Some(dead), store.documents())?;
    let total = store.files().map(|file| 2 * file.tokens + file.documents).sum::<u64>();
    let watch = Arc::new(Progress::default());
    let worker = Arc::clone(&watch);
    let running = Running::start(py, move || sssd_store::write_tombstones(&store, &dead, &path, &worker));
    let written = reported(py, running, &watch, |done| {
        progress.map_or(Ok(()), |call| call.call1((done, total)).map(drop))
    })?;
    written.map_err(|failure| raised(py, failure))
}
