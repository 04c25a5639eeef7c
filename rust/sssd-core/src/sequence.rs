//! One request: its tokens, their index, and what drafting for it has learned.

use std::sync::Arc;

use crate::aligned::Aligned;
use crate::calibration::Calibration;
use crate::draft::{Drafting, Inputs};
use crate::drafter::Shared;
use crate::index::Index;
use crate::knowledge::Stats;
use crate::model::{KINDS, Model};
use crate::soft::{Recent, SOFT_ORDERS, TopK};
use crate::tree::ROOT;
use crate::{DraftTree, Token};

/// Drafts after which their counts are handed on.
const COUNTED: u64 = 64;

/// The state of one request.
pub struct Sequence {
    shared: Arc<Shared>,
    /// The predicted output, then the sequence itself.
    index: Index,
    predicted: usize,
    aligned: Aligned,
    recent: Recent,
    /// The weights that it started with, and its own.
    base: Arc<Model>,
    model: Arc<Model>,
    calibration: Calibration<KINDS>,
    drafting: Drafting,
    stats: Stats,
    /// Tokens that the live store has been given.
    committed: usize,
}

impl Sequence {
    pub(crate) fn new(shared: Arc<Shared>, prompt: &[Token], prediction: &[Token]) -> Self {
        let mut index = Index::with_capacity(prompt.len() + prediction.len());
        prediction.iter().chain(prompt).for_each(|&token| index.push(token));
        let base = shared.knowledge.model();
        Self {
            shared,
            index,
            predicted: prediction.len(),
            aligned: Aligned::new(prediction.len() as u32),
            recent: Recent::default(),
            model: Arc::clone(&base),
            base,
            calibration: Calibration::default(),
            drafting: Drafting::default(),
            stats: Stats::default(),
            committed: 0,
        }
    }

    /// All tokens so far.
    pub fn tokens(&self) -> &[Token] {
        &self.index.tokens()[self.predicted..]
    }

    /// Appends tokens that the target has produced, and learns from how the last draft fared. Row `i` of `soft`
    /// is the distribution that token `i` came from.
    pub fn extend(&mut self, tokens: &[Token], soft: Option<TopK>) {
        if self.drafting.awaits_outcome() {
            let live = &self.shared.knowledge.live;
            self.drafting.learn(
                Arc::make_mut(&mut self.model),
                &mut self.calibration,
                tokens,
                &mut self.stats,
                live,
            );
            if self.stats.drafts >= COUNTED {
                self.count();
            }
        }
        for (row, &token) in tokens.iter().enumerate() {
            let table = &self.shared.knowledge.soft;
            if let Some(soft) = soft {
                let (ids, probs) = soft.row(row);
                table.insert(self.newest_first(), ids, probs);
                self.recent.update(ids.iter().copied().zip(probs.iter().copied()), token);
            } else if !table.is_empty() {
                // what `feedback` has just told
                let mut found = [None; SOFT_ORDERS.len()];
                table.find(self.newest_first(), &mut found);
                if let Some(soft) = found[SOFT_ORDERS.len() - 1] {
                    self.recent.update(soft.ids.into_iter().zip(soft.probs), token);
                }
            }
            self.index.push(token);
            self.aligned.follow(&self.index);
        }
    }

    /// Remembers the target's distributions after the root (row 0) and after each node of a tree that continues
    /// the sequence, whether the node was accepted or not.
    pub fn feedback(&mut self, tree: &DraftTree, soft: TopK) {
        for row in 0..soft.rows() {
            let mut node = row as i32 - 1;
            let path = std::iter::from_fn(|| {
                let at = usize::try_from(node).ok()?;
                node = tree.parents[at];
                Some(tree.token_ids[at])
            });
            let (ids, probs) = soft.row(row);
            self.shared.knowledge.soft.insert(path.chain(self.newest_first()), ids, probs);
        }
        debug_assert_eq!(ROOT, -1);
    }

    fn newest_first(&self) -> impl Iterator<Item = Token> + '_ {
        self.tokens().iter().rev().copied()
    }

    /// Drafts continuations: at most `max_nodes` nodes, none less probable than `min_prob`.
    pub fn draft(&mut self, max_nodes: usize, min_prob: f32) -> &DraftTree {
        let knowledge = &self.shared.knowledge;
        self.drafting.draft(&Inputs {
            index: &self.index,
            predicted: self.predicted,
            aligned: &self.aligned,
            store: self.shared.store.as_deref(),
            live: &knowledge.live,
            soft: &knowledge.soft,
            recent: &self.recent,
            model: &self.model,
            calibration: &self.calibration,
            end_tokens: &self.shared.end_tokens,
            max_nodes,
            min_prob,
        })
    }

    /// Gives what is new since the last commit to the live store.
    pub fn commit(&mut self) {
        let tokens = &self.index.tokens()[self.predicted..];
        // enough of the old to find the new by
        self.shared.knowledge.commit(&tokens[self.committed.saturating_sub(8)..]);
        self.committed = tokens.len();
    }

    /// Ends the request: later ones learn from it.
    pub fn finish(mut self) {
        self.commit();
        self.shared.knowledge.learn(&self.base, &self.model);
    }

    fn count(&mut self) {
        self.shared.knowledge.count(&std::mem::take(&mut self.stats));
    }

    /// What the predictor has learned so far.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Bytes of memory that the sequence holds.
    pub fn memory_bytes(&self) -> usize {
        let own = if Arc::ptr_eq(&self.model, &self.base) { 0 } else { self.model.memory_bytes() };
        let (tokens, shared) = self.index.memory_bytes();
        tokens + shared + own + self.drafting.memory_bytes()
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.count();
    }
}
