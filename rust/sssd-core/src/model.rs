//! What the predictor has learned: how far to trust each kind of evidence. Constant size, updated only from
//! tokens that the target model really produced.

/// Where evidence comes from.
pub const SOURCES: usize = 3;
/// Shorter contexts looked up anew at drafted nodes.
pub const LOWER: usize = 2;
/// The request's own prompt and output.
pub const REQUEST: usize = 0;
/// The static datastore.
pub const STORE: usize = 1;

/// Match lengths are told apart up to 32 tokens, in this many classes.
pub const CLASSES: usize = 12;
const COUNTS: usize = 8;
const DISTINCT: usize = 5;
/// Escape cells of one source.
const CELLS: usize = DEPTHS * CLASSES * COUNTS * DISTINCT;
const DEPTHS: usize = 4;
pub fn depth_bucket(d: u16) -> usize { match d { 0 => 0, 1 => 1, 2..=4 => 2, _ => 3 } }

/// The class of a match of `length` >= 1 tokens.
pub fn class(length: u32) -> usize {
    const TABLE: [u8; 33] = [
        0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 10, 10, 11,
    ];
    TABLE[(length as usize).min(32)] as usize
}

fn count_bucket(count: f32) -> usize {
    match count as u32 {
        0..=1 => 0,
        2 => 1,
        3 => 2,
        4..=5 => 3,
        6..=9 => 4,
        10..=19 => 5,
        20..=49 => 6,
        _ => 7,
    }
}

fn distinct_bucket(distinct: u32) -> usize {
    match distinct {
        0..=1 => 0,
        2 => 1,
        3..=4 => 2,
        5..=9 => 3,
        _ => 4,
    }
}

/// A probability with the weight of the experience behind it.
#[derive(Clone, Copy, Debug)]
struct Rate {
    value: f32,
    count: f32,
}

impl Rate {
    fn update(&mut self, outcome: f32, limit: f32) {
        self.count = (self.count + 1.0).min(limit);
        self.value += (outcome - self.value) / self.count;
    }
}

/// Learned escape probabilities and source weights.
#[derive(Clone)]
pub struct Model {
    escapes: Box<[Rate]>,
    gates: Box<[f32]>,
    pub tune: [f32; 8],
}

impl Default for Model {
    fn default() -> Self {
        let mut tune = [0.0f32; 8];
        for (i, t) in tune.iter_mut().enumerate() {
            *t = std::env::var(format!("T{i}")).ok().and_then(|v| v.parse().ok()).unwrap_or(f32::NAN);
        }
        let mut escapes = Vec::with_capacity(SOURCES * CELLS);
        for _source in 0..SOURCES * DEPTHS {
            for class in 0..CLASSES {
                for count in 0..COUNTS {
                    for distinct in 0..DISTINCT {
                        let n = [1.0, 2.0, 3.0, 4.5, 7.0, 14.0, 30.0, 64.0][count];
                        let d = [1.0f32, 2.0, 3.5, 7.0, 20.0][distinct].min(n);
                        let value = (d + 0.3) / (n + d + 0.6) / (1.0 + 0.35 * class as f32);
                        escapes.push(Rate { value, count: 12.0 });
                    }
                }
            }
        }
        Self { escapes: escapes.into(), gates: vec![0.0; SOURCES * CLASSES * COUNTS].into(), tune }
    }
}

impl Model {
    /// The cell of contexts of `class` that occurred `count` times with `distinct` different successors.
    pub fn cell(&self, depth: usize, source: usize, class: usize, count: f32, distinct: u32) -> u16 {
        (((((if self.tune[4].is_nan() {depth} else {0}) * SOURCES + source) * CLASSES + class) * COUNTS + count_bucket(count)) * DISTINCT + distinct_bucket(distinct)) as u16
    }

    /// The probability that the next token is none of the successors seen in such contexts.
    pub fn escape(&self, cell: u16) -> f32 {
        self.escapes[cell as usize].value
    }

    pub fn learn_escape(&mut self, cell: u16, escaped: bool) {
        let limit = if self.tune[0].is_nan() { 60.0 } else { self.tune[0] };
        self.escapes[cell as usize].update(if escaped { 1.0 } else { 0.0 }, limit);
    }

    pub fn gate_cell(&self, source: usize, class: usize, count: f32) -> u16 {
        ((source * CLASSES + class) * COUNTS + count_bucket(count)) as u16
    }

    pub fn gate(&self, cell: u16) -> f32 {
        self.gates[cell as usize]
    }

    pub fn learn_gate(&mut self, cell: u16, gradient: f32) {
        let rate = if self.tune[1].is_nan() { 0.1 } else { self.tune[1] };
        let gate = &mut self.gates[cell as usize];
        *gate = (*gate + rate * gradient).clamp(-8.0, 8.0);
    }
}
