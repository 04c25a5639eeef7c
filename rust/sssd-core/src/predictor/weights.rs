//! What the predictor has learned: how far to trust which evidence. Constant size, updated only from tokens that
//! the target model really produced.
//!
//! Four tables, in the order in which a prediction passes them:
//! - *escapes*: the probability that the next token is none of those seen after contexts of a kind (prediction by
//!   partial matching, with the escape probabilities learned as in PPMII's secondary estimation);
//! - *gates*: the weight of each source in the mixture, a softmax trained by gradient on the log-likelihood;
//! - *refinements*: from the mixed probability of a token and which sources hold it to the share of such tokens
//!   that came true (adaptive probability maps, as in context-mixing compressors);
//! - *ages*: a bias on the log-odds by age of the output and kind of evidence.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use thiserror::Error;

use crate::memory::{MemoryFull, Reservation, try_clone, try_reserve};
use crate::predictor::support::{KINDS, ROWS};
use crate::sources::{self, BLENDED, CLASSES, FEEDBACK, SUCCESSORS};

/// Buckets of an escape: occurrences, and different successors (for feedback: positions, and first probability).
const COUNTS: usize = 8;
const DISTINCTS: usize = 5;
/// Buckets of a source's best probability.
const PEAKS: usize = 8;
/// Steps of the scale of probabilities, and the one of probability one half.
pub const PROBABILITIES: usize = 17;
const HALF: f32 = 8.5;
/// Ages of an output: powers of two of tokens.
const AGES: usize = 9;

const ESCAPES: usize = BLENDED * CLASSES * COUNTS * DISTINCTS;
const REFINEMENTS: usize = ROWS * PROBABILITIES;
const GATES: usize = sources::COUNT * CLASSES * PEAKS;
const BIASES: usize = AGES * KINDS;
/// Where the tables begin, in words of 32 bits, and how many words there are.
const REFINEMENTS_AT: usize = ESCAPES;
const GATES_AT: usize = REFINEMENTS_AT + REFINEMENTS;
const AGES_AT: usize = GATES_AT + GATES;
/// Words of all tables.
pub const WORDS: usize = ESCAPES + REFINEMENTS + GATES + BIASES;

/// What stands before the tables: magic, version of the layout, then the shape of each table in their order. Tables
/// of another shape, or whose rows mean something else, are other weights: whoever changes what a row means counts
/// the version up.
const MAGIC: [u8; 8] = *b"sssd wts";
const VERSION: u32 = 4;
const SHAPES: [usize; 11] =
    [BLENDED, CLASSES, COUNTS, DISTINCTS, ROWS, PROBABILITIES, sources::COUNT, CLASSES, PEAKS, AGES, KINDS];
const HEADER: [u8; MAGIC.len() + 4 + 4 * SHAPES.len()] = {
    let mut header = [0; MAGIC.len() + 4 + 4 * SHAPES.len()];
    let mut at = 0;
    while at < header.len() {
        header[at] = match at {
            0..8 => MAGIC[at],
            8..12 => VERSION.to_le_bytes()[at - 8],
            _ => (SHAPES[at / 4 - 3] as u32).to_le_bytes()[at % 4],
        };
        at += 1;
    }
    header
};
const BYTES: usize = HEADER.len() + 4 * WORDS;

/// The weights that ship with the package, learned by `benches/train_weights.py` as `weights.toml` says.
const SHIPPED: &[u8] = include_bytes!("weights.bin");
/// Set when the package is built to learn weights for tables of new shapes.
const UNTRAINED: bool = option_env!("SSSD_UNTRAINED").is_some();
const _: () = assert!(
    UNTRAINED || fits(SHIPPED),
    "weights.bin is not of this predictor: docs/predictor.md says how to learn new weights"
);

/// Whether bytes have the length and the header of weights.
const fn fits(bytes: &[u8]) -> bool {
    let mut same = bytes.len() == BYTES;
    let mut at = 0;
    while same && at < HEADER.len() {
        same = bytes[at] == HEADER[at];
        at += 1;
    }
    same
}

/// No cell counts more outcomes.
const MOST_OUTCOMES: u16 = 255;
const FLOAT_LIMIT: f32 = 8.0;

/// Why bytes are not the weights of this predictor.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum WeightsError {
    /// There is no memory for them.
    #[error(transparent)]
    Memory(#[from] MemoryFull),
    /// They do not begin like weights, or are cut short.
    #[error("these are no weights of a predictor")]
    Foreign,
    /// Another layout.
    #[error("the weights are of layout {0}, not {VERSION}")]
    Version(u32),
    /// Tables of another predictor.
    #[error("the tables of the weights have other shapes than the predictor's")]
    Shapes,
    /// Numbers that no predictor learns.
    #[error("the weights hold values out of range")]
    Values,
}

