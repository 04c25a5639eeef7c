//! Raises the exception classes of `sssd.errors`.

use pyo3::prelude::*;

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
