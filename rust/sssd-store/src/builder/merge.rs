//! Adds the documents of an open store.

use std::sync::Arc;

use crate::builder::Builder;
use crate::datastore::Datastore;
use crate::documents::{Document, DocumentReader};
use crate::{Error, Result};

/// Documents and symbols passed between two looks at whether the build is still wanted.
const DOCUMENTS: usize = 1 << 12;
const SYMBOLS: u64 = 1 << 16;

impl Builder {
    /// Adds the documents of a store that `chosen` names by their numbers, without dead ones and, if the builder leaves
    /// such out, those that were added before; `chosen` then says which were added. The texts are compared with their
    /// checksums first. [`Builder::watch`] counts the symbols that are done with.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a store of another vocabulary or tokenizer, [`Error::Corrupt`] and [`Error::Changed`] for a
    /// damaged one; else as [`Builder::add_document`]. The documents before the error have been added.
    pub fn add_datastore(&mut self, store: &Arc<Datastore>, chosen: &mut [bool]) -> Result<()> {
        self.usable()?;
        if chosen.len() as u64 != store.documents() {
            let (given, held) = (chosen.len(), store.documents());
            let problem = format!("{given} documents are chosen or not, but the datastore has {held}");
            return Err(Error::InvalidArgument(problem));
        }
        store.check_model(Some(self.options.vocab_size), Some(&self.options.fingerprint))?;
        let watch = Arc::clone(&self.watch);
        store.verify_text(&watch)?;
        self.end_stream()?;
        self.inherit(store, chosen);
        let mut reader = DocumentReader::new(Arc::clone(store));
        let (mut documents, mut symbols) = (0, 0);
        while let Some(document) = reader.next_document()? {
            if let Some(chosen) = chosen.get_mut(document.number as usize)
                && *chosen
            {
                *chosen = !document.is_dead && self.copy(&mut reader, &document)?;
            }
            (documents, symbols) = (documents + 1, symbols + document.length + 1);
            if documents == DOCUMENTS || symbols > SYMBOLS {
                watch.count(symbols)?;
                (documents, symbols) = (0, 0);
            }
        }
        watch.count(symbols)
    }

    /// Keeps the tables for ranking of a store that is added whole, unless it has better ones. Of a text of which
    /// something is left out, nothing stays: tables are learned anew.
    fn inherit(&mut self, store: &Datastore, chosen: &[bool]) {
        let tables = store.living_tables().filter(|_| chosen.iter().all(|chosen| *chosen));
        let held = self.inherited.as_ref().map_or(0, |tables| tables.learned());
        if let Some(tables) = tables.filter(|tables| tables.learned() > held) {
            self.inherited = Some(Arc::clone(tables));
        }
    }

    /// Adds a document, unless it was added before.
    fn copy(&mut self, reader: &mut DocumentReader, document: &Document) -> Result<bool> {
        let is_new = self.is_new(|hash| {
            let mut from = 0;
            while from < document.length {
                let tokens = reader.tokens(document, from)?;
                hash.update(tokens);
                from += tokens.len() as u64;
            }
            Ok(())
        });
        if !is_new? {
            return Ok(false);
        }
        let copied = self.copy_tokens(reader, document);
        self.failed = copied.is_err();
        copied.map(|()| true)
    }

    fn copy_tokens(&mut self, reader: &mut DocumentReader, document: &Document) -> Result<()> {
        let mut from = 0;
        loop {
            let end = from + self.begin_part(document.length - from)?;
            while from < end {
                let tokens = reader.tokens(document, from)?;
                let count = usize::try_from(end - from).map_or(tokens.len(), |most| most.min(tokens.len()));
                self.write_tokens(&tokens[..count])?;
                from += count as u64;
            }
            self.end_part()?;
            if from == document.length {
                return Ok(());
            }
        }
    }
}
