//! `sssd.Datastore` and `sssd.DatastoreBuilder`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use sssd_core::{Corpus, Token};
use sssd_store::{
    BuildOptions, BuildSummary, Builder, Datastore, Error, FileInfo, Fingerprint, Load, Progress,
};

use crate::boundary::{Running, enter, let_others_run, watched};
use crate::errors::{error, raised};
use crate::source::{Run, Source, domains};
use crate::tokens::{int32, tokens};

/// Token ids read from Python, and arrays given to it, between two moments in which other threads can run.
const PIECE: usize = 1 << 15;
/// Work on fewer tokens is done at once.
const LONG: usize = 1 << 21;
/// Threads that sort unless somebody says how many.
const MOST_THREADS: usize = 8;
/// Files with fewer bytes are read at once.
const LARGE: u64 = 64 << 20;

/// A corpus of token documents on disk, opened for look-up. Made by ``Datastore.open``; a context manager that
/// closes itself. Immutable, so that any number of threads, drafters and (mapped) processes can share it. A copy, also
/// one that was pickled, opens the same files again; it raises ``DatastoreError`` if they have been replaced.
///
/// A mapped file that is shortened or overwritten in place (by ``cp``, say) is noticed before it is read: calls raise
/// ``DatastoreChangedError`` from then on, and drafters go on without the store.
#[pyclass(frozen, name = "Datastore", module = "sssd")]
pub struct PyDatastore {
    store: RwLock<Option<Arc<Datastore>>>,
    /// If it was opened from the folder of a corpus.
    source: Option<Source>,
}

impl PyDatastore {
    /// What a drafter has.
    pub fn new(store: Arc<Datastore>, source: Option<Source>) -> Self {
        let source = source.filter(Source::is_folder);
        Self { store: RwLock::new(Some(store)), source }
    }

    /// Where the same is opened again.
    pub fn source(&self, py: Python<'_>) -> PyResult<Source> {
        let store = self.store(py)?;
        Ok(self.source.clone().unwrap_or_else(|| Source::of_files(&store)))
    }

    pub fn store(&self, py: Python<'_>) -> PyResult<Arc<Datastore>> {
        let store = self.store.read().unwrap_or_else(PoisonError::into_inner).clone();
        store.ok_or_else(|| error(py, "ClosedError", "the datastore is closed"))
    }
}

/// To unmap takes its time.
impl Drop for PyDatastore {
    fn drop(&mut self) {
        let store = self.store.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if store.is_some() {
            Python::try_attach(|py| py.detach(|| drop(store)));
        }
    }
}

#[pymethods]
impl PyDatastore {
    /// Opens one file, or several as one store, or the corpus in a folder (``sssd.corpus``) as it is now.
    ///
    /// Args:
    ///     paths: a path or a sequence of paths.
    ///     tombstones: for each file the path of what ``write_tombstones`` has written for it, or None: its dead documents
    ///         are passed over. A corpus has its own.
    ///     domains: for each file its documents by domain (source, say), in their order: (documents, tokens, domain) of those
    ///         that follow one another, domains from 0 to 15. By default each file is a domain, and a corpus tells its own.
    ///         Drafts sample small domains (an eighth of all tokens or less, at most 2^21) by themselves, and a request learns
    ///         which ones its text is like.
    ///     load: ``"mmap"`` maps the files, whose memory is shared with other processes; they must not be changed in
    ///         place meanwhile (replacing them is safe). Drafts never wait for a disk: they leave out what is not in
    ///         memory, have it read in the background, and look up for 200 us at most (``docs/large-stores.md``).
    ///         With ``"mmap-wait"`` they wait, so that drafts depend on the files alone. ``"ram"`` reads
    ///         everything now.
    ///     vocab_size: the model's number of token ids, refused if the store's differs.
    ///     fingerprint: the model's ``tokenizer_fingerprint`` (32 bytes), refused if the store's differs.
    ///
    /// Raises:
    ///     OSError: a file cannot be read.
    ///     CorruptDatastoreError: a file is no datastore, truncated, damaged where opening looks, or has more than 64
    ///         segments with tokens; or tombstones are damaged.
    ///     DatastoreVersionError: a file has a format version that this release cannot read.
    ///     VocabularyMismatchError: vocabularies or tokenizers differ.
    ///     InvalidArgumentError: no path, an empty corpus, tombstones of another file, domains that are not those of the
    ///         files' documents, or an argument out of range.
    ///     MemoryError: there is no memory for it.
    #[staticmethod]
    #[pyo3(signature = (paths, *, load="mmap", vocab_size=None, fingerprint=None, tombstones=None, domains=None))]
    pub fn open(
        py: Python<'_>,
        paths: &Bound<'_, PyAny>,
        load: &str,
        vocab_size: Option<u32>,
        fingerprint: Option<&[u8]>,
        tombstones: Option<&Bound<'_, PyAny>>,
        domains: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let source = Source::new(paths, tombstones, domains, load)?;
        let fingerprint = fingerprint.map(|bytes| checked_fingerprint(py, bytes)).transpose()?;
        let opened = source.open(py, move |store| store.check_model(vocab_size, fingerprint.as_ref()))?;
        let empty = || error(py, "InvalidArgumentError", format!("{paths}: the corpus holds no document"));
        let store = opened.ok_or_else(empty)?;
        let source = source.is_folder().then_some(source);
        Ok(Self { store: RwLock::new(Some(store)), source })
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
        Ok(self.store(py)?.vocab_size())
    }

