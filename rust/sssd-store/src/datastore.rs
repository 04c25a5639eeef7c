use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::SmallVec;
use sssd_core::{Corpus, Match, Token};

use crate::bytes::{Bytes, Load, Source};
use crate::format::{self, Header, MAX_SUCCESSORS, SegmentEntry};
use crate::progress::Progress;
use crate::segment::{Interval, Query, Segment};
use crate::successors::Merged;
use crate::{Error, Fingerprint, Result};

/// Longest context that [`Corpus::matches`] looks up; larger `max_length` are cut to it.
const MAX_MATCH: usize = 32;
/// Length that a look-up tries first: counts only fall with the length, so it goes up or down from here. Measured on
/// 30.9 M tokens: 4.1 us from 3, 5.1 us from 4, 5.9 us from 5.
const FIRST_LENGTH: usize = 3;
/// A position is a segment and an offset in it of this many bits.
const OFFSET_BITS: u32 = 32;

/// One or more datastore files, opened for look-up. Shared and queried by any number of threads.
pub struct Datastore {
    files: Vec<OpenFile>,
    segments: Vec<Segment>,
    vocab_size: u32,
    merged: Merged,
}

struct OpenFile {
    info: FileInfo,
    /// The path from the root, whatever the folder is changed to.
    absolute: PathBuf,
    bytes: Arc<Bytes>,
}

/// What the header of a datastore file says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileInfo {
    /// The file.
    pub path: PathBuf,
    /// Format version.
    pub version: u32,
    /// Identifier derived from the contents.
    pub uuid: [u8; 16],
    /// Token ids are smaller than this.
    pub vocab_size: u32,
    /// The tokenizer, all zero if unknown.
    pub fingerprint: Fingerprint,
    /// Tokens of all documents.
    pub tokens: u64,
    /// Documents, the empty ones included.
    pub documents: u64,
    /// Independently sorted parts of the file.
    pub segments: u64,
    /// Most symbols (tokens and document ends) that the builder put into a segment.
    pub segment_symbols: u64,
    /// Whether repeated documents were left out.
    pub deduplicated: bool,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl FileInfo {
    fn new(path: &Path, header: &Header) -> Self {
        Self {
            path: path.to_owned(),
            version: format::VERSION,
            uuid: header.uuid,
            vocab_size: header.vocab_size,
            fingerprint: header.fingerprint,
            tokens: header.tokens,
            documents: header.documents,
            segments: header.segments,
            segment_symbols: header.segment_symbols,
            deduplicated: header.deduplicated,
            file_bytes: header.file_length,
        }
    }
}

impl Datastore {
    /// Opens files as one store. Reads only headers, segment tables and trailers (with [`Load::Ram`], the whole
    /// files into memory).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`], [`Error::Version`], [`Error::OutOfMemory`]; [`Error::Mismatch`] if the files
    /// differ in vocabulary size or (known) tokenizer; [`Error::InvalidArgument`] without a path.
    pub fn open<P: AsRef<Path>>(paths: &[P], load: Load) -> Result<Self> {
        Self::open_watched(paths, load, &Progress::default())
    }

    /// The same, which another thread can cancel.
    ///
    /// # Errors
    /// The same, and [`Error::Cancelled`].
    pub fn open_watched<P: AsRef<Path>>(paths: &[P], load: Load, progress: &Progress) -> Result<Self> {
        let mut store = Self::empty();
        for path in paths {
            let path = path.as_ref();
            let source = Source::open(path)?;
            let parts = format::parse(path, source.len(), &|start, out| source.read(start, out))?;
            store.add(path, parts, || source.load(path, load, progress))?;
        }
        store.complete()
    }

