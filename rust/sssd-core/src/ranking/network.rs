//! The weights of the ranking stage: one hidden layer over the features of a candidate.

use std::sync::{Arc, OnceLock};

use crate::ranking::bilinear::LogBilinear;
use crate::sources;

/// What the network looks at: five numbers of each source, and 13 more; `features.rs` has them.
pub const FEATURES: usize = 5 * sources::COUNT + 13;
/// Hidden units.
pub const HIDDEN: usize = 24;
/// What is left of a unit's input below 0.
const LEAK: f32 = 0.1;

/// What stands before the weights: magic, version of what features mean, and the shape.
const MAGIC: [u8; 8] = *b"sssd rnk";
const VERSION: u32 = 1;
const HEADER: usize = MAGIC.len() + 12;
const WEIGHTS: usize = (FEATURES + 2) * HIDDEN;
const BYTES: usize = HEADER + 4 * WEIGHTS;

/// The weights that ship, learned by `benches/train_ranking.py` as `network.toml` says.
const SHIPPED: &[u8] = include_bytes!("network.bin");
/// Set when the package is built to learn weights for other features: nothing is ranked then.
const UNTRAINED: bool = option_env!("SSSD_UNTRAINED").is_some();
const _: () = assert!(
    UNTRAINED || fits(SHIPPED),
    "network.bin is not of this predictor: benches/train_ranking.py learns new weights"
);

const fn fits(bytes: &[u8]) -> bool {
    let header = header();
    let mut same = bytes.len() == BYTES;
    let mut at = 0;
    while same && at < HEADER {
        same = bytes[at] == header[at];
        at += 1;
    }
    same
}

const fn header() -> [u8; HEADER] {
    let shape = [VERSION, FEATURES as u32, HIDDEN as u32];
    let mut header = [0; HEADER];
    let mut at = 0;
    while at < HEADER {
        header[at] = if at < 8 { MAGIC[at] } else { shape[at / 4 - 2].to_le_bytes()[at % 4] };
        at += 1;
    }
    header
}

/// The inputs of the hidden units.
pub type Hidden = [f32; HIDDEN];

/// What a draft ranks with.
#[derive(Clone, Copy)]
pub struct Ranking<'a> {
    pub network: &'a Network,
    pub tables: &'a dyn LogBilinear,
}

/// Features that are not 0, and their values.
pub struct Seen {
    list: [(usize, f32); FEATURES],
    count: usize,
}

impl Seen {
    /// None so far.
    #[inline(always)]
    pub fn new() -> Self {
        Self { list: [(0, 0.0); FEATURES], count: 0 }
    }

    /// Adds one. What is beyond the last place is not seen, and no feature is added twice.
    #[inline(always)]
    pub fn add(&mut self, feature: usize, value: f32) {
        if let Some(place) = self.list.get_mut(self.count) {
            *place = (feature, value);
            self.count += 1;
        }
    }

    /// Into a row of all features.
    pub fn write(&self, row: &mut [f32; FEATURES]) {
        self.list[..self.count].iter().for_each(|&(feature, value)| row[feature] = value);
    }

    /// Forgets all.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.count = 0;
    }
}

/// The weights: of each feature, of nothing, and of the hidden units.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    features: [Hidden; FEATURES],
    bias: Hidden,
    output: Hidden,
}

impl Network {
    /// Those that ship, unless the package was built for others to be learned.
    pub fn shipped() -> Option<Arc<Self>> {
        static SHIPPED_NETWORK: OnceLock<Option<Arc<Network>>> = OnceLock::new();
        SHIPPED_NETWORK.get_or_init(|| Self::from_bytes(SHIPPED).map(Arc::new)).clone()
    }

    /// Weights to begin learning with; `number` gives numbers between -1 and 1.
    pub fn random(number: &mut dyn FnMut() -> f32) -> Self {
        let mut draw = |scale: f32| std::array::from_fn(|_| number() * scale);
        Self { features: std::array::from_fn(|_| draw(0.25)), bias: [0.0; HIDDEN], output: draw(0.02) }
    }

    /// From the bytes of [`Network::to_bytes`]; nothing if they are others, or not finite.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if !fits(bytes) {
            return None;
        }
        let mut network =
            Self { features: [[0.0; HIDDEN]; FEATURES], bias: [0.0; HIDDEN], output: [0.0; HIDDEN] };
        let numbers = bytes[HEADER..].as_chunks().0.iter().map(|&number| f32::from_le_bytes(number));
        network.weights_mut().zip(numbers).for_each(|(weight, number)| *weight = number);
        let finite = network.weights_mut().all(|weight| weight.is_finite());
        finite.then_some(network)
    }

    /// Header and weights, in the order of [`Network::weights_mut`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let weights = self.features.as_flattened().iter().chain(&self.bias).chain(&self.output);
        header().into_iter().chain(weights.flat_map(|weight| weight.to_le_bytes())).collect()
    }

    /// All weights: feature by feature, then those of nothing, then those of the hidden units.
    pub fn weights_mut(&mut self) -> impl Iterator<Item = &mut f32> {
        self.features.as_flattened_mut().iter_mut().chain(&mut self.bias).chain(&mut self.output)
    }

    /// The inputs of the hidden units without any feature.
    pub fn bias(&self) -> Hidden {
        self.bias
    }

    /// Adds what features say: in one loop, so that the units stay in registers.
    #[inline(always)]
    pub fn add(&self, mut hidden: Hidden, seen: &Seen) -> Hidden {
        for &(feature, value) in &seen.list[..seen.count] {
            for (unit, weight) in hidden.iter_mut().zip(&self.features[feature]) {
                *unit += weight * value;
            }
        }
        hidden
    }

    /// The output: what is added to the logarithm of a candidate's probability.
    #[inline(always)]
    pub fn output(&self, hidden: &Hidden) -> f32 {
        let mut sums = [0.0f32; 8];
        for (units, weights) in hidden.chunks_exact(8).zip(self.output.chunks_exact(8)) {
            for lane in 0..8 {
                sums[lane] += units[lane].max(LEAK * units[lane]) * weights[lane];
            }
        }
        sums.iter().sum()
    }
}
