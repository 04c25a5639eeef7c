//! Draft trees for training-free speculative decoding.
//!
//! Pure algorithms: no Python, no files, no threads, no unsafe code. The way of the data is
//! tokens -> index -> predictor -> draft tree -> (verified by the caller) -> tokens.
#![forbid(unsafe_code)]

mod aligned;
mod budget;
mod calibration;
mod corpus;
mod draft;
mod drafter;
mod entry;
mod frontier;
mod index;
mod knowledge;
mod live;
mod memory;
mod model;
mod sequence;
mod soft;
mod sync;
mod tree;

pub use budget::{CostError, Layout, PassCosts};
pub use corpus::{Corpus, Match};
pub use draft::Limits;
pub use drafter::Drafter;
pub use entry::WORDS as SOFT_WORDS;
pub use index::Scout;
pub use knowledge::{Knowledge, SourceStats, Stats};
pub use memory::{Charge, Ledger, MemoryFull};
pub use model::{Model, source::NAMES as SOURCES};
pub use sequence::Sequence;
pub use soft::{TOP_K, TopK};
pub use tree::{BreadthFirst, DraftTree, MAX_NODES, TreeError, UNKNOWN};

/// A token id of the target model's vocabulary. Ids stay below 2^31, so that they fit Python's int32 arrays.
pub type Token = u32;

/// The largest token id accepted anywhere.
pub const MAX_TOKEN: Token = i32::MAX as Token;