/// A learned probability, in units of 2^-16, and how many outcomes stand behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    pub value: u16,
    pub count: u16,
}

impl Rate {
    pub fn new(value: f32, count: u16) -> Self {
        Self { value: (value * 65536.0).min(65535.0) as u16, count }
    }

    pub fn from_word(word: u32) -> Self {
        Self { value: word as u16, count: (word >> 16) as u16 }
    }

    pub fn to_word(self) -> u32 {
        u32::from(self.count) << 16 | u32::from(self.value)
    }

    pub fn get(self) -> f32 {
        f32::from(self.value) * (1.0 / 65536.0)
    }

    /// Forgets the past with a rate of at least one over `memory` outcomes.
    pub fn update(&mut self, outcome: bool, memory: u16) {
        self.count = (self.count + 1).min(memory);
        let target = if outcome { 65535 } else { 0 };
        let step = (target - i32::from(self.value)) / i32::from(self.count);
        self.value = (i32::from(self.value) + step) as u16;
    }

    /// Takes over a quarter of the way to another.
    fn approach(&mut self, other: Self) {
        self.value = (i32::from(self.value) + (i32::from(other.value) - i32::from(self.value)) / 4) as u16;
    }
}

/// The learned tables, one after the other: words of 32 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    words: Box<[u32]>,
}

impl Default for Model {
    /// The weights that ship with the package.
    fn default() -> Self {
        if UNTRAINED { None } else { Self::from_tables(SHIPPED).ok() }.unwrap_or_else(Self::untrained)
    }
}

/// An escape cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EscapeCell(u16);

/// A gate cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateCell(u16);

impl EscapeCell {
    /// Its word.
    pub fn word(self) -> usize {
        usize::from(self.0)
    }
}

impl GateCell {
    /// Its word.
    pub fn word(self) -> usize {
        GATES_AT + usize::from(self.0)
    }
}

/// The word of a refinement.
pub fn refinement_word(row: usize, step: usize) -> usize {
    REFINEMENTS_AT + row * PROBABILITIES + step
}

/// The word of the first kind's bias for an output of `tokens` tokens; those of the other kinds follow.
pub fn ages_word(tokens: usize) -> usize {
    AGES_AT + (tokens.max(1).ilog2() as usize).min(AGES - 1) * KINDS
}

impl Model {
    /// Plausible weights from no experience.
    fn untrained() -> Self {
        let escape = |cell: usize| {
            let (distinct, cell) = (cell % DISTINCTS, cell / DISTINCTS);
            let (count, class) = (cell % COUNTS, cell / COUNTS % CLASSES);
            let n = [1.0, 2.0, 3.0, 4.5, 7.0, 14.0, 30.0, 64.0][count];
            let d = [1.0f32, 2.0, 3.5, 7.0, 20.0][distinct].min(n);
            Rate::new((d + 0.3) / (n + d + 0.6) / (1.0 + 0.35 * class as f32), 12).to_word()
        };
        let gate = |cell: usize| if cell / (PEAKS * CLASSES) == SUCCESSORS { -2f32 } else { 0.0 }.to_bits();
        let refinement = |cell: usize| {
            let steps = (cell % PROBABILITIES) as f32 - HALF;
            let tail = 0.5 * 2f32.powf(-steps.abs());
            Rate::new(if steps < 0.0 { tail } else { 1.0 - tail }, 20).to_word()
        };
        let rates = (0..ESCAPES).map(escape).chain((0..REFINEMENTS).map(refinement));
        Self { words: rates.chain((0..GATES).map(gate)).chain([0; BIASES]).collect() }
    }

