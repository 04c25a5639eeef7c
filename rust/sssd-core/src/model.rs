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

/// Where evidence comes from. Blended sources come first: they predict after contexts of several lengths, which
/// pass the escapes.
pub mod source {
    /// The request's own prompt and output.
    pub const REQUEST: usize = 0;
    /// The same, for contexts shorter than those of `REQUEST`, looked up anew at drafted nodes.
    pub const LOWER: usize = 1;
    /// The static datastore.
    pub const STORE: usize = 2;
    /// Finished requests.
    pub const LIVE: usize = 3;
    /// The text that the output has been following: a predicted output, or what it copied until it went astray.
    pub const ALIGNED: usize = 4;
    /// Number of sources that give samples.
    pub const SAMPLED: usize = 5;
    /// The target's own most probable tokens after such contexts.
    pub const SOFT: usize = 5;
    /// Number of sources that blend contexts of several lengths.
    pub const BLENDED: usize = 6;
    /// The most frequent successors of the last token in the datastore.
    pub const SUCCESSORS: usize = 6;
    /// Number of sources.
    pub const COUNT: usize = 7;
    /// What users call them.
    pub const NAMES: [&str; COUNT] =
        ["request", "lower", "datastore", "live", "aligned", "soft", "successors"];
}

/// Match lengths are told apart up to 32 tokens, in this many classes.
pub const CLASSES: usize = 12;
/// Longer matches count as this long.
pub const MAX_LENGTH: usize = 32;
const COUNTS: usize = 8;
const DISTINCTS: usize = 5;
const PEAKS: usize = 8;
const TEXTS: usize = 9 * 6 * 2 * 2;
const OTHERS: usize = 3 * 4 * 7 * 4 * 2;
pub const PROBABILITIES: usize = 17;
/// The cell of probability one half.
const HALF: f32 = 8.5;

const ESCAPES: usize = source::BLENDED * CLASSES * COUNTS * DISTINCTS;
const GATES: usize = source::COUNT * CLASSES * PEAKS;
const REFINEMENTS: usize = (TEXTS + OTHERS) * PROBABILITIES;

/// A cell forgets the past with a rate of at least one over this many outcomes.
const ESCAPE_MEMORY: u16 = 60;
const REFINEMENT_MEMORY: u16 = 255;
const GATE_RATE: f32 = 0.02;
const GATE_LIMIT: f32 = 8.0;

/// The class of a match of `length` >= 1 tokens.
pub fn class(length: u16) -> usize {
    const TABLE: [u8; MAX_LENGTH + 1] = [
        0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 10,
        10, 11,
    ];
    TABLE[usize::from(length).min(MAX_LENGTH)] as usize
}

/// Which kinds of evidence speak for a token.
#[derive(Clone, Copy)]
pub struct Support {
    /// For each source, the class of the longest context that the token followed, or [`NO_CLASS`].
    pub classes: [u8; source::COUNT],
    /// A bit for each source that has anything to say, about this token or others.
    pub speaks: u8,
    /// How recently the token itself occurred in the request, if no context speaks for it.
    pub occurrence: Occurrence,
}

/// In place of a class: nothing matches.
pub const NO_CLASS: u8 = u8::MAX;

/// How long ago a token occurred in the request.
#[derive(Clone, Copy, Default, PartialEq)]
pub enum Occurrence {
    #[default]
    Never,
    Long,
    Recent,
    Just,
}

impl Occurrence {
    /// From the distance in tokens.
    pub fn ago(distance: usize) -> Self {
        match distance {
            0..64 => Self::Just,
            64..512 => Self::Recent,
            _ => Self::Long,
        }
    }
}

impl Support {
    fn speaks(self, source: usize) -> bool {
        self.speaks >> source & 1 != 0
    }

    fn holds(self, source: usize) -> bool {
        self.classes[source] != NO_CLASS
    }

    /// What `table` has for the source's class: the first entry if it has none.
    fn look(self, source: usize, table: &[u8; 16]) -> usize {
        usize::from(table[usize::from(self.classes[source].wrapping_add(1) & 15)])
    }

    /// Its row among the contexts of request and datastore.
    fn texts(self) -> usize {
        let request = match self.look(source::REQUEST, &GROUPS) {
            0 => [0, 6, 7, 8][self.occurrence as usize],
            group => group,
        };
        let store = match self.speaks(source::STORE) {
            false => 0,
            true => self.look(source::STORE, &GROUPS).max(1),
        };
        let (lower, successor) = (self.holds(source::LOWER), self.holds(source::SUCCESSORS));
        ((request * 6 + store) * 2 + usize::from(lower)) * 2 + usize::from(successor)
    }

    /// Its row among all: those of the other sources, if any of them speaks, are apart, since what has them to go
    /// by as well comes true more often.
    fn row(self) -> usize {
        self.others().map_or_else(|| self.texts(), |row| TEXTS + row)
    }

    /// The kind of evidence, for the request's own calibration.
    pub fn kind(self) -> usize {
        let request = self.look(source::REQUEST, &[0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]);
        let others = [source::STORE, source::LIVE, source::SOFT];
        let speaks = others.iter().any(|&source| self.speaks(source));
        let holds = others.iter().any(|&source| self.holds(source));
        request * 3 + usize::from(speaks) + usize::from(holds)
    }

