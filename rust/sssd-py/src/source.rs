//! Where a datastore is opened from: files, or the folder of a corpus, of which `sssd.corpus` tells the files.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::exceptions::{PyImportError, PyTypeError};
use pyo3::prelude::*;
use sssd_store::{Datastore, DomainRun, Error, Load, Progress};

use crate::boundary::{enter, watched};
use crate::errors::{error, raised};
use crate::shutdown::defer_shutdown;

/// How often a corpus is listed anew because a file of it has been merged away meanwhile.
const ATTEMPTS: usize = 10;
/// Files with fewer bytes are read at once.
const LARGE: u64 = 64 << 20;

/// Documents, tokens, and the domain of those that follow one another in a file.
pub type Run = (u64, u64, u8);
/// A file, that of its tombstones, and its domains: one by itself if that is not said.
pub type File = (PathBuf, Option<PathBuf>, Option<Vec<Run>>);

/// What can be opened again and again.
#[derive(Clone, PartialEq)]
pub struct Source {
    place: Place,
    load: Load,
}

#[derive(Clone, PartialEq)]
enum Place {
    Files(Vec<File>),
    /// Of a corpus.
    Folder(PathBuf),
}

impl Source {
    /// Of what Python gives.
    pub fn new(
        paths: &Bound<'_, PyAny>,
        tombstones: Option<&Bound<'_, PyAny>>,
        domains: Option<&Bound<'_, PyAny>>,
        load: &str,
    ) -> PyResult<Self> {
        let py = paths.py();
        let load = match load {
            "mmap" => Load::Mmap,
            "mmap-wait" => Load::MmapWait,
            "ram" => Load::Ram,
            other => {
                let message = format!("load must be \"mmap\", \"mmap-wait\" or \"ram\", got {other:?}");
                return Err(error(py, "InvalidArgumentError", message));
            }
        };
        let paths = match paths.extract::<PathBuf>() {
            Ok(path) => vec![path],
            Err(_) => paths.extract::<Vec<PathBuf>>().map_err(|_| {
                PyTypeError::new_err(format!("paths must be a path or a sequence of paths, got {paths}"))
            })?,
        };
        if let ([path], None, None) = (paths.as_slice(), tombstones, domains)
            && enter(py, true, || path.is_dir())?
        {
            return Ok(Self { place: Place::Folder(path.clone()), load });
        }
        let buried = match tombstones {
            None => vec![None; paths.len()],
            Some(given) => given.extract::<Vec<Option<PathBuf>>>().map_err(|_| {
                PyTypeError::new_err(format!("tombstones must be a sequence of paths and None, got {given}"))
            })?,
        };
        if buried.len() != paths.len() {
            let (given, files) = (buried.len(), paths.len());
            let message =
                format!("tombstones must be one path or None for each of the {files} files, got {given}");
            return Err(error(py, "InvalidArgumentError", message));
        }
        let runs = match domains {
            None => vec![None; paths.len()],
            Some(given) => {
                let runs = given.extract::<Vec<Vec<Run>>>().map_err(|_| {
                    let what = "lists of (documents, tokens, domain)";
                    PyTypeError::new_err(format!("domains must be {what}, one for each file, got {given}"))
                })?;
                runs.into_iter().map(Some).collect()
            }
        };
        if runs.len() != paths.len() {
            let (given, files) = (runs.len(), paths.len());
            let message = format!("domains must be one list for each of the {files} files, got {given}");
            return Err(error(py, "InvalidArgumentError", message));
        }
        let files = paths.into_iter().zip(buried).zip(runs);
        let files = files.map(|((path, tombstones), runs)| (path, tombstones, runs)).collect();
        Ok(Self { place: Place::Files(files), load })
    }

    /// The same, whatever the folder is changed to.
    pub fn absolute(mut self) -> Self {
        let absolute = |path: &mut PathBuf| {
            if let Ok(found) = std::path::absolute(&*path) {
                *path = found;
            }
        };
        match &mut self.place {
            Place::Folder(folder) => absolute(folder),
            Place::Files(files) => files.iter_mut().for_each(|(path, tombstones, _)| {
                absolute(path);
                tombstones.iter_mut().for_each(absolute);
            }),
        }
        self
    }

    /// Whether it is a corpus.
    pub fn is_folder(&self) -> bool {
        matches!(self.place, Place::Folder(_))
    }