    /// The header and the tables as little-endian bytes: escapes and refinements as (value, count) in 16 bits each,
    /// then gates and ages as 32-bit floats.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MemoryFull> {
        let mut bytes = Vec::new();
        try_reserve(&mut bytes, BYTES)?;
        bytes.extend(HEADER.into_iter().chain(self.words.iter().flat_map(|word| word.to_le_bytes())));
        Ok(bytes)
    }

    /// Whether bytes are those of the weights that ship.
    pub fn is_shipped(bytes: &[u8]) -> bool {
        bytes == SHIPPED
    }

    /// The tables from [`Model::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WeightsError> {
        let start = bytes.get(..HEADER.len()).ok_or(WeightsError::Foreign)?;
        let version = [start[8], start[9], start[10], start[11]];
        if start[..8] != MAGIC {
            return Err(WeightsError::Foreign);
        } else if version != VERSION.to_le_bytes() {
            return Err(WeightsError::Version(u32::from_le_bytes(version)));
        } else if start != HEADER {
            return Err(WeightsError::Shapes);
        } else if !fits(bytes) {
            return Err(WeightsError::Foreign);
        }
        let model = Self::from_tables(bytes)?;
        let sound = model.words[GATES_AT..].iter().all(|&word| f32::from_bits(word).abs() <= FLOAT_LIMIT);
        if sound { Ok(model) } else { Err(WeightsError::Values) }
    }

    /// From bytes that fit.
    fn from_tables(bytes: &[u8]) -> Result<Self, MemoryFull> {
        let read: &[[u8; 4]] = bytes[HEADER.len()..].as_chunks().0;
        let mut words = Vec::new();
        try_reserve(&mut words, WORDS)?;
        words.extend(read.iter().map(|&word| u32::from_le_bytes(word)));
        for word in &mut words[..GATES_AT] {
            let Rate { value, count } = Rate::from_word(*word);
            *word = Rate { value, count: count.min(MOST_OUTCOMES) }.to_word();
        }
        Ok(Self { words: words.into() })
    }

    /// The cell of contexts of `class` that occurred `count` times with `distinct` different successors.
    pub fn escape_cell(source: usize, class: usize, count: f32, distinct: u32) -> EscapeCell {
        let count = match count as u32 {
            0..=1 => 0,
            2 => 1,
            3 => 2,
            4..=5 => 3,
            6..=9 => 4,
            10..=19 => 5,
            20..=49 => 6,
            _ => 7,
        };
        let distinct = match distinct {
            0..=1 => 0,
            2 => 1,
            3..=4 => 2,
            5..=9 => 3,
            _ => 4,
        };
        EscapeCell((((source * CLASSES + class) * COUNTS + count) * DISTINCTS + distinct) as u16)
    }

    /// The cell of distributions known for contexts of `class` from `writes` positions, which gave their first
    /// token probability `peak`.
    pub fn feedback_cell(class: usize, writes: u8, peak: f32) -> EscapeCell {
        let peak = (peak * (DISTINCTS as f32 - 0.01)) as usize;
        let count = (u32::from(writes) + 1).ilog2() as usize;
        let cell = ((FEEDBACK * CLASSES + class) * COUNTS + count.min(COUNTS - 1)) * DISTINCTS;
        EscapeCell((cell + peak.min(DISTINCTS - 1)) as u16)
    }

    /// The cell of a source whose longest context is of `class` and whose best token has probability `peak`.
    pub fn gate_cell(source: usize, class: usize, peak: f32) -> GateCell {
        let peak = usize::from((peak * PEAKS as f32) as u8).min(PEAKS - 1);
        GateCell(((source * CLASSES + class) * PEAKS + peak) as u16)
    }

    /// All words.
    #[inline]
    pub(crate) fn words(&self) -> &[u32] {
        &self.words
    }

    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }

    /// Moves a word towards what a request has made of it since it was `before`, by a quarter of the way.
    pub(crate) fn approach(&mut self, word: usize, before: u32, after: u32) {
        if before == after {
            return;
        }
        let own = &mut self.words[word];
        *own = if word < GATES_AT {
            let mut rate = Rate::from_word(*own);
            rate.approach(Rate::from_word(after));
            rate.to_word()
        } else {
            let value = f32::from_bits(*own);
            (value + (f32::from_bits(after) - value) / 4.0).to_bits()
        };
    }

    /// A copy, if there is memory for it.
    pub(crate) fn try_clone(&self) -> Result<Self, MemoryFull> {
        Ok(Self { words: try_clone(&self.words)?.into() })
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&*self.words)
    }
}

/// Weights that many may have, and what pays for them: nothing for those that ship.
pub struct Weights {
    model: Model,
    paid: Option<Reservation>,
}

impl Weights {
    pub(crate) fn shipped() -> Arc<Self> {
        static SHIPPED: OnceLock<Arc<Weights>> = OnceLock::new();
        Arc::clone(SHIPPED.get_or_init(|| Arc::new(Self { model: Model::default(), paid: None })))
    }

    pub(crate) fn new(model: Model, mut paid: Reservation) -> Result<Arc<Self>, MemoryFull> {
        paid.try_resize(model.memory_bytes())?;
        Ok(Arc::new(Self { model, paid: Some(paid) }))
    }

    /// The weights to change; a copy that `paid` pays for, if others have them too.
    pub(crate) fn own(this: &mut Arc<Self>, mut paid: Reservation) -> Result<&mut Model, MemoryFull> {
        if Arc::get_mut(this).is_none() {
            paid.try_resize(this.model.memory_bytes())?;
            *this = Self::new(this.model.try_clone()?, paid)?;
        }
        // nobody else has it
        Arc::get_mut(this).map(|own| &mut own.model).ok_or(MemoryFull::System { wanted: 0 })
    }

