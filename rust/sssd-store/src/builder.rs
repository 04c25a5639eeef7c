//! Builds a datastore file.
//!
//! Documents go straight into the text section of a temporary file beside the target, so that adding takes no
//! memory. A segment is closed when sorting one more symbol would exceed the memory allowed. Every segment is read back
//! and indexed on its own, the first of them while documents are still added; at the end the indexes are appended in
//! order, and the finished file replaces the target in one step.

use std::collections::{HashSet, TryReserveError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sssd_core::Token;
use xxhash_rust::xxh3::Xxh3;

use crate::bytes::{Load, Source};
use crate::datastore::Datastore;
use crate::format::{
    Header, MAX_SEGMENTS, MAX_SUCCESSORS, MAX_VOCAB, SegmentEntry, TablesEntry, symbol_bits, tables_length,
};
use crate::learning;
use crate::output::Output;
use crate::packed::PackedWriter;
use crate::progress::Progress;
use crate::sorting::Sorting;
use crate::tables::Tables;
use crate::{Error, Fingerprint, Result};

mod merge;

/// The sorter takes 32-bit signed positions, and wants a little room.
const MAX_SORTED_SYMBOLS: u64 = i32::MAX as u64 - (1 << 20);
/// Larger texts are several segments, for several cores to sort.
const MAX_SEGMENT_SYMBOLS: u64 = 1 << 28;
/// Segments that `max_memory` always has room for at once. The number does not depend on the machine, nor do the bytes
/// of a file.
const AT_ONCE: u64 = 2;
/// Threads that sort, at most.
const MAX_THREADS: usize = 64;
/// Smaller segments than this are not worth a memory limit.
const MIN_SEGMENT_SYMBOLS: u64 = 1 << 16;
/// Buffers of the writer and the reader, and what else does not grow with the corpus.
const FIXED_MEMORY: u64 = 8 << 20;
/// A text of fewer tokens is worth less than the tables' 404 bytes for each token of the vocabulary.
const WORTH_LEARNING: u64 = 1 << 23;
/// Tables that were learned from at least this part of a text are not learned anew.
const ENOUGH: [u64; 2] = [3, 4];
/// Bytes of tables copied at a time.
const PIECE: usize = 1 << 16;
/// Tokens written between two looks at whether the build is still wanted.
const CHUNK: usize = 1 << 18;

/// Parameters of a build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Token ids are smaller than this; 1 to 2^24.
    pub vocab_size: u32,
    /// The tokenizer, all zero if unknown.
    pub fingerprint: Fingerprint,
    /// Leave out documents that were added before.
    pub deduplicate: bool,
    /// Bytes that the builder may allocate (without the 16 bytes per document of `deduplicate`). Smaller limits
    /// give more segments, which cost look-up time, and of which a file has at most 64. `None`: segments of 2^28 tokens,
    /// 2.3 GB for each thread.
    pub max_memory: Option<u64>,
    /// Learn tables for ranking candidates ([`sssd_core::LogBilinear`]). `None`: if there are 2^23 tokens or more and
    /// `max_memory` allows it.
    pub ranking: Option<bool>,
    /// Threads that sort segments, as far as `max_memory` allows, from the moment at which a segment is full; 1 to 64. The
    /// file is the same whatever their number. 1: [`Builder::finish`] sorts.
    pub threads: usize,
}

impl BuildOptions {
    /// Options for a vocabulary, everything else at its default.
    pub fn new(vocab_size: u32) -> Self {
        Self {
            vocab_size,
            fingerprint: Fingerprint::default(),
            deduplicate: false,
            max_memory: None,
            ranking: None,
            threads: 1,
        }
    }

    /// Bytes of sorting a segment of so many symbols: the text and the suffix array take 4 each, the fences an eighth.
    fn segment_memory(&self, symbols: u64) -> u64 {
        u64::from(self.vocab_size) * (8 * MAX_SUCCESSORS as u64 + 64) + (66 * symbols).div_ceil(8)
    }

