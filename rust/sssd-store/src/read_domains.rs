//! What follows each token in the small domains of an open store, read from its text without touching mapped pages.

use std::ops::Range;
use std::sync::Arc;

use sssd_core::Token;

use crate::datastore::Datastore;
use crate::lookup::length;
use crate::own::Own;
use crate::progress::Progress;
use crate::residency::Everything;
use crate::segment::Segment;
use crate::{Error, Result};

/// Symbols read at once.
const WINDOW: u64 = 1 << 16;

impl Datastore {
    /// Reads the text of small domains for what follows each token in them: 10 million tokens a second, and at most 16
    /// bytes a token while it lasts. Tombstones that come later are not passed over.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::OutOfMemory`], [`Error::Changed`], [`Error::Cancelled`].
    pub fn read_domains(&mut self, progress: &Progress) -> Result<()> {
        for number in 1..self.owns_mut().len() {
            let mut pairs = Vec::new();
            let memory = Error::memory("the domains of a datastore");
            pairs.try_reserve(self.owns_mut()[number].0 as usize).map_err(memory)?;
            self.pairs(number as u8, &mut pairs, progress)?;
            let count = |token| {
                let bucket = |segment: &Segment| segment.bucket(token, Everything);
                self.all_segments().iter().filter_map(bucket).map(|bucket| length(&bucket)).sum()
            };
            let own = Own::new(&mut pairs, self.vocab_size(), count)?;
            self.owns_mut()[number].1 = Some(Arc::new(own));
        }
        Ok(())
    }

    /// The pairs of tokens in living documents of a domain.
    fn pairs(&self, number: u8, pairs: &mut Vec<(Token, Token)>, progress: &Progress) -> Result<()> {
        for file in 0..self.files().len() {
            let (mut document, mut start) = (0, 0);
            for (documents, symbols, own) in self.numbered_runs(file) {
                let end = start + symbols;
                if own == number {
                    self.pairs_of(file, start..end, document, pairs, progress)?;
                }
                (document, start) = (document + documents, end);
            }
        }
        Ok(())
    }

    /// Those in a stretch of a file's text, which begins with this document.
    fn pairs_of(
        &self,
        file: usize,
        place: Range<u64>,
        mut document: u64,
        pairs: &mut Vec<(Token, Token)>,
        progress: &Progress,
    ) -> Result<()> {
        let (mut first, mut bytes, mut symbols) = (0, Vec::new(), Vec::new());
        let memory = || Error::memory("the domains of a datastore");
        for part in self.parts().iter().filter(|part| part.file == file) {
            let Some(segment) = part.segment.map(|segment| self.segment(segment)) else {
                document += place.end.min(first + part.documents).saturating_sub(place.start.max(first));
                first += part.documents;
                continue;
            };
            let mut at = place.start.max(first) - first;
            let end = place.end.saturating_sub(first).min(segment.symbols());
            let mut before = None;
            while at < end {
                progress.check()?;
                let (path, from) = (self.check_file(file)?, at & !7);
                let count = (end - from).min(WINDOW) as usize;
                segment.read_symbols(from, count, &mut bytes, &mut symbols).map_err(Error::read(path))?;
                pairs.try_reserve(symbols.len()).map_err(memory())?;
                for &symbol in &symbols[(at - from) as usize..] {
                    let token = symbol.checked_sub(1).filter(|&token| token < self.vocab_size());
                    let living = !self.is_dead(file, document);
                    if let (Some(before), Some(token), true) = (before, token, living) {
                        pairs.push((before, token));
                    }
                    document += u64::from(symbol == 0);
                    before = token;
                }
                at = from + symbols.len() as u64;
            }
            first += segment.symbols();
        }
        Ok(())
    }
}
