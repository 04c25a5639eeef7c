//! One request: its tokens, their index, and what drafting for it has learned.

use std::sync::Arc;

use crate::draft::{Drafting, Limits};
use crate::index::Index;
use crate::model::Model;
use crate::drafter::Shared;
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

    pub fn tokens(&self) -> &[Token] {
        self.index.tokens()
    }

    pub fn extend(&mut self, tokens: &[Token]) {
        self.drafting.learn(&mut self.model, tokens);
        tokens.iter().for_each(|&token| self.index.push(token));
    }

    pub fn draft(&mut self, max_nodes: usize) -> DraftTree {
        let limits =
            Limits { max_nodes, end_tokens: &self.shared.end_tokens, min_prob: 0.0 };
        self.drafting.draft(&self.index, self.shared.store.as_deref(), &self.model, &limits)
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    pub fn memory_bytes(&self) -> usize {
        self.index.memory_bytes() + self.drafting.memory_bytes()
    }
}
