//! The Python extension module `sssd._core`: conversion, errors and GIL release, no logic.

mod batch;
mod budget;
mod datastore;
mod drafter;
mod ending;
mod errors;
mod state;
mod tokens;
mod tree;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Rust core of sssd.
#[pymodule(gil_used = false)]
mod _core {
    use super::*;

    #[pymodule_export]
    use batch::PyDraftBatch;
    #[pymodule_export]
    use budget::PyPassCosts;
    #[pymodule_export]
    use datastore::{PyBuildSummary, PyDatastore, PyDatastoreBuilder, PyDatastoreInfo, PyFileInfo};
    #[pymodule_export]
    use drafter::{PyDrafter, PySequence};
    #[pymodule_export]
    use tree::PyDraftTree;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("SOURCES", PyTuple::new(module.py(), sssd_core::SOURCES)?)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("build_profile", if cfg!(debug_assertions) { "debug" } else { "release" })
    }
}