    /// Opens a file's contents. `name` stands for the path in error messages.
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::Version`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        let mut store = Self::empty();
        let (path, length, bytes) = (Path::new(name), bytes.len() as u64, Bytes::Owned(bytes));
        let parts = format::parse(path, length, &|start, out| bytes.read(start, out))?;
        store.add(path, parts, || Ok(bytes))?;
        store.complete()
    }

    fn empty() -> Self {
        Self { files: Vec::new(), segments: Vec::new(), vocab_size: 0, merged: Merged::empty() }
    }

    fn add(
        &mut self,
        path: &Path,
        (header, table): (Header, Vec<SegmentEntry>),
        load: impl FnOnce() -> Result<Bytes>,
    ) -> Result<()> {
        let info = FileInfo::new(path, &header);
        if let Some(first) = self.files.first() {
            agree(&first.info, &info)?;
        }
        let bytes = Arc::new(load()?);
        self.segments.try_reserve(table.len()).map_err(Error::memory("the segments of a datastore"))?;
        self.files.try_reserve(1).map_err(Error::memory("the files of a datastore"))?;
        self.segments.extend(table.iter().map(|entry| Segment::new(bytes.clone(), header.vocab_size, entry)));
        self.vocab_size = header.vocab_size;
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        self.files.push(OpenFile { info, absolute, bytes });
        Ok(())
    }

    fn complete(mut self) -> Result<Self> {
        if self.files.is_empty() {
            return Err(Error::InvalidArgument("no datastore file was given".into()));
        }
        if self.segments.len() > 1 {
            let memory = |_| Error::OutOfMemory("the successors of a datastore".into());
            self.merged.reset(self.vocab_size).map_err(memory)?;
        }
        Ok(self)
    }

    /// Refuses a mapped store of which a file has been shortened or overwritten in place since it was opened: to touch
    /// its pages might end the process. One that was once found so stays refused. Takes a system call per file.
    ///
    /// # Errors
    /// [`Error::Changed`].
    pub fn check(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.bytes.check(&file.info.path))
    }

    /// How the files were brought into memory.
    pub fn load(&self) -> Load {
        match self.files.first().map(|file| &*file.bytes) {
            Some(Bytes::Mapped(_)) => Load::Mmap,
            _ => Load::Ram,
        }
    }

    /// The paths from the root.
    pub fn absolute_paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(|file| file.absolute.as_path())
    }

    /// Token ids are smaller than this.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// What the headers say, one entry per file.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &FileInfo> {
        self.files.iter().map(|file| &file.info)
    }

    /// Refuses a store that was not built for a model. What is `None`, or unknown in the file, is not compared.
    ///
    /// # Errors
    /// [`Error::Mismatch`].
    pub fn check_model(&self, vocab_size: Option<u32>, fingerprint: Option<&Fingerprint>) -> Result<()> {
        for FileInfo { path, vocab_size: built, fingerprint: tokenizer, .. } in self.files() {
            let problem = if vocab_size.is_some_and(|size| size != *built) {
                format!(
                    "a vocabulary of {built} tokens, but the model has {}",
                    vocab_size.unwrap_or_default()
                )
            } else if fingerprint.is_some_and(|expected| !same_tokenizer(expected, tokenizer)) {
                "built with another tokenizer than the model's".into()
            } else {
                continue;
            };
            return Err(Error::Mismatch { path: path.clone(), problem });
        }
        Ok(())
    }

    /// Reads every byte of every file and compares it with the checksums.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the damaged byte ranges of the first damaged file; [`Error::Changed`] if it has been
    /// changed since it was opened; [`Error::Io`], [`Error::OutOfMemory`].
    pub fn verify(&self) -> Result<()> {
        self.verify_watched(&Progress::default())
    }

    /// The same, which another thread can cancel.
    ///
    /// # Errors
    /// The same, and [`Error::Cancelled`].
    pub fn verify_watched(&self, progress: &Progress) -> Result<()> {
        for OpenFile { info, bytes, .. } in &self.files {
            let proceed = || progress.check().and_then(|()| bytes.check(&info.path));
            proceed()?;
            let read = |start, out: &mut [u8]| bytes.read(start, out);
            let damaged = format::damage(&info.path, info.file_bytes, &read, &proceed);
            bytes.check(&info.path)?; // whatever was found
            let damaged = damaged?;
            if !damaged.is_empty() {
                return Err(Error::corrupt(&info.path, format!("bytes changed in {}", list(&damaged))));
            }
        }
        Ok(())
    }

    /// Occurrences of `tokens` within documents; without tokens, the number of tokens in the store.
    ///
    /// # Errors
    /// [`Error::InvalidToken`], [`Error::Changed`], [`Error::OutOfMemory`].
    pub fn count(&self, tokens: &[Token]) -> Result<u64> {
        if tokens.is_empty() {
            return Ok(self.files.iter().map(|file| file.info.tokens).sum());
        }
        self.check_tokens(tokens)?;
        self.check()?;
        let query = Query::new(tokens, self.vocab_size)?;
        Ok(self.segments.iter().map(|segment| length(&segment.interval(&query))).sum())
    }

    /// At most `limit` evenly spread occurrences of `tokens` (not empty), as positions of what follows.
    ///
    /// # Errors
    /// [`Error::InvalidToken`], [`Error::Changed`], [`Error::OutOfMemory`]; [`Error::InvalidArgument`] without tokens.
    pub fn occurrences(&self, tokens: &[Token], limit: usize) -> Result<Vec<u64>> {
        if tokens.is_empty() {
            return Err(Error::InvalidArgument("at least one token is needed".into()));
        }
        self.check_tokens(tokens)?;
        self.check()?;
        let query = Query::new(tokens, self.vocab_size)?;
        let (mut intervals, mut positions) = (Vec::new(), Vec::new());
        let memory = || Error::memory("the occurrences");
        intervals.try_reserve_exact(self.segments.len()).map_err(memory())?;
        intervals.extend(self.segments.iter().map(|segment| segment.interval(&query)));
        let total: u64 = intervals.iter().map(length).sum();
        positions
            .try_reserve_exact(usize::try_from(total).map_or(limit, |total| total.min(limit)))
            .map_err(memory())?;
        self.sample(&intervals, tokens.len(), limit, |position| positions.push(position));
        Ok(positions)
    }

    fn check_tokens(&self, tokens: &[Token]) -> Result<()> {
        match tokens.iter().find(|&&token| token >= self.vocab_size) {
            Some(&token) => Err(Error::InvalidToken { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    /// Hands out the positions `length` tokens after at most `limit` evenly spread ranks of the intervals (one
    /// per segment), and returns how many ranks there are.
    #[inline]
    fn sample(&self, intervals: &[Interval], skip: usize, limit: usize, mut take: impl FnMut(u64)) -> u64 {
        let total: u64 = intervals.iter().map(length).sum();
        let taken = total.min(limit as u64);
        let (mut segment, mut before) = (0, 0);
        for sample in 0..taken {
            // The middle of the sample's share; in 128 bits, for `total` may be large.
            let rank = ((2 * u128::from(sample) + 1) * u128::from(total) / (2 * u128::from(taken))) as u64;
            while rank - before >= length(&intervals[segment]) {
                before += length(&intervals[segment]);
                segment += 1;
            }
            let start = self.segments[segment].position(intervals[segment].start + (rank - before));
            let offset = start + skip as u64;
            self.segments[segment].prefetch(offset);
            take((segment as u64) << OFFSET_BITS | offset.min(u64::from(u32::MAX)));
        }
        total
    }
}

impl Corpus for Datastore {
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
        let valid = context.iter().rev().take_while(|&&token| token < self.vocab_size);
        let usable = valid.take(max_length.min(MAX_MATCH)).count();
        for &token in &context[context.len() - usable..] {
            self.segments.iter().for_each(|segment| segment.prefetch_bucket(token));
        }
        let count = self.segments.len();
        let mut intervals: SmallVec<[Interval; MAX_MATCH]> = SmallVec::new();
        if intervals.try_reserve(usable * count).is_err() {
            return;
        }
        intervals.resize(usable * count, 0..0);
        let start = FIRST_LENGTH.min(usable);
        // The occurrences of the last `length` tokens, kept in `intervals`.
        let search = |intervals: &mut [Interval], length: usize| -> u64 {
            let Ok(query) = Query::new(&context[context.len() - length..], self.vocab_size) else { return 0 };
            let (known, found) = intervals.split_at_mut((length - 1) * count);
            let shorter =
                known.len().checked_sub(count).map(|last| &known[last..]).filter(|_| length > start);
            for (index, segment) in self.segments.iter().enumerate() {
                // what a segment has of more tokens it has of fewer
                if shorter.is_none_or(|shorter| !shorter[index].is_empty()) {
                    found[index] = segment.interval(&query);
                }
            }
            found[..count].iter().map(self::length).sum()
        };

        let mut longest = start;
        while longest > 0 && search(&mut intervals, longest) == 0 {
            longest -= 1;
        }
        let shortest_known = longest;
        if longest == start {
            while longest < usable && search(&mut intervals, longest + 1) > 0 {
                longest += 1;
            }
        }
        for length in (1..=longest).rev() {
            if length < shortest_known {
                search(&mut intervals, length);
            }
            let first = out.len();
            if out.try_reserve(max_samples).is_err() {
                return;
            }
            let take = |position| out.push(Match { position, length: length as u32, weight: 1.0 });
            let total =
                self.sample(&intervals[(length - 1) * count..length * count], length, max_samples, take);
            let weight = total as f32 / (out.len() - first).max(1) as f32;
            out[first..].iter_mut().for_each(|found| found.weight = weight);
            if total >= 2 * max_samples as u64 || length == 2 {
                break;
            }
        }
    }

    fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        let segment =
            usize::try_from(position >> OFFSET_BITS).ok().and_then(|index| self.segments.get(index));
        segment.map_or(0, |segment| segment.continuation(position & u64::from(u32::MAX), out))
    }

    fn successors(&self, token: Token, out: &mut Vec<(Token, f32)>) {
        if token >= self.vocab_size {
            return;
        }
        if let [segment] = self.segments.as_slice() {
            if out.try_reserve(MAX_SUCCESSORS).is_ok() {
                out.extend(segment.successors(token));
            }
            return;
        }
        self.merged.get(token, out, |out| {
            let held = |segment: &Segment| length(&segment.bucket(token));
            let (holders, total) = (self.segments.iter().map(held).filter(|&held| held > 0))
                .fold((0, 0), |(holders, total), held| (holders + 1, total + held));
            let parts = self.segments.iter().filter(|segment| held(segment) > 0);
            let parts = parts.map(|segment| (held(segment) as f32 / total as f32, segment.successors(token)));
            self.merged.merge(parts, holders, out)
        });
    }

    fn is_readable(&self) -> bool {
        self.files.iter().all(|file| file.bytes.is_intact())
    }
}

#[inline]
fn length(interval: &Interval) -> u64 {
    interval.end.saturating_sub(interval.start)
}

fn agree(first: &FileInfo, other: &FileInfo) -> Result<()> {
    let problem = if first.vocab_size != other.vocab_size {
        format!(
            "a vocabulary of {} tokens, not {} as {}",
            other.vocab_size,
            first.vocab_size,
            first.path.display()
        )
    } else if !same_tokenizer(&first.fingerprint, &other.fingerprint) {
        format!("built with another tokenizer than {}", first.path.display())
    } else {
        return Ok(());
    };
    Err(Error::Mismatch { path: other.path.clone(), problem })
}

/// Whether two fingerprints may be of one tokenizer.
fn same_tokenizer(one: &Fingerprint, other: &Fingerprint) -> bool {
    let unknown = Fingerprint::default();
    one == other || *one == unknown || *other == unknown
}

fn list(ranges: &[Range<u64>]) -> String {
    let shown: Vec<_> =
        ranges.iter().take(8).map(|range| format!("{}..{}", range.start, range.end)).collect();
    let more = ranges.len().saturating_sub(shown.len());
    shown.join(", ") + &if more > 0 { format!(" and {more} more ranges") } else { String::new() }
}
