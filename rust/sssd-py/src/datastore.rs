//! `sssd.Datastore` and `sssd.DatastoreBuilder`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use numpy::PyArray1;
use pyo3::exceptions::{PyOSError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use sssd_core::{Corpus, Token};
use sssd_store::{
    BuildOptions, BuildSummary, Builder, Datastore, Error, FileInfo, Fingerprint, Load, Progress,
};

use crate::boundary::enter;
use crate::errors::error;
use crate::tokens::{int32, tokens};

/// How often a build looks for Ctrl-C and reports its progress.
const POLL: Duration = Duration::from_millis(100);

/// A corpus of token documents on disk, opened for look-up. Made by ``Datastore.open``; a context manager that
/// closes itself. Immutable, so that any number of threads, drafters and (mapped) processes can share it.
#[pyclass(frozen, name = "Datastore", module = "sssd")]
pub struct PyDatastore(RwLock<Option<Arc<Datastore>>>);

impl PyDatastore {
    /// The store for the drafter.
    pub fn corpus(&self, py: Python<'_>) -> PyResult<Arc<dyn Corpus>> {
        Ok(self.store(py)?)
    }

    /// Token ids are smaller than this.
    pub fn vocabulary(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.store(py)?.vocab_size())
    }

    fn store(&self, py: Python<'_>) -> PyResult<Arc<Datastore>> {
        let store = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        store.ok_or_else(|| error(py, "ClosedError", "the datastore is closed"))
    }
}

#[pymethods]
impl PyDatastore {
    /// Opens one file, or several as one store.
    ///
    /// Args:
    ///     paths: a path or a sequence of paths.
    ///     load: ``"mmap"`` reads pages when they are first touched and shares them with other processes; the
    ///         files must not be truncated meanwhile (replacing them is safe). ``"ram"`` reads everything now.
    ///     vocab_size: the model's number of token ids, refused if the store's differs.
    ///     fingerprint: the model's ``tokenizer_fingerprint`` (32 bytes), refused if the store's differs.
    ///
    /// Raises:
    ///     OSError: a file cannot be read.
    ///     CorruptDatastoreError: a file is no datastore, truncated, or damaged where opening looks.
    ///     DatastoreVersionError: a file has a format version that this release cannot read.
    ///     VocabularyMismatchError: vocabularies or tokenizers differ.
    ///     InvalidArgumentError: no path, or an argument out of range.
    #[staticmethod]
    #[pyo3(signature = (paths, *, load="mmap", vocab_size=None, fingerprint=None))]
    pub fn open(
        py: Python<'_>,
        paths: &Bound<'_, PyAny>,
        load: &str,
        vocab_size: Option<u32>,
        fingerprint: Option<&[u8]>,
    ) -> PyResult<Self> {
        let paths = match paths.extract::<PathBuf>() {
            Ok(path) => vec![path],
            Err(_) => paths.extract::<Vec<PathBuf>>().map_err(|_| {
                PyTypeError::new_err(format!("paths must be a path or a sequence of paths, got {paths}"))
            })?,
        };
        let load = match load {
            "mmap" => Load::Mmap,
            "ram" => Load::Ram,
            other => {
                let message = format!("load must be \"mmap\" or \"ram\", got {other:?}");
                return Err(error(py, "InvalidArgumentError", message));
            }
        };
        let fingerprint = fingerprint.map(|bytes| checked_fingerprint(py, bytes)).transpose()?;
        let opened = enter(py, true, || {
            let store = Datastore::open(&paths, load)?;
            store.check_model(vocab_size, fingerprint.as_ref())?;
            Ok(store)
        })?;
        let store = opened.map_err(|failure| raised(py, failure))?;
        Ok(Self(RwLock::new(Some(Arc::new(store)))))
    }

    /// What the headers say.
    #[getter]
    fn info(&self, py: Python<'_>) -> PyResult<PyDatastoreInfo> {
        let store = self.store(py)?;
        let files: Vec<_> = store.files().map(|file| PyFileInfo(file.clone())).collect();
        let sum = |field: fn(&FileInfo) -> u64| store.files().map(field).sum();
        Ok(PyDatastoreInfo {
            vocab_size: store.vocab_size(),
            tokens: sum(|file| file.tokens),
            documents: sum(|file| file.documents),
            segments: sum(|file| file.segments),
            file_bytes: sum(|file| file.file_bytes),
            files,
        })
    }

    /// Number of token ids.
    #[getter]
    fn vocab_size(&self, py: Python<'_>) -> PyResult<u32> {
        self.vocabulary(py)
    }

