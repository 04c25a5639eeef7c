//! Reads the documents of a store back, in their order and without touching mapped pages.

use std::sync::Arc;

use sssd_core::Token;

use crate::datastore::{Datastore, Part};
use crate::{Error, Result};

/// Symbols read at once.
const WINDOW: usize = 1 << 16;

/// A document of an open store.
#[derive(Clone, Copy, Debug)]
pub struct Document {
    /// Its place among all documents of the store.
    pub number: u64,
    /// Tokens.
    pub length: u64,
    /// Whether tombstones name it.
    pub is_dead: bool,
    pub(crate) part: usize,
    /// Of the segment's text.
    pub(crate) start: u64,
}

/// Goes through the documents of a store, those of the first file first.
pub struct DocumentReader {
    store: Arc<Datastore>,
    part: usize,
    /// Of the part, those that were passed.
    passed: u64,
    /// Where the next document starts.
    start: u64,
    /// The next document's.
    number: u64,
    /// The file, and its first document's.
    file: (usize, u64),
    window: Window,
    tokens: Vec<Token>,
}

impl DocumentReader {
    /// At the first document.
    pub fn new(store: Arc<Datastore>) -> Self {
        Self {
            store,
            part: 0,
            passed: 0,
            start: 0,
            number: 0,
            file: (0, 0),
            window: Window::default(),
            tokens: Vec::new(),
        }
    }

    /// Goes on to the first document from `number` on whose segment is another one, but not beyond `number`: those before
    /// are not read.
    pub fn skip_to(&mut self, number: u64) {
        while let Some(part) = self.store.parts().get(self.part)
            && number - self.number.min(number) >= part.documents - self.passed
        {
            self.number += part.documents - self.passed;
            (self.part, self.passed, self.start) = (self.part + 1, 0, 0);
        }
    }

    /// Finds the next document.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the text is not what the counts say; [`Error::Changed`], [`Error::Io`],
    /// [`Error::OutOfMemory`].
    pub fn next_document(&mut self) -> Result<Option<Document>> {
        self.skip_to(self.number); // over what has no more
        let Some(&Part { file, documents, segment }) = self.store.parts().get(self.part) else {
            return Ok(None);
        };
        if file != self.file.0 {
            self.file = (file, self.store.files().take(file).map(|file| file.documents).sum());
        }
        let (number, part, start) = (self.number, self.part, self.start);
        let is_dead = self.store.is_dead(file, number - self.file.1);
        let length = segment.map_or(Ok(0), |segment| {
            let end = self.window.find_end(&self.store, part, segment, start)?;
            let symbols = self.store.segment(segment).symbols();
            let whole = (self.passed + 1 == documents) == (end + 1 == symbols);
            if end < symbols && whole { Ok(end - start) } else { Err(corrupt(&self.store, file)) }
        })?;
        self.passed += 1;
        self.number += 1;
        self.start += length + 1;
        Ok(Some(Document { number, length, is_dead, part, start }))
    }

    /// Some of a document's tokens from `from` on; none at its end only.
    ///
    /// # Errors
    /// As [`Self::next_document`].
    pub fn tokens(&mut self, document: &Document, from: u64) -> Result<&[Token]> {
        let left = document.length.saturating_sub(from);
        let Some(&Part { file, segment: Some(segment), .. }) =
            self.store.parts().get(document.part).filter(|_| left > 0)
        else {
            return Ok(&[]);
        };
        let vocab_size = self.store.vocab_size();
        let found = self.window.from(&self.store, document.part, segment, document.start + from)?;
        let found = &found[..usize::try_from(left).map_or(found.len(), |left| left.min(found.len()))];
        // so that every token that leaves is one
        if found.is_empty() || found.iter().any(|&symbol| symbol.wrapping_sub(1) >= vocab_size) {
            return Err(corrupt(&self.store, file));
        }
        self.tokens.clear();
        self.tokens.try_reserve(found.len()).map_err(Error::memory("the tokens"))?;
        self.tokens.extend(found.iter().map(|&symbol| symbol - 1));
        Ok(&self.tokens)
    }
}

fn corrupt(store: &Datastore, file: usize) -> Error {
    let path = store.files().nth(file).map(|file| file.path.clone()).unwrap_or_default();
    Error::Corrupt { path, problem: "the documents contradict the counts".into() }
}

/// A stretch of a segment's text.
#[derive(Default)]
struct Window {
    /// The part whose text it is of.
    part: usize,
    at: u64,
    symbols: Vec<u32>,
    bytes: Vec<u8>,
}

impl Window {
    /// The symbols from `position` on; none at the end of the text only.
    fn from(&mut self, store: &Datastore, part: usize, segment: usize, position: u64) -> Result<&[u32]> {
        let held = self.at..self.at + self.symbols.len() as u64;
        if self.part != part || !held.contains(&position) {
            self.load(store, part, segment, position)?;
        }
        let first = ((position - self.at) as usize).min(self.symbols.len());
        Ok(&self.symbols[first..])
    }

    fn load(&mut self, store: &Datastore, part: usize, segment: usize, position: u64) -> Result<()> {
        let path = store.check_file(store.parts()[part].file)?;
        let at = position & !7;
        self.symbols.clear(); // in case it fails
        store
            .segment(segment)
            .read_symbols(at, WINDOW, &mut self.bytes, &mut self.symbols)
            .map_err(Error::read(path))?;
        (self.part, self.at) = (part, at);
        Ok(())
    }

    /// Where the document that starts at `start` ends; the end of the text if it does not. A document that fits into the
    /// window is whole in it afterwards.
    fn find_end(&mut self, store: &Datastore, part: usize, segment: usize, start: u64) -> Result<u64> {
        let mut position = start;
        loop {
            let found = self.from(store, part, segment, position)?;
            if let Some(length) = found.iter().position(|&symbol| symbol == 0) {
                return Ok(position + length as u64);
            }
            if found.is_empty() {
                return Ok(position);
            }
            let next = position + found.len() as u64;
            if position == start && self.at != start & !7 {
                self.load(store, part, segment, start)?;
            } else {
                position = next;
            }
        }
    }
}
