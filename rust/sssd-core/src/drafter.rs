//! What sequences share: the datastore, the end tokens, and what requests learn from one another.

use std::sync::{Arc, Mutex};

use crate::draft::Scratch;
use crate::entry::WORDS as SOFT_WORDS;
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
        Ok(Self {
            shared: Arc::new(Shared {
                end_tokens,
                store,
                knowledge,
                scratch: Mutex::default(),
                _charge: charge,
            }),
        })
    }

    /// Bytes that what its sequences share may come to.
    pub fn most_bytes(&self) -> usize {
        self.shared.knowledge.most_bytes()
    }

    /// The documents of the live store, oldest first, and how often each was of use lately.
    pub fn documents(&self) -> Vec<(Vec<Token>, u32)> {
        self.shared.knowledge.live.documents()
    }

    /// What the target held probable, as entries of a table, with their places.
    pub fn soft_entries(&self) -> Vec<(u64, [u64; SOFT_WORDS])> {
        self.shared.knowledge.soft.entries()
    }

    /// Takes over what another drafter has learned. Entries from a table of another size are of no use, and those with
    /// tokens from `limit` on are left out.
    pub fn restore(
        &self,
        model: Model,
        documents: &[(Vec<Token>, u32)],
        soft: &[(u64, [u64; SOFT_WORDS])],
        limit: Token,
    ) {
        self.set_model(model);
        self.shared.knowledge.live.restore(documents);
        self.shared.knowledge.soft.restore(soft, limit);
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
