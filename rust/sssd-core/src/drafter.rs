//! What sequences share: the datastore, the end tokens, and what requests learn from one another.

use std::sync::{Arc, Mutex};

use crate::draft::Scratch;
use crate::knowledge::{Knowledge, Stats};
use crate::memory::{Charge, MemoryFull};
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
    pub knowledge: Knowledge,
    /// For those who draft at the same time.
    pub scratch: Mutex<Vec<Scratch>>,
    /// Pays for the knowledge.
    _charge: Charge,
}

impl Drafter {
    /// A drafter that drafts nothing after an end token. `charge` pays for the knowledge.
    pub fn new(
        end_tokens: Vec<Token>,
        store: Option<Arc<dyn Corpus>>,
        knowledge: Knowledge,
        mut charge: Charge,
    ) -> Result<Self, MemoryFull> {
        charge.resize(knowledge.most_bytes())?;
        Ok(Self { shared: Arc::new(Shared { end_tokens, store, knowledge, scratch: Mutex::default(), _charge: charge }) })
    }

    /// What its sequences share.
    pub fn knowledge(&self) -> &Knowledge {
        &self.shared.knowledge
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        Arc::strong_count(&self.shared) - 1
    }

    /// Tokens after which nothing is drafted.
    pub fn end_tokens(&self) -> &[Token] {
        &self.shared.end_tokens
    }

    /// Starts a sequence with the tokens of its prompt and, if there is one, of its predicted output.
    pub fn begin(
        &self,
        prompt: &[Token],
        prediction: &[Token],
        charge: Charge,
    ) -> Result<Sequence, MemoryFull> {
        let mut sequence = Sequence::new(Arc::clone(&self.shared), prediction, charge)?;
        sequence.prefill(prompt)?;
        Ok(sequence)
    }

    /// The weights that the next sequence starts with.
    pub fn model(&self) -> Arc<Model> {
        self.shared.knowledge.model()
    }

    /// Replaces the weights that sequences start with.
    pub fn set_model(&self, model: Model) {
        self.shared.knowledge.set_model(model);
    }

    /// How drafts fared, by source.
    pub fn stats(&self) -> Stats {
        self.shared.knowledge.stats()
    }

    /// Tokens and documents in the live store.
    pub fn live_len(&self) -> (usize, usize) {
        self.shared.knowledge.live.len()
    }

    /// Bytes of memory that requests share, the datastore not counted.
    pub fn memory_bytes(&self) -> usize {
        self.shared.knowledge.memory_bytes()
    }
}