    /// Most symbols per segment that the memory allows.
    fn allowed_symbols(&self) -> Result<u64> {
        let Some(limit) = self.max_memory else { return Ok(MAX_SORTED_SYMBOLS) };
        let fixed = AT_ONCE * self.segment_memory(0) + FIXED_MEMORY;
        let symbols = limit.saturating_sub(fixed).saturating_mul(8) / (66 * AT_ONCE);
        if symbols < MIN_SEGMENT_SYMBOLS {
            let least = (fixed + 9 * AT_ONCE * MIN_SEGMENT_SYMBOLS).div_ceil(1 << 20);
            return Err(Error::InvalidArgument(format!(
                "max_memory is too small for a vocabulary of {} tokens: at least {least} MiB are needed",
                self.vocab_size
            )));
        }
        Ok(symbols.min(MAX_SORTED_SYMBOLS))
    }

    /// Whether the memory allows tables to be learned.
    fn has_room_to_learn(&self) -> bool {
        let needed = learning::memory(self.vocab_size) + FIXED_MEMORY;
        self.max_memory.is_none_or(|limit| limit >= needed)
    }

    /// Whether tables are to be learned from so many tokens.
    fn learns(&self, tokens: u64) -> bool {
        self.ranking.unwrap_or(tokens >= WORTH_LEARNING && self.has_room_to_learn()) && tokens > 0
    }

