//! What all sequences share: the datastore, the end tokens, and what has been learned.

use std::sync::{Arc, Mutex, PoisonError};

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
    pub min_prob: f32,
    pub model: Mutex<Model>,
}

impl Drafter {
    /// A drafter that drafts nothing after an end token.
    pub fn new(end_tokens: Vec<Token>, store: Option<Arc<dyn Corpus>>) -> Self {
        Self { shared: Arc::new(Shared { end_tokens, store, min_prob: std::env::var("MINP").ok().and_then(|v| v.parse().ok()).unwrap_or(0.0), model: Mutex::default() }) }
    }

    /// Tokens after which nothing is drafted.
    pub fn end_tokens(&self) -> &[Token] {
        &self.shared.end_tokens
    }

    #[doc(hidden)]
    pub fn begin_with(&self, model: Model, prompt: &[Token]) -> Sequence {
        Sequence::new(Arc::clone(&self.shared), model, prompt)
    }

    /// Starts a sequence with the tokens of its prompt.
    pub fn begin(&self, prompt: &[Token]) -> Sequence {
        let model = self.shared.model.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Sequence::new(Arc::clone(&self.shared), model, prompt)
    }
}