    /// Of an open store's files.
    pub fn of_files(store: &Datastore) -> Self {
        let buried = store.tombstones_paths().map(|path| path.map(Path::to_owned));
        let runs = domains(store)
            .map_or_else(|| vec![None; store.files().len()], |runs| runs.into_iter().map(Some).collect());
        let files = store.absolute_paths().map(Path::to_owned).zip(buried).zip(runs);
        let files = files.map(|((path, tombstones), runs)| (path, tombstones, runs)).collect();
        Self { place: Place::Files(files), load: store.load() }
    }

    /// What there is now. Holds whatever happens to the names afterwards. An empty corpus is none.
    pub fn open(
        &self,
        py: Python<'_>,
        check: impl Fn(&Datastore) -> sssd_store::Result<()> + Clone + Send + 'static,
    ) -> PyResult<Option<Arc<Datastore>>> {
        self.attempt(py, |files| {
            if files.is_empty() && self.is_folder() {
                return Ok(Ok(None));
            }
            let (load, check) = (self.load, check.clone());
            let large =
                load == Load::Ram && enter(py, true, || files.iter().any(|(path, ..)| is_large(path)))?;
            let watch = Arc::new(Progress::default());
            let progress = Arc::clone(&watch);
            watched(py, large, &watch, move || {
                let store = open(&files, load, &progress)?;
                check(&store)?;
                Ok(Some(Arc::new(store)))
            })
        })
    }

    /// Whether `store` is what there is now.
    pub fn is_unchanged(&self, py: Python<'_>, store: Option<&Arc<Datastore>>) -> PyResult<bool> {
        self.attempt(py, |files| match store {
            None => Ok(Ok(files.is_empty())),
            Some(store) => enter(py, true, || {
                let files: Vec<_> =
                    files.iter().map(|(path, tombstones, _)| (path, tombstones.as_ref())).collect();
                store.is_of(&files)
            }),
        })
    }

    /// Lists the files for `act`, anew if one vanishes before it is open.
    fn attempt<T>(
        &self,
        py: Python<'_>,
        mut act: impl FnMut(Vec<File>) -> PyResult<sssd_store::Result<T>>,
    ) -> PyResult<T> {
        let mut left = if self.is_folder() { ATTEMPTS } else { 1 };
        loop {
            left -= 1;
            match act(self.files(py)?)? {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && left > 0 => {}
                done => return done.map_err(|failure| raised(py, failure)),
            }
        }
    }

    fn files(&self, py: Python<'_>) -> PyResult<Vec<File>> {
        let folder = match &self.place {
            Place::Files(files) => return Ok(files.clone()),
            Place::Folder(folder) => folder,
        };
        let _deferred = defer_shutdown(py);
        let module = py.import("sssd.corpus").map_err(|raised| {
            if !raised.is_instance_of::<PyImportError>(py) {
                return raised;
            }
            let message = format!(
                "{}: a folder is a corpus, and sssd.corpus, which reads it, is missing; name the datastore files",
                folder.display()
            );
            error(py, "InvalidArgumentError", message)
        })?;
        module.getattr("opened")?.call1((folder.as_os_str(),))?.extract()
    }
}

/// Of each file its domains, if they were said.
pub fn domains(store: &Datastore) -> Option<Vec<Vec<Run>>> {
    let runs = |file: &[DomainRun]| file.iter().map(|run| (run.documents, run.tokens, run.domain)).collect();
    Some(store.domains_of_files()?.map(runs).collect())
}

fn open(files: &[File], load: Load, progress: &Progress) -> sssd_store::Result<Datastore> {
    let paths: Vec<_> = files.iter().map(|(path, ..)| path).collect();
    let mut store = Datastore::open_watched(&paths, load, progress)?;
    for (file, (_, tombstones, _)) in files.iter().enumerate() {
        if let Some(path) = tombstones {
            store.add_tombstones(file, path, progress)?;
        }
    }
    let run = |&(documents, tokens, domain): &Run| DomainRun { documents, tokens, domain };
    let runs = files.iter().map(|(.., runs)| Some(runs.as_ref()?.iter().map(run).collect()));
    if let Some(domains) = runs.collect::<Option<Vec<_>>>() {
        store.set_domains(&domains)?;
        store.read_domains(progress)?;
    }
    Ok(store)
}

fn is_large(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.len() > LARGE)
}
