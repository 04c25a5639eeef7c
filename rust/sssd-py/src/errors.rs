//! Raises the exception classes of `sssd.errors`.

use std::io;
use std::path::Path;

use pyo3::exceptions::{PyMemoryError, PyOSError};
use pyo3::prelude::*;
use sssd_store::Error;

use crate::shutdown::defer_shutdown;

/// The exception `sssd.errors.<class>(message)`.
pub fn error(py: Python<'_>, class: &str, message: impl Into<String>) -> PyErr {
    let _deferred = defer_shutdown(py);
    let raise = || -> PyResult<PyErr> {
        let class = py.import("sssd.errors")?.getattr(class)?;
        Ok(PyErr::from_value(class.call1((message.into(),))?))
    };
    raise().unwrap_or_else(|error| error)
}

/// The exception for what is wrong with a datastore.
pub fn raised(py: Python<'_>, failure: Error) -> PyErr {
    let class = match &failure {
        Error::Io { path, source } => return os_error(path, source),
        Error::Corrupt { .. } => "CorruptDatastoreError",
        Error::Version { .. } => "DatastoreVersionError",
        Error::Changed { .. } => "DatastoreChangedError",
        Error::OutOfMemory(_) => return PyMemoryError::new_err(failure.to_string()),
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
        None => {
            let code = match source.kind() {
                io::ErrorKind::IsADirectory => "EISDIR",
                io::ErrorKind::InvalidInput => "EINVAL",
                io::ErrorKind::OutOfMemory => "ENOMEM",
                io::ErrorKind::AlreadyExists => "EEXIST",
                _ => "EIO",
            };
            let code = Python::attach(|py| py.import("errno")?.getattr(code)?.extract::<i32>());
            match code {
                Ok(code) => PyOSError::new_err((code, source.to_string(), path.as_os_str().to_owned())),
                Err(raised) => raised,
            }
        }
    }
}
