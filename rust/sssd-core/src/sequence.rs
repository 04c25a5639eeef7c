//! One request: its tokens, their index, and what drafting for it has learned.

use std::sync::Arc;

use crate::draft::{Drafting, Inputs};
use crate::drafter::Shared;
use crate::index::Index;
use crate::model::Model;
use crate::{DraftTree, Token};

/// The state of one request.
#[derive(Clone)]
pub struct Sequence {
    shared: Arc<Shared>,
    index: Index,
    model: Model,
    drafting: Drafting,
}

impl Sequence {
    pub(crate) fn new(shared: Arc<Shared>, model: Model, prompt: &[Token]) -> Self {
        let mut index = Index::with_capacity(prompt.len());
        prompt.iter().for_each(|&token| index.push(token));
        Self { shared, index, model, drafting: Drafting::default() }
    }

    /// All tokens so far.
    pub fn tokens(&self) -> &[Token] {
        self.index.tokens()
    }

    /// Appends tokens that the target has produced, and learns from how the last draft fared.
    pub fn extend(&mut self, tokens: &[Token]) {
        self.drafting.learn(&mut self.model, tokens);
        tokens.iter().for_each(|&token| self.index.push(token));
    }

    /// Drafts continuations: at most `max_nodes` nodes.
    pub fn draft(&mut self, max_nodes: usize) -> &DraftTree {
        self.drafting.draft(&Inputs {
            index: &self.index,
            store: self.shared.store.as_deref(),
            model: &self.model,
            end_tokens: &self.shared.end_tokens,
            max_nodes,
        })
    }

    /// What the predictor has learned so far.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Bytes of memory that the sequence holds.
    pub fn memory_bytes(&self) -> usize {
        self.index.memory_bytes() + self.model.memory_bytes() + self.drafting.memory_bytes()
    }
}