    /// Its row among the contexts of the other sources, if any of them speaks.
    fn others(self) -> Option<usize> {
        let live = self.look(source::LIVE, &[0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
        let aligned = self.look(source::ALIGNED, &[0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]);
        let soft = match self.speaks(source::SOFT) {
            false => 0,
            true => self.look(source::SOFT, &[1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]),
        };
        if live + aligned + soft == 0 {
            return None;
        }
        let request = match self.look(source::REQUEST, &GROUPS) {
            0 => usize::from(self.occurrence != Occurrence::Never),
            group => 2 + usize::from(group > 3),
        };
        let store = usize::from(self.speaks(source::STORE));
        Some((((live * 4 + aligned) * 7 + soft) * 4 + request) * 2 + store)
    }
}

/// Groups of classes, after the one of no class.
const GROUPS: [u8; 16] = [0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5];

/// Ages of an output: powers of two of tokens.
const AGES: usize = 9;
const AGE_RATE: f32 = 0.01;
const AGE_LIMIT: f32 = 2.0;

fn age(tokens: usize) -> usize {
    (tokens.max(1).ilog2() as usize).min(AGES - 1)
}

/// Number of kinds of evidence.
pub const KINDS: usize = 12;

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
    /// The weights that ship with the package, learned by `benches/train_weights.py`.
    fn default() -> Self {
        Self::from_bytes(include_bytes!("weights.bin")).unwrap_or_else(Self::untrained)
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
        let gate = |cell: usize| if cell / (PEAKS * CLASSES) == source::SUCCESSORS { -2.0 } else { 0.0 };
        let refinement = |cell: usize| {
            let steps = (cell % PROBABILITIES) as f32 - HALF;
            let tail = 0.5 * 2f32.powf(-steps.abs());
            Rate::new(if steps < 0.0 { tail } else { 1.0 - tail }, 20)
        };
        Self {
            escapes: (0..ESCAPES).map(escape).collect(),
            gates: (0..GATES).map(gate).collect(),
            ages: [0.0; AGES * KINDS].into(),
            refinements: (0..REFINEMENTS).map(refinement).collect(),
        }
    }

    /// The tables as little-endian bytes: escapes and refinements as (value, count) in 16 bits each, then gates
    /// and ages as 32-bit floats.
    pub fn to_bytes(&self) -> Vec<u8> {
        let rates = self.escapes.iter().chain(&self.refinements);
        let halves = rates.flat_map(|rate| [rate.value, rate.count]).flat_map(u16::to_le_bytes);
        halves.chain(self.gates.iter().chain(&self.ages).flat_map(|gate| gate.to_le_bytes())).collect()
    }

    /// The tables from [`Model::to_bytes`], or nothing if the bytes are not such tables.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != 4 * (ESCAPES + REFINEMENTS + GATES + AGES * KINDS) {
            return None;
        }
        let words: Vec<[u8; 4]> = bytes.as_chunks().0.to_vec();
        let rate = |&[a, b, c, d]: &[u8; 4]| Rate {
            value: u16::from_le_bytes([a, b]),
            count: u16::from_le_bytes([c, d]).min(REFINEMENT_MEMORY),
        };
        let (escapes, rest) = words.split_at(ESCAPES);
        let (refinements, gates) = rest.split_at(REFINEMENTS);
        let floats: Vec<f32> = gates.iter().map(|&word| f32::from_le_bytes(word)).collect();
        let sound = floats.iter().all(|gate| gate.abs() <= GATE_LIMIT);
        let (gates, ages) = floats.split_at(GATES);
        sound.then(|| Self {
            escapes: escapes.iter().map(rate).collect(),
            gates: gates.into(),
            ages: ages.into(),
            refinements: refinements.iter().map(rate).collect(),
        })
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
    pub fn soft_cell(class: usize, writes: u8, peak: f32) -> EscapeCell {
        let peak = (peak * (DISTINCTS as f32 - 0.01)) as usize;
        let count = (u32::from(writes) + 1).ilog2() as usize;
        let cell = ((source::SOFT * CLASSES + class) * COUNTS + count.min(COUNTS - 1)) * DISTINCTS;
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

    /// The probability of a token that the mixture gives `mixed` and that has this support.
    pub fn refine(&self, support: Support, mixed: f32) -> f32 {
        let scale = scale(mixed);
        let step = usize::from(scale as u8);
        let above = scale - step as f32;
        let cell = support.row() * PROBABILITIES + step;
        self.refinements[cell].get() * (1.0 - above) + self.refinements[cell + 1].get() * above
    }

    pub(crate) fn learn_refinement(&mut self, support: Support, mixed: f32, came_true: bool) {
        let step = usize::from((scale(mixed) + 0.5) as u8);
        self.refinements[support.row() * PROBABILITIES + step].update(came_true, REFINEMENT_MEMORY);
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

    #[test]
    fn shipped_weights_are_read() {
        assert!(Model::from_bytes(include_bytes!("weights.bin")).is_some());
    }

    #[test]
    fn bytes_round_trip_and_bad_ones_are_refused() {
        let mut model = Model::untrained();
        model.learn_gate(Model::gate_cell(source::STORE, 3, 0.5), 0.7);
        model.learn_escape(Model::escape_cell(source::REQUEST, 11, 1.0, 1), true);
        let mut bytes = model.to_bytes();
        assert_eq!(Model::from_bytes(&bytes), Some(model));
        assert_eq!(Model::from_bytes(&bytes[1..]), None);
        let gate = bytes.len() - 4;
        bytes[gate..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert_eq!(Model::from_bytes(&bytes), None);
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
