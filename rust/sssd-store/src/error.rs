use std::collections::TryReserveError;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with a datastore file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that was read or written.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is no datastore, is truncated, or has changed since it was written.
    #[error("{}: {problem}; restore the file from a copy or build it again", path.display())]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// What was found.
        problem: String,
    },
    /// The file of an open, mapped store has been changed in place since it was opened.
    #[error(
        "{}: {problem} since it was opened; open it again, and replace datastores by renaming (as the builder does) \
         or open them with load=\"ram\"",
        path.display()
    )]
    Changed {
        /// The changed file.
        path: PathBuf,
        /// What was found.
        problem: &'static str,
    },
    /// The system has no memory for what the file or the arguments ask for.
    #[error("not enough memory for {0}")]
    OutOfMemory(String),
    /// The file has a format version that this release cannot read.
    #[error(
        "{}: datastore format version {found}, but this release reads version {supported}; \
         upgrade sssd, or build the datastore again with this release",
        path.display()
    )]
    Version {
        /// The refused file.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Version that this release reads.
        supported: u32,
    },
    /// The file belongs to another vocabulary or tokenizer than expected.
    #[error("{}: {problem}; build the datastore again with this model's tokenizer", path.display())]
    Mismatch {
        /// The refused file.
        path: PathBuf,
        /// Both sides of the mismatch.
        problem: String,
    },
    /// A token id is not below the vocabulary size.
    #[error("token id {token} is outside the vocabulary of {vocab_size} tokens")]
    InvalidToken {
        /// The offending id.
        token: u32,
        /// Ids must be smaller than this.
        vocab_size: u32,
    },
    /// An argument is outside its documented range.
    #[error("{0}")]
    InvalidArgument(String),
    /// [`crate::Progress::cancel`] was called during the work.
    #[error("cancelled")]
    Cancelled,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.kind() {
            io::ErrorKind::OutOfMemory => Self::OutOfMemory(path.display().to_string()),
            _ => Self::Io { path: path.to_owned(), source },
        }
    }

    /// Of a read: one that found the end was of a file that had been longer.
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::corrupt(path, "shortened while it was read"),
            _ => Self::io(path)(source),
        }
    }

    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn memory(what: &'static str) -> impl FnOnce(TryReserveError) -> Self {
        move |_| Self::OutOfMemory(what.into())
    }
}
