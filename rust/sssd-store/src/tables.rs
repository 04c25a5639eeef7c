//! The tables for ranking candidates, as they stand in a file: one row of signed bytes a token in each of three tables.

use std::ops::Range;
use std::sync::Arc;

use sssd_core::{CONTEXT, DIMENSIONS, LogBilinear, Output, Row, Token};

use crate::bytes::Bytes;
use crate::format::{PARAMETERS, ROWS, WEIGHTS, rows_at};
use crate::residency::Reach;

/// Of the context's positions and of the topic.
pub type Weights = [[f32; DIMENSIONS]; CONTEXT + 1];

pub const INPUT: usize = 0;
pub const TOPICS: usize = 1;
pub const OUTPUT: usize = 2;

/// Those of an open file.
pub struct Tables {
    bytes: Arc<Bytes>,
    place: Range<usize>,
    vocab_size: u32,
    /// Tokens that they were learned from.
    learned: u64,
    id: u64,
    weights: Box<Weights>,
}

impl Tables {
    /// `place` must have been found to be as long as [`tables_length`] says. What the weights of the context are that the
    /// file has, or why it cannot be read.
    pub fn open(
        bytes: &Arc<Bytes>,
        place: &Range<u64>,
        vocab_size: u32,
        learned: u64,
        id: u64,
    ) -> std::io::Result<Self> {
        let mut read = [0; WEIGHTS as usize];
        bytes.read(place.start, &mut read)?;
        let mut weights = Box::new([[0.0; DIMENSIONS]; CONTEXT + 1]);
        let numbers = read.as_chunks().0.iter().map(|&number| f32::from_le_bytes(number));
        for (weight, number) in weights.as_flattened_mut().iter_mut().zip(numbers) {
            *weight = if number.is_finite() { number } else { 0.0 };
        }
        let (bytes, place) = (Arc::clone(bytes), place.start as usize..place.end as usize);
        Ok(Self { bytes, place, vocab_size, learned, id, weights })
    }

    /// Tokens that they were learned from.
    pub fn learned(&self) -> u64 {
        self.learned
    }

    /// Their bytes in the file.
    pub fn place(&self) -> Range<u64> {
        self.place.start as u64..self.place.end as u64
    }

    /// Copies some of the section, without touching mapped pages.
    pub fn read(&self, at: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.bytes.read(self.place.start as u64 + at, out)
    }

    #[inline(always)]
    fn at<const LENGTH: usize>(&self, at: usize) -> Option<&[u8; LENGTH]> {
        if self.bytes.residency().is_some_and(|resident| !resident.has(at, LENGTH)) {
            return None;
        }
        self.bytes.get(at..)?.first_chunk()
    }

    /// A token's row of a table, and its parameters, of which one is the row's scale.
    #[inline(always)]
    fn row(&self, table: usize, token: Token) -> Option<(Row<'_>, [f32; PARAMETERS])> {
        if token >= self.vocab_size {
            return None;
        }
        let row = table * self.vocab_size as usize + token as usize;
        let values = self.at(self.place.start + rows_at(self.vocab_size) as usize + row * DIMENSIONS)?;
        let at = self.place.start + WEIGHTS as usize + token as usize * PARAMETERS * 4;
        let parameters: &[u8; PARAMETERS * 4] = self.at(at)?;
        let number = |index: usize| std::array::from_fn(|byte| parameters[index * 4 + byte]);
        let parameters = std::array::from_fn(|index| f32::from_le_bytes(number(index)));
        Some((Row { values, scale: parameters[table] }, parameters))
    }
}

impl LogBilinear for Tables {
    fn id(&self) -> u64 {
        self.id
    }

    fn weights(&self) -> &Weights {
        &self.weights
    }

    #[inline(always)]
    fn input(&self, token: Token) -> Option<Row<'_>> {
        self.row(INPUT, token).map(|found| found.0)
    }

    #[inline(always)]
    fn topic(&self, token: Token) -> Option<Row<'_>> {
        self.row(TOPICS, token).map(|found| found.0)
    }

    #[inline(always)]
    fn output(&self, token: Token) -> Option<Output<'_>> {
        let (row, parameters) = self.row(OUTPUT, token)?;
        Some(Output { row, bias: parameters[ROWS], share: parameters[ROWS + 1] })
    }
}
