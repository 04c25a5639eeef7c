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

use thiserror::Error;

use crate::memory::{MemoryFull, try_clone};
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

/// What stands before the tables: magic, version of the layout, then the shape of each table in their order. Tables
/// of another shape, or whose rows mean something else, are other weights: whoever changes what a row means counts
/// the version up.
const MAGIC: [u8; 8] = *b"sssd wts";
const VERSION: u32 = 3;
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
const BYTES: usize = HEADER.len() + 4 * (ESCAPES + REFINEMENTS + GATES + BIASES);

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

/// A cell forgets the past with a rate of at least one over this many outcomes.
const ESCAPE_MEMORY: u16 = 60;
const REFINEMENT_MEMORY: u16 = 255;
const GATE_RATE: f32 = 0.02;
const GATE_LIMIT: f32 = 8.0;
const AGE_RATE: f32 = 0.01;
const AGE_LIMIT: f32 = 2.0;

/// Why bytes are not the weights of this predictor.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum WeightsError {
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

fn age(tokens: usize) -> usize {
    (tokens.max(1).ilog2() as usize).min(AGES - 1)
}

/// A learned probability, in units of 2^-16, and how many outcomes stand behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rate {
    value: u16,
    count: u16,
}

impl Rate {
    fn new(value: f32, count: u16) -> Self {
        Self { value: (value * 65536.0).min(65535.0) as u16, count }
    }

    fn get(self) -> f32 {
        f32::from(self.value) * (1.0 / 65536.0)
    }

    fn update(&mut self, outcome: bool, memory: u16) {
        self.count = (self.count + 1).min(memory);
        let target = if outcome { 65535 } else { 0 };
        let step = (target - i32::from(self.value)) / i32::from(self.count);
        self.value = (i32::from(self.value) + step) as u16;
    }
}

/// The learned tables.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    escapes: Box<[Rate]>,
    refinements: Box<[Rate]>,
    gates: Box<[f32]>,
    /// On the log-odds, by age of the output and kind of evidence: outputs begin less freely than they go on.
    ages: Box<[f32]>,
}

impl Default for Model {
    /// The weights that ship with the package.
    fn default() -> Self {
        if UNTRAINED { Self::untrained() } else { Self::from_tables(SHIPPED) }
    }
}

/// An escape cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EscapeCell(u16);

/// A gate cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateCell(u16);

impl Model {
    /// Plausible weights from no experience.
    fn untrained() -> Self {
        let escape = |cell: usize| {
            let (distinct, cell) = (cell % DISTINCTS, cell / DISTINCTS);
            let (count, class) = (cell % COUNTS, cell / COUNTS % CLASSES);
            let n = [1.0, 2.0, 3.0, 4.5, 7.0, 14.0, 30.0, 64.0][count];
            let d = [1.0f32, 2.0, 3.5, 7.0, 20.0][distinct].min(n);
            Rate::new((d + 0.3) / (n + d + 0.6) / (1.0 + 0.35 * class as f32), 12)
        };
        let gate = |cell: usize| if cell / (PEAKS * CLASSES) == SUCCESSORS { -2.0 } else { 0.0 };
        let refinement = |cell: usize| {
            let steps = (cell % PROBABILITIES) as f32 - HALF;
            let tail = 0.5 * 2f32.powf(-steps.abs());
            Rate::new(if steps < 0.0 { tail } else { 1.0 - tail }, 20)
        };
        Self {
            escapes: (0..ESCAPES).map(escape).collect(),
            gates: (0..GATES).map(gate).collect(),
            ages: [0.0; BIASES].into(),
            refinements: (0..REFINEMENTS).map(refinement).collect(),
        }
    }