    /// Compares every byte with the checksums.
    ///
    /// Raises:
    ///     CorruptDatastoreError: bytes have changed since the file was written; the message says which.
    ///     DatastoreChangedError: the file has been changed in place since it was opened.
    ///     OSError: the file cannot be read.
    ///     ClosedError: the datastore is closed.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        let store = self.store(py)?;
        let large = store.files().any(|file| file.file_bytes > LARGE);
        let watch = Arc::new(Progress::default());
        let progress = Arc::clone(&watch);
        watched(py, large, &watch, move || store.verify_watched(&progress))?
            .map_err(|failure| raised(py, failure))
    }

    /// Occurrences of ``ids`` within documents; without ids, the number of tokens in the store.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary.
    ///     DatastoreChangedError: a file has been changed in place since it was opened.
    ///     ClosedError: the datastore is closed.
    fn count(&self, ids: &Bound<'_, PyAny>) -> PyResult<u64> {
        let py = ids.py();
        let store = self.store(py)?;
        let query = tokens(ids, Some(store.vocab_size()))?;
        enter(py, true, move || store.count(&query))?.map_err(|failure| raised(py, failure))
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
    ///     DatastoreChangedError: a file has been changed in place since it was opened.
    ///     MemoryError: there is no memory for the result.
    ///     ClosedError: the datastore is closed.
    #[pyo3(signature = (ids, *, limit=64, max_tokens=16))]
    fn continuations<'py>(
        &self,
        ids: &Bound<'py, PyAny>,
        limit: usize,
        max_tokens: usize,
    ) -> PyResult<Bound<'py, PyList>> {
        let py = ids.py();
        let store = self.store(py)?;
        let query = tokens(ids, Some(store.vocab_size()))?;
        let held = Arc::clone(&store);
        let positions = enter(py, true, move || held.occurrences(&query, limit))?;
        let positions = positions.map_err(|failure| raised(py, failure))?;
        let (out, mut found) = (PyList::empty(py), Found::default());
        let mut rest = positions.as_slice();
        while !rest.is_empty() {
            let read = enter(py, true, || found.read(&store, rest, max_tokens))?;
            rest = &rest[read.map_err(|failure| raised(py, failure))?..];
            let mut start = 0;
            for &end in &found.ends {
                out.append(array(py, &found.tokens[start..end])?)?;
                start = end;
            }
            py.check_signals()?;
        }
        Ok(out)
    }

    /// The most frequent successors of a token, at most 32, most frequent first.
    ///
    /// Returns:
    ///     Their ids, int32 [n], and their shares of the token's occurrences, float32 [n], to within 3 %.
    ///
    /// Raises:
    ///     InvalidTokenError: the id is outside the vocabulary.
    ///     DatastoreChangedError: a file has been changed in place since it was opened.
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
        let found = enter(py, true, || {
            store.check()?;
            let mut found = Vec::new();
            store.successors(token_id, &mut found);
            Ok(found)
        })?;
        let found = found.map_err(|failure| raised(py, failure))?;
        let ids = int32(py, found.iter().map(|&(token, _)| token as i32));
        Ok((ids, PyArray1::from_iter(py, found.iter().map(|&(_, share)| share))))
    }

    /// Gives the files back. Drafters that use the store keep it until they are gone. Closing twice is fine.
    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            let store = self.store.write().unwrap_or_else(PoisonError::into_inner).take();
            drop(store); // not while others wait for the lock
        });
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Files)> {
        let store = self.store(py)?;
        let load = match store.load() {
            Load::Mmap => "mmap",
            Load::MmapWait => "mmap-wait",
            Load::Ram => "ram",
        };
        let paths = store.absolute_paths().map(Path::to_owned).collect();
        let uuids = store.files().map(uuid).collect();
        let tombstones = store.tombstones_paths().map(|path| path.map(Path::to_owned)).collect();
        let domains = domains(&store);
        Ok((py.import("sssd.datastore")?.getattr("_reopen")?, (paths, load, uuids, tombstones, domains)))
    }

    /// Whether ``close`` was called.
    #[getter]
    fn closed(&self) -> bool {
        self.store.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(&self, kind: &Bound<'_, PyAny>, _error: &Bound<'_, PyAny>, _trace: &Bound<'_, PyAny>) {
        self.close(kind.py());
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

/// Absolute paths, how they were opened, what identifies their contents, the paths of their tombstones, and their domains.
type Files = (Vec<PathBuf>, &'static str, Vec<String>, Vec<Option<PathBuf>>, Option<Vec<Vec<Run>>>);

/// What follows some occurrences.
#[derive(Default)]
struct Found {
    tokens: Vec<Token>,
    ends: Vec<usize>,
}

impl Found {
    /// Reads at some of `positions`, of which it returns how many.
    fn read(&mut self, store: &Datastore, positions: &[u64], max_tokens: usize) -> sssd_store::Result<usize> {
        self.tokens.clear();
        self.ends.clear();
        store.check()?;
        for (index, &position) in positions.iter().enumerate().take(PIECE / 64) {
            if self.tokens.len() >= PIECE {
                return Ok(index);
            }
            self.read_one(store, position, max_tokens)
                .map_err(|_| Error::OutOfMemory("the tokens".into()))?;
        }
        Ok(self.ends.len())
    }

    fn read_one(
        &mut self,
        store: &Datastore,
        position: u64,
        max_tokens: usize,
    ) -> Result<(), std::collections::TryReserveError> {
        let first = self.tokens.len();
        // in steps, so that a large `max_tokens` does not allocate more than the document has
        loop {
            let start = self.tokens.len();
            let wanted = (max_tokens - (start - first)).min(4096);
            self.tokens.try_reserve(wanted)?;
            self.tokens.resize(start + wanted, 0);
            let copied = store.read(position + (start - first) as u64, &mut self.tokens[start..]);
            self.tokens.truncate(start + copied);
            if copied < wanted || wanted == 0 {
                break;
            }
        }
        self.ends.try_reserve(1)?;
        self.ends.push(self.tokens.len());
        Ok(())
    }
}

/// A new int32 array. Numpy makes a large one, for it raises where there is no memory.
pub fn array<'py>(py: Python<'py>, tokens: &[Token]) -> PyResult<Bound<'py, PyArray1<i32>>> {
    let ids = tokens.iter().map(|&token| token as i32);
    if tokens.len() <= 4096 {
        return Ok(int32(py, ids));
    }
    let array = py.import("numpy")?.call_method1("empty", (tokens.len(), "int32"))?;
    let array = array.cast_into::<PyArray1<i32>>()?;
    let mut ids = ids;
    let mut slots = array.readwrite();
    for slots in slots.as_slice_mut()?.chunks_mut(PIECE) {
        slots.iter_mut().zip(&mut ids).for_each(|(slot, id)| *slot = id);
        let_others_run(py);
    }
    drop(slots);
    Ok(array)
}

/// Totals over the files of a store.
#[pyclass(frozen, get_all, eq, hash, name = "DatastoreInfo", module = "sssd.datastore")]
#[derive(PartialEq, Eq, Hash)]
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

#[pymethods]
impl PyDatastoreInfo {
    #[new]
    fn new(
        vocab_size: u32,
        tokens: u64,
        documents: u64,
        segments: u64,
        file_bytes: u64,
        files: Vec<PyFileInfo>,
    ) -> Self {
        Self { vocab_size, tokens, documents, segments, file_bytes, files }
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let held = slf.get();
        let fields = (
            held.vocab_size,
            held.tokens,
            held.documents,
            held.segments,
            held.file_bytes,
            held.files.clone(),
        );
        Ok((slf.get_type().into_any(), fields.into_pyobject(slf.py())?))
    }
}

/// What a file's header says.
#[pyclass(frozen, eq, hash, from_py_object, name = "FileInfo", module = "sssd.datastore")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PyFileInfo(FileInfo);

fn uuid(file: &FileInfo) -> String {
    let hex: String = file.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[pymethods]
impl PyFileInfo {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        version: u32,
        uuid: &str,
        vocab_size: u32,
        fingerprint: Option<&[u8]>,
        tokens: u64,
        documents: u64,
        segments: u64,
        segment_symbols: u64,
        deduplicated: bool,
        file_bytes: u64,
        ranking_tokens: Option<u64>,
    ) -> PyResult<Self> {
        let fingerprint =
            fingerprint.map_or(Ok(Fingerprint::default()), |bytes| checked_fingerprint(py, bytes))?;
        let bad = || error(py, "InvalidArgumentError", format!("{uuid:?} is no UUID"));
        let uuid = u128::from_str_radix(&uuid.replace('-', ""), 16).map_err(|_| bad())?.to_be_bytes();
        Ok(Self(FileInfo {
            path,
            version,
            uuid,
            vocab_size,
            fingerprint,
            tokens,
            documents,
            segments,
            segment_symbols,
            deduplicated,
            file_bytes,
            ranking_tokens,
        }))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let (py, file) = (slf.py(), &slf.get().0);
        let fields = (
            file.path.as_os_str(),
            file.version,
            uuid(file),
            file.vocab_size,
            slf.get().fingerprint(py),
            file.tokens,
            file.documents,
            file.segments,
            file.segment_symbols,
            file.deduplicated,
            file.file_bytes,
            file.ranking_tokens,
        );
        Ok((slf.get_type().into_any(), fields.into_pyobject(py)?))
    }

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
        uuid(&self.0)
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

    /// Tokens that the tables for ranking were learned from, or None without tables.
    #[getter]
    fn ranking_tokens(&self) -> Option<u64> {
        self.0.ranking_tokens
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
///         too small for one segment gives several, which makes look-ups slower, and of which a file has at most 64.
///         Without one, segments have 2^28 tokens, and each thread takes 2.3 GB where a text has so many.
///     ranking: learn tables by which drafts rank candidates, from at most 2^25 tokens: some 4 us a token of one core,
///         and 404 bytes of the file for each token id. By default where the text has 2^23 tokens or more and
///         ``max_memory`` has room for it (about 2.6 kB for each token id). A datastore that is added whole hands its
///         tables on, if they were learned from three quarters of what there is in the end.
///     threads: threads that sort segments, as far as ``max_memory`` allows, 1 to 64; by default the number of cores, at
///         most 8. The file is the same whatever their number.
///
/// Raises:
///     InvalidArgumentError: an argument is out of range.
///     OSError: the folder cannot be written, or ``path`` is a folder, a pipe or a device.
///     MemoryError: there is no memory for it.
#[pyclass(frozen, name = "DatastoreBuilder", module = "sssd")]
pub struct PyDatastoreBuilder {
    pub builder: Arc<Mutex<Option<Builder>>>,
    vocab_size: u32,
}

impl PyDatastoreBuilder {
    /// Lets `work` add to the file.
    pub fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Builder) -> sssd_store::Result<T> + Send,
    ) -> PyResult<T> {
        let result = enter(py, true, || add(&self.builder, work))?;
        result.ok_or_else(|| finished(py))?.map_err(|failure| raised(py, failure))
    }

    /// The same for `ids`.
    fn with_tokens(
        &self,
        ids: &Bound<'_, PyAny>,
        work: impl FnOnce(&mut Builder, &[Token]) -> sssd_store::Result<()> + Send + 'static,
    ) -> PyResult<()> {
        let py = ids.py();
        let tokens = tokens(ids, Some(self.vocab_size))?;
        let watch = self.with(py, |builder| Ok(builder.watch()))?;
        watch.renew();
        if tokens.len() < LONG {
            return self.with(py, |builder| work(builder, &tokens));
        }
        let builder = Arc::clone(&self.builder);
        let result = watched(py, true, &watch, move || add(&builder, |builder| work(builder, &tokens)))?;
        result.ok_or_else(|| finished(py))?.map_err(|failure| raised(py, failure))
    }

    fn take(&self, py: Python<'_>) -> Option<Builder> {
        py.detach(|| self.builder.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

/// Lets `work` add to the file, unless it is finished. A builder that cannot go on is closed.
pub fn add<T>(
    builder: &Mutex<Option<Builder>>,
    work: impl FnOnce(&mut Builder) -> sssd_store::Result<T>,
) -> Option<sssd_store::Result<T>> {
    let mut guard = builder.lock().unwrap_or_else(PoisonError::into_inner);
    let result = work(guard.as_mut()?);
    if guard.as_ref().is_some_and(Builder::has_failed) {
        *guard = None;
    }
    Some(result)
}

#[pymethods]
impl PyDatastoreBuilder {
    #[new]
    #[pyo3(signature = (path, *, vocab_size, fingerprint=None, deduplicate=false, max_memory=None, ranking=None,
                        threads=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        vocab_size: u32,
        fingerprint: Option<&[u8]>,
        deduplicate: bool,
        max_memory: Option<u64>,
        ranking: Option<bool>,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let fingerprint =
            fingerprint.map_or(Ok(Fingerprint::default()), |bytes| checked_fingerprint(py, bytes))?;
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST_THREADS));
        let threads = threads.unwrap_or_else(cores);
        let options = BuildOptions { vocab_size, fingerprint, deduplicate, max_memory, ranking, threads };
        let builder = enter(py, true, || Builder::create(&path, options))?;
        let builder = builder.map_err(|failure| raised(py, failure))?;
        Ok(Self { builder: Arc::new(Mutex::new(Some(builder))), vocab_size })
    }

    /// Adds one document, which may be empty.
    ///
    /// Args:
    ///     ids: its tokens, any one-dimensional sequence or array of integers.
    ///
    /// Raises:
    ///     InvalidTokenError: an id is not an integer or outside the vocabulary; nothing is added.
    ///     OSError: the temporary file cannot be written.
    ///     InvalidArgumentError: ``max_memory`` would give more than 64 segments.
    ///     MemoryError: there is no memory for it.
    ///     ClosedError: the builder is finished or closed.
    ///
    /// A builder whose file is torn by an error in the middle of a document, Ctrl-C included, closes itself.
    fn add(&self, ids: &Bound<'_, PyAny>) -> PyResult<()> {
        self.with_tokens(ids, |builder, document| builder.add_document(document))
    }

    /// Adds a stretch of a token stream in which ``end_token_id`` is the last token of each document. The last
    /// document goes on with the next call, until ``end_stream`` or ``finish``.
    ///
    /// Raises:
    ///     As ``add``.
    fn add_stream(&self, ids: &Bound<'_, PyAny>, end_token_id: u32) -> PyResult<()> {
        self.with_tokens(ids, move |builder, stream| builder.add_stream(stream, end_token_id))
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
    ///     progress: called about twenty times a second with the symbols indexed, and learned from, so far and their
    ///         total.
    ///
    /// Raises:
    ///     OSError: the file cannot be written; the target is as it was.
    ///     MemoryError: there is no memory to sort it; the target is as it was. ``max_memory`` takes less.
    ///     ClosedError: the builder is finished or closed.
    #[pyo3(signature = (progress=None))]
    fn finish(&self, py: Python<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<PyBuildSummary> {
        let builder = self.take(py).ok_or_else(|| finished(py))?;
        let (total, temporary) = (builder.work(), builder.temporary_path().to_owned());
        let watch = Arc::new(Progress::default());
        let worker = Arc::clone(&watch);
        // on a thread of its own, for the sorter cannot be interrupted
        let mut running = Running::start(py, move || builder.finish(&worker));
        loop {
            if let Some(result) = running.wait(py)? {
                return result.map(PyBuildSummary).map_err(|failure| raised(py, failure));
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
    fn close(&self, py: Python<'_>) {
        let builder = self.take(py);
        py.detach(|| drop(builder));
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
        if kind.is_none()
            && !py.detach(|| self.builder.lock().unwrap_or_else(PoisonError::into_inner).is_none())
        {
            self.finish(py, None)?;
        }
        self.close(py);
        Ok(())
    }
}

/// What a build wrote.
#[pyclass(frozen, eq, hash, name = "BuildSummary", module = "sssd.datastore")]
#[derive(PartialEq, Eq, Hash)]
pub struct PyBuildSummary(BuildSummary);

#[pymethods]
impl PyBuildSummary {
    #[new]
    fn new(tokens: u64, documents: u64, duplicates: u64, segments: u64, file_bytes: u64) -> Self {
        Self(BuildSummary { tokens, documents, duplicates, segments, file_bytes })
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let BuildSummary { tokens, documents, duplicates, segments, file_bytes } = slf.get().0;
        let fields = (tokens, documents, duplicates, segments, file_bytes);
        Ok((slf.get_type().into_any(), fields.into_pyobject(slf.py())?))
    }

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

pub fn finished(py: Python<'_>) -> PyErr {
    error(py, "ClosedError", "the builder is finished or closed")
}

fn checked_fingerprint(py: Python<'_>, bytes: &[u8]) -> PyResult<Fingerprint> {
    bytes.try_into().map_err(|_| {
        let message = format!("fingerprint must be 32 bytes, got {}", bytes.len());
        error(py, "InvalidArgumentError", message)
    })
}
