//! What one draft is made from, and what it may come to.

use crate::Token;
use crate::allowed::Allowed;
use crate::given::Given;
use crate::index::Index;
use crate::predictor::correct::Calibration;
use crate::predictor::guest::Trust;
use crate::predictor::overlay::Overlay;
use crate::ranking::network::Ranking;
use crate::sources::aligned::Aligned;
use crate::sources::corpus::Corpus;
use crate::sources::feedback::{FeedbackTable, Recent};
use crate::sources::{LIVE, STORE};

/// What one draft is made from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub index: &'a Index,
    /// Tokens at the start of the index that are a predicted output.
    pub predicted: usize,
    pub aligned: &'a Aligned,
    pub store: Option<&'a dyn Corpus>,
    pub live: Option<&'a dyn Corpus>,
    pub feedback: &'a FeedbackTable,
    pub recent: &'a Recent,
    pub model: &'a Overlay,
    pub calibration: &'a Calibration,
    /// What candidates are ranked with, if they are.
    pub ranking: Option<Ranking<'a>>,
    /// Nothing is drafted after these.
    pub end_tokens: &'a [Token],
    /// Tokens of output so far.
    pub age: usize,
    pub limits: Limits,
    /// What comes from outside, and how far the request trusts its drafts.
    pub outside: Outside<'a>,
    pub trust: &'a Trust,
}

/// What a caller has to say of one draft.
#[derive(Clone, Copy, Default)]
pub struct Outside<'a> {
    /// Another drafter's draft.
    pub given: Option<&'a Given>,
    /// Which tokens may follow.
    pub allowed: Option<&'a Allowed>,
}

impl Inputs<'_> {
    /// The corpus of a source, if it has one.
    pub fn corpus(&self, source: usize) -> Option<&dyn Corpus> {
        match source {
            STORE => self.store,
            LIVE => self.live,
            _ => None,
        }
    }
}

/// What one draft may come to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most nodes.
    pub max_nodes: usize,
    /// No node is deeper.
    pub max_depth: usize,
    /// Less probable nodes are not drafted.
    pub min_prob: f32,
    /// Whether every node follows the one before: the most probable token after each, and no tree.
    pub chain: bool,
    /// Whether candidates are ranked, where the datastore has tables for it.
    pub ranking: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Limits {
    /// What a draft may come to unless somebody says so.
    pub const DEFAULT: Self =
        Self { max_nodes: 32, max_depth: usize::MAX, min_prob: 0.001, chain: false, ranking: true };

    /// A number of nodes alone.
    pub fn nodes(max_nodes: usize) -> Self {
        Self { max_nodes, min_prob: 0.0, ..Self::DEFAULT }
    }
}

#[cfg(test)]
pub mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::{MemoryPool, Reservation};
    use crate::predictor::overlay::tests::shipped;

    /// What a request without datastore drafts from.
    pub struct Parts {
        pub index: Index,
        pub aligned: Aligned,
        feedback: FeedbackTable,
        recent: Recent,
        model: Overlay,
        pub calibration: Calibration,
        trust: Trust,
    }

    impl Parts {
        pub fn new(tokens: &[Token]) -> Self {
            let mut index = Index::default();
            index.append(tokens).unwrap();
            let mut calibration = Calibration::default();
            let model = shipped(0);
            calibration.start(&model.ages(0));
            let (aligned, recent) = (Aligned::default(), Recent::default());
            Self {
                index,
                aligned,
                feedback: FeedbackTable::new(0, Reservation::new(&Arc::new(MemoryPool::new(0)), 0)),
                recent,
                model,
                calibration,
                trust: Trust::default(),
            }
        }

        pub fn inputs(&self) -> Inputs<'_> {
            Inputs {
                index: &self.index,
                predicted: 0,
                aligned: &self.aligned,
                store: None,
                live: None,
                feedback: &self.feedback,
                recent: &self.recent,
                model: &self.model,
                calibration: &self.calibration,
                ranking: None,
                end_tokens: &[],
                age: 0,
                limits: Limits::nodes(16),
                outside: Outside::default(),
                trust: &self.trust,
            }
        }
    }
}