    /// Compares every byte with the checksums.
    ///
    /// Raises:
    ///     CorruptDatastoreError: bytes have changed since the file was written; the message says which.
    ///     ClosedError: the datastore is closed.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        let store = self.store(py)?;
        enter(py, true, || store.verify())?.map_err(|failure| raised(py, failure))
    }

    /// Occurrences of ``ids`` within documents; without ids, the number of tokens in the store.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary.
    ///     ClosedError: the datastore is closed.
    fn count(&self, ids: &Bound<'_, PyAny>) -> PyResult<u64> {
        let py = ids.py();
        let store = self.store(py)?;
        let query = tokens(ids, Some(store.vocab_size()))?;
        enter(py, true, || store.count(&query))?.map_err(|failure| raised(py, failure))
    }

    /// What follows occurrences of ``ids``, evenly spread over all of them, in the order of the tokens.
    ///
    /// Args:
    ///     ids: at least one token id.
    ///     limit: at most this many occurrences.
    ///     max_tokens: at most this many tokens of each; fewer at the end of a document.
    ///
    /// Returns:
    ///     A list of int32 arrays, possibly empty ones.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary.
    ///     InvalidArgumentError: no ids.
    ///     ClosedError: the datastore is closed.
    #[pyo3(signature = (ids, *, limit=64, max_tokens=16))]
    fn continuations<'py>(
        &self,
        ids: &Bound<'py, PyAny>,
        limit: usize,
        max_tokens: usize,
    ) -> PyResult<Vec<Bound<'py, PyArray1<i32>>>> {
        let py = ids.py();
        let store = self.store(py)?;
        let query = tokens(ids, Some(store.vocab_size()))?;
        let found = enter(py, true, || {
            let positions = store.occurrences(&query, limit)?;
            Ok(positions.into_iter().map(|position| read(&store, position, max_tokens)).collect::<Vec<_>>())
        })?;
        let found = found.map_err(|failure| raised(py, failure))?;
        Ok(found.into_iter().map(|tokens| int32(py, tokens.into_iter().map(|token| token as i32))).collect())
    }

    /// The most frequent successors of a token, at most 32, most frequent first.
    ///
    /// Returns:
    ///     Their ids, int32 [n], and their shares of the token's occurrences, float32 [n], to within 3 %.
    ///
    /// Raises:
    ///     InvalidTokenError: the id is outside the vocabulary.
    ///     ClosedError: the datastore is closed.
    #[allow(clippy::type_complexity)]
    fn successors<'py>(
        &self,
        py: Python<'py>,
        token_id: u32,
    ) -> PyResult<(Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<f32>>)> {
        let store = self.store(py)?;
        let vocab_size = store.vocab_size();
        if token_id >= vocab_size {
            return Err(raised(py, Error::InvalidToken { token: token_id, vocab_size }));
        }
        let mut found = Vec::new();
        store.successors(token_id, &mut found);
        let ids = int32(py, found.iter().map(|&(token, _)| token as i32));
        Ok((ids, PyArray1::from_iter(py, found.iter().map(|&(_, share)| share))))
    }

    /// Gives the files back. Drafters that use the store keep it until they are gone. Closing twice is fine.
    fn close(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Whether ``close`` was called.
    #[getter]
    fn closed(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(&self, _kind: &Bound<'_, PyAny>, _error: &Bound<'_, PyAny>, _trace: &Bound<'_, PyAny>) {
        self.close();
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.store(py) {
            Ok(store) => {
                let paths: Vec<_> = store.files().map(|file| file.path.display().to_string()).collect();
                format!("Datastore({})", paths.join(", "))
            }
            Err(_) => "Datastore(closed)".into(),
        }
    }
}

fn read(store: &Datastore, position: u64, max_tokens: usize) -> Vec<Token> {
    let mut out = Vec::new();
    // In steps, so that a large `max_tokens` does not allocate more than the document has.
    while out.len() < max_tokens {
        let start = out.len();
        out.resize(max_tokens.min(start + 4096), 0);
        let wanted = out.len() - start;
        let copied = store.continuation(position + start as u64, &mut out[start..]);
        out.truncate(start + copied);
        if copied < wanted {
            break;
        }
    }
    out
}

/// Totals over the files of a store.
#[pyclass(frozen, get_all, name = "DatastoreInfo", module = "sssd.datastore")]
pub struct PyDatastoreInfo {
    /// Number of token ids.
    vocab_size: u32,
    /// Tokens of all documents.
    tokens: u64,
    /// Documents, the empty ones included.
    documents: u64,
    /// Independently sorted parts.
    segments: u64,
    /// Bytes of all files.
    file_bytes: u64,
    /// One entry per file.
    files: Vec<PyFileInfo>,
}

/// What a file's header says.
#[pyclass(frozen, name = "FileInfo", module = "sssd.datastore")]
#[derive(Clone)]
pub struct PyFileInfo(FileInfo);

#[pymethods]
impl PyFileInfo {
    /// The file.
    #[getter]
    fn path(&self) -> PathBuf {
        self.0.path.clone()
    }

    /// Format version.
    #[getter]
    fn version(&self) -> u32 {
        self.0.version
    }

    /// Identifier derived from the contents: equal for equal files.
    #[getter]
    fn uuid(&self) -> String {
        let hex: String = self.0.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }

    /// Fingerprint of the tokenizer, 32 bytes, or None if unknown.
    #[getter]
    fn fingerprint<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        (self.0.fingerprint != Fingerprint::default()).then(|| PyBytes::new(py, &self.0.fingerprint))
    }

    /// Tokens of all documents.
    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens
    }

    /// Documents, the empty ones included.
    #[getter]
    fn documents(&self) -> u64 {
        self.0.documents
    }

    /// Independently sorted parts.
    #[getter]
    fn segments(&self) -> u64 {
        self.0.segments
    }

    /// Whether repeated documents were left out.
    #[getter]
    fn deduplicated(&self) -> bool {
        self.0.deduplicated
    }

    /// Bytes of the file.
    #[getter]
    fn file_bytes(&self) -> u64 {
        self.0.file_bytes
    }
}