    /// Bytes charged.
    pub(crate) fn charged_bytes(&self) -> usize {
        self.paid.as_ref().map_or(0, Reservation::bytes)
    }
}

impl Deref for Weights {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

/// One step for each halving of the probability, or above one half of its complement.
pub fn scale(probability: f32) -> f32 {
    // the binary logarithm, linear within octaves
    let log2 = |value: f32| value.to_bits() as f32 * (1.0 / (1 << 23) as f32) - 127.0;
    let steps = 1.0 + log2(probability.min(1.0 - probability));
    (if probability < 0.5 { HALF + steps } else { HALF - steps }).clamp(0.0, PROBABILITIES as f32 - 1.001)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources::{REQUEST, STORE};

    #[test]
    fn shipped_weights_are_those_of_this_predictor() {
        assert_eq!(Model::from_bytes(SHIPPED), Ok(Model::default()));
        assert_eq!(Model::default().to_bytes().unwrap(), SHIPPED);
        assert!(Model::is_shipped(SHIPPED) && !Model::is_shipped(&SHIPPED[1..]));
    }

    #[test]
    fn bytes_round_trip_and_others_are_refused() {
        let mut model = Model::default();
        let changed = [
            (Model::gate_cell(STORE, 3, 0.5).word(), 0.75f32.to_bits()),
            (Model::escape_cell(REQUEST, 11, 1.0, 1).word(), Rate::new(0.25, 7).to_word()),
            (ages_word(5) + 3, 0.5f32.to_bits()),
        ];
        changed.iter().for_each(|&(word, value)| model.words[word] = value);
        let bytes = model.to_bytes().unwrap();
        // escapes, refinements, gates, ages: as those who learn weights have it
        let at = |word: usize| &bytes[HEADER.len() + 4 * word..][..4];
        assert_eq!(at(ESCAPES + REFINEMENTS + (STORE * CLASSES + 3) * PEAKS + 4), 0.75f32.to_le_bytes());
        assert_eq!(at((REQUEST * CLASSES + 11) * COUNTS * DISTINCTS), [0, 64, 7, 0]);
        assert_eq!(at(ESCAPES + REFINEMENTS + GATES + 2 * KINDS + 3), 0.5f32.to_le_bytes());
        assert_eq!(Model::from_bytes(&bytes), Ok(model));
        let changed = |at: usize, new: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            Model::from_bytes(&bytes)
        };
        assert_eq!(changed(0, b"S"), Err(WeightsError::Foreign));
        assert_eq!(changed(8, &[2]), Err(WeightsError::Version(2)));
        for shape in 0..SHAPES.len() {
            assert_eq!(changed(12 + 4 * shape, &[99]), Err(WeightsError::Shapes));
        }
        assert_eq!(changed(bytes.len() - 4, &f32::NAN.to_le_bytes()), Err(WeightsError::Values));
        for length in [0, HEADER.len() - 1, HEADER.len(), bytes.len() - 1] {
            assert_eq!(Model::from_bytes(&bytes[..length]), Err(WeightsError::Foreign));
        }
        assert_eq!(Model::from_bytes(&[&bytes[..], &[0]].concat()), Err(WeightsError::Foreign));
    }

    #[test]
    fn a_quarter_is_taken_over_of_what_has_changed_and_nothing_else() {
        let mut own = Model::default();
        let (gate, escape) = (Model::gate_cell(STORE, 3, 0.5).word(), 9);
        let before = [gate, escape].map(|word| own.words[word]);
        let value = f32::from_bits(before[0]);
        own.approach(gate, before[0], (value + 0.4).to_bits());
        own.approach(escape, before[1], before[1] ^ 64);
        assert!((f32::from_bits(own.words[gate]) - value - 0.1).abs() < 1e-6);
        assert_eq!(own.words[escape].abs_diff(before[1]), 16);
        // what went back to what it was, whatever others have made of it since
        own.approach(gate, before[0], before[0]);
        assert!((f32::from_bits(own.words[gate]) - value - 0.1).abs() < 1e-6);
        (own.words[gate], own.words[escape]) = (before[0], before[1]);
        assert!(own == Model::default());
    }

    #[test]
    fn rates_move_towards_outcomes_and_stay_probabilities() {
        let mut rate = Rate::new(0.5, 0);
        for outcome in [true, false].repeat(4).into_iter().chain([true; 2000]) {
            rate.update(outcome, 60);
        }
        assert!(rate.get() > 0.98 && rate.get() < 1.0);
        (0..4000).for_each(|_| rate.update(false, 60));
        assert!(rate.get() < 0.02);
        assert_eq!(Rate::from_word(rate.to_word()), rate);
    }
}
