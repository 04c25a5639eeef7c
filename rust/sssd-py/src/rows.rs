//! Whole token rows, as engines have them: what of them is new to a sequence.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PySlice;
use sssd_core::{MAX_NODES, Token};
use sssd_engine::{Engine, Request, RequestError, shared_prefix};

use crate::boundary::{LONG, memory_full, not_negative, with_request};
use crate::tokens::history_into;

/// What a row has in common with a sequence.
#[derive(Default)]
pub struct Overlap {
    /// Tokens that the sequence holds.
    pub held: usize,
    /// Of these, tokens that it keeps.
    pub keep: usize,
}

/// How many tokens at the end of what a row and a sequence have in common are compared; all of them if None.
pub fn compared(py: Python<'_>, compare: Option<i128>) -> PyResult<Option<usize>> {
    compare.map(|compare| not_negative(py, "compare", compare)).transpose()
}

/// Appends the tokens of `row` that the request has yet to get to `out`. As engines change rows only at their end, the last
/// `compare` tokens speak for those before them; where they differ, and without `compare`, all are compared.
pub fn read_row(
    engine: &Engine,
    request: &Arc<Request>,
    row: &Bound<'_, PyAny>,
    compare: Option<usize>,
    out: &mut Vec<Token>,
) -> PyResult<Result<Overlap, RequestError>> {
    let (py, start) = (row.py(), out.len());
    let held = match with_request(py, request, false, |sequence| sequence.tokens().len())? {
        Ok(held) => held,
        Err(failure) => return Ok(Err(failure)),
    };
    // what has no length is no row, as reading it tells
    let length = row.len().unwrap_or(0);
    let trusted = compare.map_or(0, |compare| held.min(length).saturating_sub(compare));
    for from in [trusted, 0] {
        if length - from > LONG {
            engine.may_hold(length - held.min(length)).map_err(|full| memory_full(py, &full))?;
        }
        out.truncate(start);
        read_from(row, from, length, engine.options().vocab_size, out)?;
        let new = &out[start..];
        let found = with_request(py, request, new.len() > MAX_NODES, |sequence| {
            shared_prefix(sequence.tokens(), from, new)
        })?;
        match found {
            Ok(Some(keep)) => {
                out.drain(start..start + keep - from);
                return Ok(Ok(Overlap { held, keep }));
            }
            Ok(None) => {}
            Err(failure) => return Ok(Err(failure)),
        }
    }
    Ok(Ok(Overlap { held, keep: 0 }))
}

/// Reads a row from one of its tokens on.
fn read_from(
    row: &Bound<'_, PyAny>,
    from: usize,
    length: usize,
    vocab_size: Option<u32>,
    out: &mut Vec<Token>,
) -> PyResult<()> {
    if from > 0
        && let Ok(end) = row.get_item(PySlice::new(row.py(), from as isize, length as isize, 1))
    {
        return history_into(&end, vocab_size, out);
    }
    let start = out.len();
    history_into(row, vocab_size, out)?;
    out.drain(start..(start + from).min(out.len()));
    Ok(())
}
