//! The weights of the ranking stage: one hidden layer over the features of a candidate.

use std::hint::black_box;
use std::sync::{Arc, OnceLock};

use crate::ranking::bilinear::LogBilinear;
use crate::sources;

/// What the network looks at: of a candidate, then of the node, which all its candidates share; `features.rs` has them.
pub const FEATURES: usize = OF_CANDIDATE + OF_NODE;
/// Two numbers of each source, and 7 more.
pub const OF_CANDIDATE: usize = 2 * sources::COUNT + 7;
/// Three numbers of each source, and 6 more.
pub const OF_NODE: usize = 3 * sources::COUNT + 6;
/// Hidden units.
pub const HIDDEN: usize = 24;
/// Units side by side: the order of sums is the same on every processor.
const LANES: usize = 8;
const _: () = assert!(HIDDEN.is_multiple_of(LANES));
/// What is left of a unit's input below 0.
const LEAK: f32 = 0.1;

/// What stands before the weights: magic, version of what features mean, and the shape.
const MAGIC: [u8; 8] = *b"sssd rnk";
const VERSION: u32 = 2;
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

    /// The inputs of the hidden units by what all candidates of a node share.
    #[inline(always)]
    pub fn of_node(&self, features: &[f32; OF_NODE]) -> Hidden {
        let mut hidden = [0.0; HIDDEN];
        add(&self.bias, &self.features[OF_CANDIDATE..], features, &mut hidden);
        hidden
    }

    /// The output for a candidate: what is added to the logarithm of its probability.
    #[inline(always)]
    pub fn of_candidate(&self, node: &Hidden, features: &[f32; OF_CANDIDATE]) -> f32 {
        let mut hidden = [0.0; HIDDEN];
        add(node, &self.features[..OF_CANDIDATE], features, &mut hidden);
        for (unit, weight) in hidden.iter_mut().zip(&self.output) {
            *unit = unit.max(LEAK * *unit) * weight;
        }
        let mut sums = [0.0f32; LANES];
        for units in hidden.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                sums[lane] += units[lane];
            }
        }
        ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))
    }
}

/// Adds what features say to `start`, with the units in registers. What the compiler knows of how numbers came about must
/// not make it take them one by one, so they come from memory.
#[inline(always)]
fn add<const COUNT: usize>(start: &Hidden, weights: &[Hidden], features: &[f32; COUNT], out: &mut Hidden) {
    let mut hidden = *black_box(start);
    for (value, weights) in black_box(features).iter().zip(weights) {
        for (unit, weight) in hidden.iter_mut().zip(weights) {
            *unit += weight * value;
        }
    }
    *out = hidden;
    black_box(out);
}