    /// Segments that can be sorted at once.
    fn at_once(&self, segment_symbols: u64) -> usize {
        let limit = self.max_memory.map_or(u64::MAX, |limit| limit.saturating_sub(FIXED_MEMORY));
        self.threads.min((limit / self.segment_memory(segment_symbols)).max(1) as usize)
    }
}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BuildSummary {
    /// Tokens in the file.
    pub tokens: u64,
    /// Documents in the file.
    pub documents: u64,
    /// Documents left out because they had been added before.
    pub duplicates: u64,
    /// Independently sorted parts of the file.
    pub segments: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// Writes a datastore file. The target appears, or is replaced, only when [`Builder::finish`] succeeds;
/// dropping the builder removes the temporary file.
pub struct Builder {
    target: PathBuf,
    output: Output,
    options: BuildOptions,
    allowed_symbols: u64,
    segment_symbols: u64,
    segments: Vec<SegmentEntry>,
    text: PackedWriter,
    /// Of the segment that is being filled.
    text_start: u64,
    symbols: u64,
    documents: u64,
    /// The unfinished document of [`Builder::add_stream`].
    partial: Vec<Token>,
    seen: HashSet<u128>,
    duplicates: u64,
    /// Those of a store that was added whole.
    inherited: Option<Arc<Tables>>,
    watch: Arc<Progress>,
    sorting: Sorting,
    failed: bool,
}

impl Builder {
    /// Starts a file that is to replace `target`.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written; [`Error::InvalidArgument`] for a bad option.
    pub fn create(target: &Path, options: BuildOptions) -> Result<Self> {
        if !(1..=MAX_VOCAB).contains(&options.vocab_size) {
            let problem = format!("vocab_size must be between 1 and {MAX_VOCAB}, not {}", options.vocab_size);
            return Err(Error::InvalidArgument(problem));
        }
        if !(1..=MAX_THREADS).contains(&options.threads) {
            let problem = format!("threads must be between 1 and {MAX_THREADS}, not {}", options.threads);
            return Err(Error::InvalidArgument(problem));
        }
        let allowed_symbols = options.allowed_symbols()?;
        if options.ranking == Some(true) && !options.has_room_to_learn() {
            let least = (learning::memory(options.vocab_size) + FIXED_MEMORY).div_ceil(1 << 20);
            return Err(Error::InvalidArgument(format!(
                "max_memory is too small to learn tables for ranking: at least {least} MiB are needed with a vocabulary \
                 of {} tokens",
                options.vocab_size
            )));
        }
        let segment_symbols = allowed_symbols.min(MAX_SEGMENT_SYMBOLS);
        let sorting = Sorting::new(options.vocab_size, options.at_once(segment_symbols));
        let output = Output::create(target).map_err(Error::io(target))?;
        let text = PackedWriter::new(symbol_bits(options.vocab_size));
        Ok(Self {
            target: target.to_owned(),
            output,
            options,
            allowed_symbols,
            segment_symbols,
            segments: Vec::new(),
            text,
            text_start: 0,
            symbols: 0,
            documents: 0,
            partial: Vec::new(),
            seen: HashSet::new(),
            duplicates: 0,
            inherited: None,
            watch: Arc::default(),
            sorting,
            failed: false,
        })
    }

    /// The file that is being written; whoever interrupts a build from outside may delete it.
    pub fn temporary_path(&self) -> &Path {
        self.output.temporary_path()
    }

    /// Lets only the owner read the file.
    pub fn make_private(&self) -> Result<()> {
        self.output.make_private().map_err(Error::io(self.output.temporary_path()))
    }

    /// Closes segments at `symbols`, for tests of stores with many.
    #[cfg(test)]
    pub(crate) fn limit_segments(&mut self, symbols: u64) {
        self.segment_symbols = self.segment_symbols.min(symbols);
    }

    /// Cancels what adds documents, from another thread.
    pub fn watch(&self) -> Arc<Progress> {
        Arc::clone(&self.watch)
    }

    /// Whether it cannot go on.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Symbols (tokens and document ends) added so far.
    pub fn symbols(&self) -> u64 {
        self.segments.iter().map(|segment| segment.symbols).sum::<u64>() + self.symbols
    }

    /// What the progress of [`Builder::finish`] comes to: the symbols, and those that tables are learned from.
    pub fn work(&self) -> u64 {
        let symbols = self.symbols();
        let learned = if self.options.learns(symbols) { learning::symbols_to_learn(symbols) } else { 0 };
        symbols + learned
    }

    /// Adds one document, which may be empty. One longer than a segment is cut into several.
    ///
    /// # Errors
    /// [`Error::InvalidToken`], which leaves the build as it was. [`Error::Io`], [`Error::OutOfMemory`],
    /// [`Error::Cancelled`], and [`Error::InvalidArgument`] if `max_memory` gives too many segments, after which it
    /// cannot go on.
    pub fn add_document(&mut self, tokens: &[Token]) -> Result<()> {
        self.usable()?;
        let vocab_size = self.options.vocab_size;
        if let Some(&token) = tokens.iter().find(|&&token| token >= vocab_size) {
            return Err(Error::InvalidToken { token, vocab_size });
        }
        let is_new = self.is_new(|hash| {
            hash.update(tokens);
            Ok(())
        });
        if !is_new? {
            return Ok(());
        }
        let written = self.write_document(tokens);
        self.failed = written.is_err();
        written
    }

    /// Whether a document, whose tokens are given to the hash, is to be added.
    fn is_new(&mut self, read: impl FnOnce(&mut DocumentHash) -> Result<()>) -> Result<bool> {
        if !self.options.deduplicate {
            return Ok(true);
        }
        self.room(|builder| builder.seen.try_reserve(1), "the hashes of the documents")?;
        let mut hash = DocumentHash::default();
        read(&mut hash)?;
        let is_new = self.seen.insert(hash.value());
        self.duplicates += u64::from(!is_new);
        Ok(is_new)
    }

    /// Adds a stretch of a stream in which `end_token` is the last token of each document. The last document
    /// goes on with the next call, until [`Builder::end_stream`] or [`Builder::finish`].
    ///
    /// # Errors
    /// As [`Builder::add_document`]; the documents before an invalid token have been added.
    pub fn add_stream(&mut self, tokens: &[Token], end_token: Token) -> Result<()> {
        for piece in tokens.split_inclusive(|&token| token == end_token) {
            let ended = piece.last() == Some(&end_token);
            if self.partial.is_empty() && ended {
                self.add_document(piece)?;
                continue;
            }
            self.room(|builder| builder.partial.try_reserve(piece.len()), "a document")?;
            self.partial.extend_from_slice(piece);
            // a document longer than a segment is cut anyway, and should not pile up in memory
            if ended || self.partial.len() as u64 >= self.segment_symbols {
                let document = std::mem::take(&mut self.partial);
                self.add_document(&document)?;
            }
        }
        Ok(())
    }

    /// Ends the document that [`Builder::add_stream`] has left open, if any.
    ///
    /// # Errors
    /// As [`Builder::add_document`].
    pub fn end_stream(&mut self) -> Result<()> {
        let document = std::mem::take(&mut self.partial);
        if document.is_empty() { Ok(()) } else { self.add_document(&document) }
    }

    fn usable(&self) -> Result<()> {
        if self.failed {
            return Err(Error::InvalidArgument("the builder has failed before; start again".into()));
        }
        self.watch.check()
    }

    /// Without memory the builder cannot go on: some of a stream may have been added.
    fn room(
        &mut self,
        reserve: impl FnOnce(&mut Self) -> std::result::Result<(), TryReserveError>,
        what: &'static str,
    ) -> Result<()> {
        let reserved = reserve(self);
        self.failed = reserved.is_err();
        reserved.map_err(Error::memory(what))
    }

    fn write_document(&mut self, mut tokens: &[Token]) -> Result<()> {
        loop {
            let fitting = self.begin_part(tokens.len() as u64)? as usize;
            let (part, rest) = tokens.split_at(fitting);
            self.write_tokens(part)?;
            self.end_part()?;
            if rest.is_empty() {
                return Ok(());
            }
            tokens = rest;
        }
    }

    /// Starts a document of `tokens`, and returns how many of them it can have: the others are another document.
    fn begin_part(&mut self, tokens: u64) -> Result<u64> {
        if self.symbols > 0 && tokens >= self.segment_symbols - self.symbols {
            self.close_segment()?;
        }
        if self.symbols == 0 {
            if self.segments.len() == MAX_SEGMENTS {
                return Err(Error::InvalidArgument(format!(
                    "max_memory gives more than the {MAX_SEGMENTS} segments that a file may have; raise it, or build \
                     several files"
                )));
            }
            self.text_start = self.output.align().map_err(Error::io(&self.target))?;
        }
        Ok(tokens.min(self.segment_symbols - self.symbols - 1))
    }

    fn write_tokens(&mut self, tokens: &[Token]) -> Result<()> {
        for piece in tokens.chunks(CHUNK) {
            self.watch.check()?;
            let mut symbols = piece.iter().map(|&token| u64::from(token) + 1);
            symbols
                .try_for_each(|symbol| self.text.push(symbol, &mut self.output))
                .map_err(Error::io(&self.target))?;
        }
        self.symbols += tokens.len() as u64;
        Ok(())
    }

    fn end_part(&mut self) -> Result<()> {
        self.text.push(0, &mut self.output).map_err(Error::io(&self.target))?;
        self.symbols += 1;
        self.documents += 1;
        Ok(())
    }

    fn close_segment(&mut self) -> Result<()> {
        let fresh = PackedWriter::new(symbol_bits(self.options.vocab_size));
        let text = std::mem::replace(&mut self.text, fresh);
        text.finish(&mut self.output).map_err(Error::io(&self.target))?;
        let mut segment = SegmentEntry {
            symbols: self.symbols,
            documents: self.documents,
            suffixes: self.symbols - self.documents,
            ..SegmentEntry::default()
        };
        segment.sections[0] = self.text_start..self.output.position();
        self.segments.try_reserve(1).map_err(Error::memory("the segments of a datastore"))?;
        self.segments.push(segment);
        (self.symbols, self.documents) = (0, 0);
        self.sorting.start(&mut self.output, &self.segments).map_err(Error::io(&self.target))
    }

    /// Sorts, writes the rest of the file, makes it durable and puts it in the target's place.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::OutOfMemory`] and [`Error::Cancelled`]; the target is then what it was before.
    pub fn finish(mut self, progress: &Progress) -> Result<BuildSummary> {
        self.usable()?;
        self.end_stream()?;
        if self.symbols > 0 {
            self.close_segment()?;
        }
        let target = self.target.clone();
        self.complete(progress).map_err(|source| {
            if progress.cancelled() { Error::Cancelled } else { Error::io(&target)(source) }
        })
    }

    fn complete(mut self, progress: &Progress) -> io::Result<BuildSummary> {
        self.sorting.finish(&mut self.output, &mut self.segments, progress)?;
        let tables = self.tables(progress)?;
        let header = Header {
            tables,
            vocab_size: self.options.vocab_size,
            fingerprint: self.options.fingerprint,
            tokens: self.segments.iter().map(|segment| segment.suffixes).sum(),
            documents: self.segments.iter().map(|segment| segment.documents).sum(),
            segment_symbols: self.allowed_symbols,
            deduplicated: self.options.deduplicate,
            ..Header::default()
        };
        let (tokens, documents) = (header.tokens, header.documents);
        progress.advance(0)?;
        let file_bytes =
            self.output.seal(|body_end, checksums| header.seal(body_end, checksums, &self.segments))?;
        let segments = self.segments.len() as u64;
        Ok(BuildSummary { tokens, documents, duplicates: self.duplicates, segments, file_bytes })
    }
}

impl Builder {
    /// Writes the tables for ranking, if there are to be some: those of a store that was added, if they were learned from
    /// enough, or new ones.
    fn tables(&mut self, progress: &Progress) -> io::Result<Option<TablesEntry>> {
        let tokens = self.segments.iter().map(|segment| segment.suffixes).sum();
        if !self.options.learns(tokens) {
            return Ok(None);
        }
        let start = self.output.align()?;
        let enough = |tables: &Arc<Tables>| {
            tables.learned().saturating_mul(ENOUGH[1]) >= ENOUGH[0].saturating_mul(tokens)
        };
        let learned = match self.inherited.take().filter(enough) {
            Some(tables) => self.copy_tables(&tables, progress)?,
            None => self.learn_tables(progress)?,
        };
        Ok(Some(TablesEntry { place: start..self.output.position(), learned }))
    }

    fn copy_tables(&mut self, tables: &Tables, progress: &Progress) -> io::Result<u64> {
        let (mut at, length) = (0, tables_length(self.options.vocab_size));
        let mut piece = [0; PIECE];
        while at < length {
            progress.advance(0)?;
            let piece = &mut piece[..(length - at).min(PIECE as u64) as usize];
            tables.read(at, piece)?;
            self.output.write_all(piece)?;
            at += piece.len() as u64;
        }
        Ok(tables.learned())
    }

    fn learn_tables(&mut self, progress: &Progress) -> io::Result<u64> {
        drop(self.output.read_back()?); // all of it is in the file
        let path = self.output.temporary_path().to_owned();
        let read = |failure: Error| io::Error::other(failure.to_string());
        let source = Source::open(&path).map_err(read)?;
        let bytes = source.load(&path, Load::MmapWait, progress).map_err(read)?;
        let store = Datastore::of_segments(bytes, self.options.vocab_size, &self.segments)?;
        learning::learn(&store, progress, &mut self.output)
    }
}

/// Of a document, to find those that were added before.
#[derive(Default)]
struct DocumentHash(Xxh3);

impl DocumentHash {
    fn update(&mut self, tokens: &[Token]) {
        let mut bytes = [0; 4 * 256];
        for piece in tokens.chunks(256) {
            let slots = bytes.chunks_exact_mut(4);
            slots.zip(piece).for_each(|(slot, token)| slot.copy_from_slice(&token.to_le_bytes()));
            self.0.update(&bytes[..4 * piece.len()]);
        }
    }

    fn value(&self) -> u128 {
        self.0.digest128()
    }
}
