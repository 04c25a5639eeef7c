//! How the sources fared.

use crate::{DraftTree, sources};

/// How drafts fared, by source.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Drafts whose outcome is known.
    pub drafts: u64,
    /// In the order of [`crate::SOURCES`].
    pub sources: [SourceStats; sources::NAMES.len()],
}

/// How the nodes fared to whose probability one source contributed most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SourceStats {
    /// Nodes drafted.
    pub drafted: u64,
    /// Nodes accepted.
    pub accepted: u64,
    /// Sum of their probabilities: how many were expected to be accepted.
    pub predicted: f64,
}

/// What an extension has told of the last draft.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Nodes of the draft; none if an earlier extension has told of it too.
    pub drafted: Option<usize>,
    /// Nodes that the tokens went along.
    pub accepted: usize,
}

impl Stats {
    /// Counts a draft whose outcome becomes known.
    pub(crate) fn count_draft(&mut self, tree: &DraftTree) {
        self.drafts += 1;
        for (&source, &prob) in tree.sources.iter().zip(&tree.probs) {
            let source = &mut self.sources[usize::from(source)];
            source.drafted += 1;
            source.predicted += f64::from(prob);
        }
    }

    /// Adds the counts of others.
    pub fn add(&mut self, other: &Self) {
        self.drafts += other.drafts;
        for (own, other) in self.sources.iter_mut().zip(&other.sources) {
            own.drafted += other.drafted;
            own.accepted += other.accepted;
            own.predicted += other.predicted;
        }
    }
}