    /// The header and the tables as little-endian bytes: escapes and refinements as (value, count) in 16 bits each,
    /// then gates and ages as 32-bit floats.
    pub fn to_bytes(&self) -> Vec<u8> {
        let rates = self.escapes.iter().chain(&self.refinements);
        let halves = rates.flat_map(|rate| [rate.value, rate.count]).flat_map(u16::to_le_bytes);
        let floats = self.gates.iter().chain(&self.ages).flat_map(|float| float.to_le_bytes());
        HEADER.into_iter().chain(halves).chain(floats).collect()
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
        let model = Self::from_tables(bytes);
        let sound = model.gates.iter().chain(&model.ages).all(|float| float.abs() <= GATE_LIMIT);
        if sound { Ok(model) } else { Err(WeightsError::Values) }
    }

    /// From bytes that fit.
    fn from_tables(bytes: &[u8]) -> Self {
        let words: &[[u8; 4]] = bytes[HEADER.len()..].as_chunks().0;
        let rate = |&[a, b, c, d]: &[u8; 4]| Rate {
            value: u16::from_le_bytes([a, b]),
            count: u16::from_le_bytes([c, d]).min(REFINEMENT_MEMORY),
        };
        let float = |&word: &[u8; 4]| f32::from_le_bytes(word);
        let (escapes, rest) = words.split_at(ESCAPES);
        let (refinements, rest) = rest.split_at(REFINEMENTS);
        let (gates, ages) = rest.split_at(GATES);
        Self {
            escapes: escapes.iter().map(rate).collect(),
            refinements: refinements.iter().map(rate).collect(),
            gates: gates.iter().map(float).collect(),
            ages: ages.iter().map(float).collect(),
        }
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

    /// The probability that the next token is none of the successors seen in such contexts.
    pub fn escape(&self, cell: EscapeCell) -> f32 {
        self.escapes[usize::from(cell.0)].get()
    }

    pub(crate) fn learn_escape(&mut self, cell: EscapeCell, escaped: bool) {
        self.escapes[usize::from(cell.0)].update(escaped, ESCAPE_MEMORY);
    }

    /// The cell of a source whose longest context is of `class` and whose best token has probability `peak`.
    pub fn gate_cell(source: usize, class: usize, peak: f32) -> GateCell {
        let peak = usize::from((peak * PEAKS as f32) as u8).min(PEAKS - 1);
        GateCell(((source * CLASSES + class) * PEAKS + peak) as u16)
    }

    /// The logarithm of the source's weight, up to a constant.
    pub fn gate(&self, cell: GateCell) -> f32 {
        self.gates[usize::from(cell.0)]
    }

    /// Moves the weight by the difference between posterior and prior share of the source.
    pub(crate) fn learn_gate(&mut self, cell: GateCell, gradient: f32) {
        let gate = &mut self.gates[usize::from(cell.0)];
        *gate = (*gate + GATE_RATE * gradient).clamp(-GATE_LIMIT, GATE_LIMIT);
    }

    /// The probability of a token that the mixture gives `mixed` and whose support has this row.
    pub fn refine(&self, row: usize, mixed: f32) -> f32 {
        let scale = scale(mixed);
        let step = usize::from(scale as u8);
        let above = scale - step as f32;
        let cell = row * PROBABILITIES + step;
        self.refinements[cell].get() * (1.0 - above) + self.refinements[cell + 1].get() * above
    }

    pub(crate) fn learn_refinement(&mut self, row: usize, mixed: f32, came_true: bool) {
        let step = usize::from((scale(mixed) + 0.5) as u8);
        self.refinements[row * PROBABILITIES + step].update(came_true, REFINEMENT_MEMORY);
    }

    /// Moves towards what a request has learned since it started from `base`, by a quarter of the way.
    pub(crate) fn merge(&mut self, base: &Self, learned: &Self) {
        fn rates(model: &Model) -> impl Iterator<Item = &Rate> {
            model.escapes.iter().chain(&model.refinements)
        }
        let tables = self.escapes.iter_mut().chain(&mut self.refinements);
        for ((own, before), after) in tables.zip(rates(base)).zip(rates(learned)) {
            if before != after {
                own.value =
                    (i32::from(own.value) + (i32::from(after.value) - i32::from(own.value)) / 4) as u16;
            }
        }
        fn biases(model: &Model) -> impl Iterator<Item = &f32> {
            model.gates.iter().chain(&model.ages)
        }
        let tables = self.gates.iter_mut().chain(&mut self.ages);
        for ((own, before), after) in tables.zip(biases(base)).zip(biases(learned)) {
            if before != after {
                *own += (after - *own) / 4.0;
            }
        }
    }

    /// The biases of an output of `tokens` tokens, by kind of evidence.
    pub fn ages(&self, tokens: usize) -> &[f32] {
        &self.ages[age(tokens) * KINDS..][..KINDS]
    }

    pub(crate) fn learn_age(&mut self, tokens: usize, kind: usize, gradient: f32) {
        let bias = &mut self.ages[age(tokens) * KINDS + kind];
        *bias = (*bias + AGE_RATE * gradient).clamp(-AGE_LIMIT, AGE_LIMIT);
    }

    /// A copy, if there is memory for it.
    pub(crate) fn try_clone(&self) -> Result<Self, MemoryFull> {
        Ok(Self {
            escapes: try_clone(&self.escapes)?.into(),
            refinements: try_clone(&self.refinements)?.into(),
            gates: try_clone(&self.gates)?.into(),
            ages: try_clone(&self.ages)?.into(),
        })
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        (self.escapes.len() + self.refinements.len()) * size_of::<Rate>()
            + (self.gates.len() + self.ages.len()) * size_of::<f32>()
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
        assert_eq!(Model::default().to_bytes(), SHIPPED);
    }

    #[test]
    fn bytes_round_trip_and_others_are_refused() {
        let mut model = Model::default();
        model.learn_gate(Model::gate_cell(STORE, 3, 0.5), 0.7);
        model.learn_escape(Model::escape_cell(REQUEST, 11, 1.0, 1), true);
        model.learn_age(5, 3, 0.5);
        let bytes = model.to_bytes();
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
    fn refinements_are_interpolated_and_learned_at_the_nearest_step() {
        let mut model = Model::default();
        model.refinements[..PROBABILITIES].iter_mut().for_each(|rate| *rate = Rate::new(0.0, 0));
        let step = scale(0.3) as usize;
        model.refinements[step + 1] = Rate::new(0.5, 100);
        assert!((model.refine(0, 0.3) - 0.5 * (scale(0.3) - step as f32)).abs() < 1e-6);
        model.learn_refinement(0, 0.5, true);
        let changed: Vec<_> = (0..PROBABILITIES).filter(|&at| model.refinements[at].count == 1).collect();
        assert_eq!(changed, [9]);
    }

    #[test]
    fn gates_and_ages_go_the_way_of_the_gradient_and_stay_within_their_limits() {
        let mut model = Model::default();
        let cell = Model::gate_cell(STORE, 3, 0.5);
        let before = model.gate(cell);
        model.learn_gate(cell, 0.5);
        assert!((model.gate(cell) - before - 0.01).abs() < 1e-6);
        (0..10_000).for_each(|_| model.learn_gate(cell, -1.0));
        assert_eq!(model.gate(cell), -GATE_LIMIT);
        let before = model.ages(70)[3];
        model.learn_age(127, 3, 1.0);
        assert!((model.ages(64)[3] - before - AGE_RATE).abs() < 1e-6);
        (0..1000).for_each(|_| model.learn_age(64, 3, 1.0));
        assert_eq!(model.ages(64)[3], AGE_LIMIT);
    }

    #[test]
    fn a_quarter_is_taken_over_of_what_has_changed_and_nothing_else() {
        let (mut own, base) = (Model::default(), Model::default());
        let mut learned = base.clone();
        learned.gates[7] = base.gates[7] + 0.4;
        learned.escapes[9].value = base.escapes[9].value ^ 64;
        own.merge(&base, &learned);
        assert!((own.gates[7] - base.gates[7] - 0.1).abs() < 1e-6);
        assert_eq!(own.escapes[9].value.abs_diff(base.escapes[9].value), 16);
        (own.gates[7], own.escapes[9]) = (base.gates[7], base.escapes[9]);
        assert!(own == base);
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
    }
}
