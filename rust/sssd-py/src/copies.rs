//! Pickles and copies: of what is mere data; the others say what to do instead.

use numpy::PyArray1;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyTuple};

use crate::datastore::PyDatastoreBuilder;
use crate::draft_batch::PyDraftBatch;
use crate::drafter::PyDrafter;
use crate::pass::PyPassBlock;
use crate::sequence::PySequence;
use crate::sizing::{PyCostGrid, PyPace, PyPassCosts, PySizingRule};
use crate::tree::PyDraftTree;

/// What makes the object again, and its arguments.
type Reduced<'py> = (Bound<'py, PyAny>, Bound<'py, PyTuple>);

#[pymethods]
impl PyDraftTree {
    fn __reduce__<'py>(this: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let (py, tree) = (this.py(), this.get());
        let probs: Vec<f32> = tree.0.probs.clone();
        let sources = PyArray1::from_iter(py, tree.0.sources.iter().map(|&source| source as i8));
        let arguments = (tree.token_ids(py), tree.parents(py), probs, sources);
        Ok((this.get_type().into_any(), arguments.into_pyobject(py)?))
    }
}

#[pymethods]
impl PyDraftBatch {
    fn __reduce__<'py>(this: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let py = this.py();
        let trees = (0..this.len()?).map(|at| this.get_item(at)).collect::<PyResult<Vec<_>>>()?;
        Ok((this.getattr("from_trees")?, (trees,).into_pyobject(py)?))
    }
}

#[pymethods]
impl PyPassCosts {
    fn __reduce__<'py>(this: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let py = this.py();
        let make = py.import("functools")?.getattr("partial")?;
        let packed = [("packed", this.get().is_packed())].into_py_dict(py)?;
        let make = make.call((this.get_type(),), Some(&packed))?;
        let arguments = (this.getattr("sizes")?, this.getattr("seconds")?.call_method0("tolist")?);
        Ok((make, arguments.into_pyobject(py)?))
    }
}

macro_rules! not_to_be_copied {
    ($($class:ty: $name:literal, $advice:literal;)*) => {$(
        #[pymethods]
        impl $class {
            fn __reduce__(&self) -> PyResult<()> {
                Err(PyTypeError::new_err(concat!($name, " cannot be pickled or copied; ", $advice)))
            }
        }
    )*};
}

not_to_be_copied! {
    PyDrafter: "a Drafter", "use Drafter.save and Drafter.load";
    PySequence: "a Sequence", "use Sequence.fork, or begin one from its token_ids where the drafter is";
    PyDatastoreBuilder: "a DatastoreBuilder", "build in one process, and open the finished file by its path in others";
    PyPassBlock: "a PassBlock", "make one where it is used, or send its arrays";
    PySizingRule: "a SizingRule", "make one from its curve where it is used";
    PyPace: "a Pace", "it belongs to a sequence and its rule";
    PyCostGrid: "a CostGrid", "make one from its numbers where it is used";
}
