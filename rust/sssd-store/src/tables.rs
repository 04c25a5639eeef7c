//! The tables for ranking candidates, as they stand in a file: one row of signed bytes a token in each of three tables.

use std::ops::Range;
use std::sync::Arc;

use sssd_core::{CONTEXT, DIMENSIONS, LogBilinear, Row, Token};

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

    #[inline]
    fn at<const LENGTH: usize>(&self, at: usize) -> Option<&[u8; LENGTH]> {
        if self.bytes.residency().is_some_and(|resident| !resident.has(at, LENGTH)) {
            return None;
        }
        self.bytes.get(at..)?.first_chunk()
    }

    #[inline]
    fn parameter(&self, token: Token, index: usize) -> Option<f32> {
        let at = WEIGHTS as usize + (token as usize * PARAMETERS + index) * 4;
        self.at(self.place.start + at).map(|&number| f32::from_le_bytes(number))
    }

    #[inline]
    fn row(&self, table: usize, token: Token) -> Option<Row<'_>> {
        if token >= self.vocab_size {
            return None;
        }
        let row = table * self.vocab_size as usize + token as usize;
        let values = self.at(self.place.start + rows_at(self.vocab_size) as usize + row * DIMENSIONS)?;
        Some(Row { values, scale: self.parameter(token, table)? })
    }
}

impl LogBilinear for Tables {
    fn id(&self) -> u64 {
        self.id
    }

    fn weights(&self) -> &Weights {
        &self.weights
    }

    fn input(&self, token: Token) -> Option<Row<'_>> {
        self.row(INPUT, token)
    }

    fn topic(&self, token: Token) -> Option<Row<'_>> {
        self.row(TOPICS, token)
    }

    fn output(&self, token: Token) -> Option<Row<'_>> {
        self.row(OUTPUT, token)
    }

    fn bias(&self, token: Token) -> (f32, f32) {
        if token >= self.vocab_size {
            return (0.0, NO_SHARE);
        }
        let [bias, share] = [ROWS, ROWS + 1].map(|index| self.parameter(token, index));
        (bias.unwrap_or(0.0), share.unwrap_or(NO_SHARE))
    }
}

/// The logarithm of the share of a token that the text does not have.
pub const NO_SHARE: f32 = -16.1;