/// Writes a datastore file. The target appears, or is replaced, only when ``finish`` returns; until then
/// everything goes into a temporary file beside it. As a context manager it finishes at the end of the block, and
/// removes the temporary file after an exception.
///
/// Args:
///     path: the file to write or replace.
///     vocab_size: number of token ids, 1 to 2^24.
///     fingerprint: ``tokenizer_fingerprint`` of the tokenizer (32 bytes).
///     deduplicate: leave out documents that were added before.
///     max_memory: bytes that the builder may allocate (16 per document of ``deduplicate`` come on top). A limit
///         too small for one segment gives several, which makes look-ups slower.
///
/// Raises:
///     InvalidArgumentError: an argument is out of range.
///     OSError: the folder cannot be written.
#[pyclass(frozen, name = "DatastoreBuilder", module = "sssd")]
pub struct PyDatastoreBuilder {
    /// Boxed: its hash state wants to be aligned to 64 bytes.
    builder: Mutex<Option<Box<Builder>>>,
    vocab_size: u32,
}

impl PyDatastoreBuilder {
    /// Lets `work` add to the file.
    pub fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Builder) -> sssd_store::Result<T> + Send,
    ) -> PyResult<T> {
        let result = enter(py, true, || {
            let mut guard = self.builder.lock().unwrap_or_else(PoisonError::into_inner);
            guard.as_deref_mut().map(work)
        })?;
        result.ok_or_else(|| finished(py))?.map_err(|failure| raised(py, failure))
    }
}

