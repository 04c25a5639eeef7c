//! The Python extension module `sssd._core`: conversion, errors and GIL release, no logic.

mod batch;
mod boundary;
mod copies;
mod corpora;
mod datastore;
mod documents;
mod draft_batch;
mod drafter;
mod errors;
mod guide;
mod logits;
mod pass;
mod rows;
mod sequence;
mod shutdown;
mod sizing;
mod source;
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
    use datastore::{PyBuildSummary, PyDatastore, PyDatastoreBuilder, PyDatastoreInfo, PyFileInfo};
    #[pymodule_export]
    use documents::PyDocuments;
    #[pymodule_export]
    use documents::write_tombstones;
    #[pymodule_export]
    use draft_batch::PyDraftBatch;
    #[pymodule_export]
    use drafter::PyDrafter;
    #[pymodule_export]
    use logits::top_k;
    #[pymodule_export]
    use pass::PyPassBlock;
    #[pymodule_export]
    use sequence::PySequence;
    #[pymodule_export]
    use sizing::{PyCostGrid, PyPace, PyPassCosts, PySizingRule};
    #[pymodule_export]
    use tree::PyDraftTree;

    /// Python aligns objects to two words, and PyO3 puts these inside: what needs more has to be boxed.
    const fn fits<T>() {
        assert!(align_of::<T>() <= 2 * size_of::<usize>());
    }

    const _: () = {
        fits::<PyDraftBatch>();
        fits::<PyCostGrid>();
        fits::<PyPace>();
        fits::<PyPassBlock>();
        fits::<PyPassCosts>();
        fits::<PySizingRule>();
        fits::<PyBuildSummary>();
        fits::<PyDatastore>();
        fits::<PyDatastoreBuilder>();
        fits::<PyDatastoreInfo>();
        fits::<PyFileInfo>();
        fits::<PyDocuments>();
        fits::<PyDrafter>();
        fits::<PySequence>();
        fits::<PyDraftTree>();
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("SOURCES", PyTuple::new(module.py(), sssd_core::SOURCES)?)?;
        module.add("MAX_NODES", sssd_core::MAX_NODES)?;
        module.add("TOP_K", sssd_core::TOP_K)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("build_profile", if cfg!(debug_assertions) { "debug" } else { "release" })
    }
}
