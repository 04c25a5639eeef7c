#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod allowed;
mod given;
mod index;
mod logits;
mod memory;
mod namespace;
mod pass;
mod predictor;
mod ranking;
mod segments;
mod sequence;
mod sources;
mod stats;
mod sync;
mod tree;

pub use allowed::{Allowed, Mask};
pub use given::{Given, GivenError};
pub use index::Lookahead;
pub use logits::top_k;
pub use memory::{MemoryFull, MemoryPool, Reservation, make_room, room_for_a_thread};
pub use namespace::{Common, Namespace};
pub use pass::{FlatTrees, MAX_WIDTH, PassBlock, PassError, Shape};
pub use predictor::inputs::{Limits, Outside};
pub use predictor::weights::{Model, WeightsError};
pub use ranking::bilinear::{CONTEXT, DIMENSIONS, LogBilinear, NO_SHARE, Output, Row, Said, TOPIC, Topic};
pub use ranking::network::{FEATURES, HIDDEN, Network};
pub use ranking::numbers::exp;
pub use ranking::record::{Ranked, RankingRecord};
pub use sequence::Sequence;
pub use sources::NAMES as SOURCES;
pub use sources::corpus::{Corpus, DOMAINS, Match, StoreSlot};
pub use sources::feedback::{TOP_K, TopK};
pub use sources::seqlock::WORDS as FEEDBACK_WORDS;
pub use stats::{Outcome, SourceStats, Stats};
pub use tree::{BreadthFirst, DraftTree, MAX_NODES, TreeError, UNKNOWN};

/// A token id of the target model's vocabulary. Ids stay below 2^31, so that they fit Python's int32 arrays.
pub type Token = u32;

/// The largest token id accepted anywhere.
pub const MAX_TOKEN: Token = i32::MAX as Token;

/// What a caller appends for an id that its vocabulary does not have, such as a picture's place in a prompt. It is
/// held, matches nothing, itself included, and is never drafted.
pub const PLACEHOLDER: Token = Token::MAX;
