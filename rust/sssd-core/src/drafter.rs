//! What all sequences share: the datastore, the end tokens, and the predictor's first weights.

use std::sync::Arc;

use crate::model::Model;
use crate::sequence::Sequence;
use crate::{Corpus, Token};

/// Starts sequences.
pub struct Drafter {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub end_tokens: Vec<Token>,
    pub store: Option<Arc<dyn Corpus>>,
    pub model: Model,
}

impl Drafter {
    /// A drafter that drafts nothing after an end token and whose sequences start with the weights of `model`.
    pub fn new(end_tokens: Vec<Token>, store: Option<Arc<dyn Corpus>>, model: Model) -> Self {
        Self { shared: Arc::new(Shared { end_tokens, store, model }) }
    }

    /// Tokens after which nothing is drafted.
    pub fn end_tokens(&self) -> &[Token] {
        &self.shared.end_tokens
    }

    /// Starts a sequence with the tokens of its prompt.
    pub fn begin(&self, prompt: &[Token]) -> Sequence {
        let model = self.shared.model.clone();
        Sequence::new(Arc::clone(&self.shared), model, prompt)
    }
}