#[pymethods]
impl PyDatastoreBuilder {
    #[new]
    #[pyo3(signature = (path, *, vocab_size, fingerprint=None, deduplicate=false, max_memory=None))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        vocab_size: u32,
        fingerprint: Option<&[u8]>,
        deduplicate: bool,
        max_memory: Option<u64>,
    ) -> PyResult<Self> {
        let fingerprint =
            fingerprint.map_or(Ok(Fingerprint::default()), |bytes| checked_fingerprint(py, bytes))?;
        let options = BuildOptions { vocab_size, fingerprint, deduplicate, max_memory };
        let builder = Builder::create(&path, options).map_err(|failure| raised(py, failure))?;
        Ok(Self { builder: Mutex::new(Some(Box::new(builder))), vocab_size })
    }

    /// Adds one document, which may be empty.
    ///
    /// Args:
    ///     ids: its tokens, any one-dimensional sequence or array of integers.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary; nothing is added.
    ///     OSError: the temporary file cannot be written.
    ///     ClosedError: the builder is finished or closed.
    fn add(&self, ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let document = tokens(ids, Some(self.vocab_size))?;
        self.with(ids.py(), |builder| builder.add_document(&document))
    }

    /// Adds a stretch of a token stream in which ``end_token_id`` is the last token of each document. The last
    /// document goes on with the next call, until ``end_stream`` or ``finish``.
    ///
    /// Raises:
    ///     As ``add``.
    fn add_stream(&self, ids: &Bound<'_, PyAny>, end_token_id: u32) -> PyResult<()> {
        let stream = tokens(ids, Some(self.vocab_size))?;
        self.with(ids.py(), |builder| builder.add_stream(&stream, end_token_id))
    }

    /// Ends the document that ``add_stream`` has left open, if any.
    ///
    /// Raises:
    ///     As ``add``.
    fn end_stream(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, Builder::end_stream)
    }

    /// Tokens and document ends added so far.
    #[getter]
    fn symbols(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |builder| Ok(builder.symbols()))
    }

    /// Sorts, writes the rest, makes the file durable and puts it in the target's place. Ctrl-C leaves the
    /// target as it was.
    ///
    /// Args:
    ///     progress: called about ten times a second with the symbols indexed so far and their total.
    ///
    /// Raises:
    ///     OSError: the file cannot be written; the target is as it was.
    ///     ClosedError: the builder is finished or closed.
    #[pyo3(signature = (progress=None))]
    fn finish(&self, py: Python<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<PyBuildSummary> {
        let builder = self.builder.lock().unwrap_or_else(PoisonError::into_inner).take();
        let builder = builder.ok_or_else(|| finished(py))?;
        let (total, temporary) = (builder.symbols(), builder.temporary_path().to_owned());
        let watch = Arc::new(Progress::default());
        // On a thread of its own, for the sorter cannot be interrupted.
        let (sender, mut receiver) = channel();
        let worker = Arc::clone(&watch);
        std::thread::spawn(move || {
            let _ = sender.send(builder.finish(&worker)); // nobody listens after Ctrl-C
        });
        loop {
            let waiting = &mut receiver;
            let result = py.detach(move || waiting.recv_timeout(POLL));
            match result {
                Ok(result) => return result.map(PyBuildSummary).map_err(|failure| raised(py, failure)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(error(
                        py,
                        "InternalError",
                        "the build stopped without a result; please report it",
                    ));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let report = progress.map_or(Ok(()), |call| call.call1((watch.done(), total)).map(drop));
            if let Err(interrupted) = py.check_signals().and(report) {
                watch.cancel();
                let _ = std::fs::remove_file(&temporary); // the sorter may go on for a while
                return Err(interrupted);
            }
        }
    }

    /// Gives up and removes the temporary file. Does nothing after ``finish``.
    fn close(&self) {
        self.builder.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let open = self.builder.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if open && kind.is_none() {
            self.finish(py, None)?;
        }
        self.close();
        Ok(())
    }
}

/// What a build wrote.
#[pyclass(frozen, name = "BuildSummary", module = "sssd.datastore")]
pub struct PyBuildSummary(BuildSummary);

#[pymethods]
impl PyBuildSummary {
    /// Tokens in the file.
    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens
    }

    /// Documents in the file.
    #[getter]
    fn documents(&self) -> u64 {
        self.0.documents
    }

    /// Documents left out because they had been added before.
    #[getter]
    fn duplicates(&self) -> u64 {
        self.0.duplicates
    }

    /// Independently sorted parts of the file.
    #[getter]
    fn segments(&self) -> u64 {
        self.0.segments
    }

    /// Bytes of the file.
    #[getter]
    fn file_bytes(&self) -> u64 {
        self.0.file_bytes
    }
}

fn finished(py: Python<'_>) -> PyErr {
    error(py, "ClosedError", "the builder is finished or closed")
}

fn checked_fingerprint(py: Python<'_>, bytes: &[u8]) -> PyResult<Fingerprint> {
    bytes.try_into().map_err(|_| {
        let message = format!("fingerprint must be 32 bytes, got {}", bytes.len());
        error(py, "InvalidArgumentError", message)
    })
}

pub fn raised(py: Python<'_>, failure: Error) -> PyErr {
    let class = match &failure {
        Error::Io { path, source } => return os_error(path, source),
        Error::Corrupt { .. } => "CorruptDatastoreError",
        Error::Version { .. } => "DatastoreVersionError",
        Error::Mismatch { .. } => "VocabularyMismatchError",
        Error::InvalidToken { .. } => "InvalidTokenError",
        Error::InvalidArgument(_) => "InvalidArgumentError",
        _ => "InternalError",
    };
    error(py, class, failure.to_string())
}

/// The `OSError` with number, reason and path.
pub fn os_error(path: &Path, source: &io::Error) -> PyErr {
    match source.raw_os_error() {
        Some(code) => {
            let reason = source.to_string();
            let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
            PyOSError::new_err((code, reason, path.as_os_str().to_owned()))
        }
        None => PyOSError::new_err(format!("{}: {source}", path.display())),
    }
}
