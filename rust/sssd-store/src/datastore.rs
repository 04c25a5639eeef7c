use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::SmallVec;
use sssd_core::{Corpus, DOMAINS, LogBilinear, Match, Token};

use crate::bytes::{Bytes, Load, Source};
use crate::domains::{DomainRun, Stretches, numbers, stretches};
use crate::format::{self, Header, MAX_SUCCESSORS, SegmentEntry, TablesEntry};
use crate::lookup::{Lookup, MAX_MATCH, OFFSET_BITS, length, position, sample};
use crate::own::Own;
use crate::progress::Progress;
use crate::residency::Everything;
#[cfg(test)]
use crate::residency::Residency;
use crate::segment::{Interval, Query, Segment};
use crate::successors::Merged;
use crate::tables::Tables;
use crate::tombstones::{Buried, Tombstones};
use crate::{Error, Fingerprint, Result};

/// One or more datastore files, opened for look-up. Shared and queried by any number of threads.
pub struct Datastore {
    files: Vec<OpenFile>,
    segments: Vec<Segment>,
    /// Of each segment which domain its text is of, if there are several.
    domains: Vec<Stretches>,
    /// The number of each domain that was said, 0 for all that are not small, and whether they were said.
    numbers: Vec<u8>,
    domains_said: bool,
    /// Of each number the tokens, and what follows tokens there, once that has been read.
    owns: Vec<(u64, Option<Arc<Own>>)>,
    parts: Vec<Part>,
    vocab_size: u32,
    merged: Merged,
    /// Those of the largest file that has some.
    tables: Option<Arc<Tables>>,
}

#[derive(Clone)]
struct OpenFile {
    info: FileInfo,
    /// The path from the root, whatever the folder is changed to.
    absolute: PathBuf,
    bytes: Arc<Bytes>,
    tables: Option<Arc<Tables>>,
    /// With their path from the root.
    tombstones: Option<(Arc<Tombstones>, PathBuf)>,
    /// Its documents by domain; one by itself unless that is said.
    runs: Arc<[DomainRun]>,
}

/// The documents of one segment, in the order of the file's table.
pub(crate) struct Part {
    pub file: usize,
    pub documents: u64,
    /// The segment, unless all documents are empty: nothing is looked up there.
    pub segment: Option<usize>,
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
    /// Tokens that the tables for ranking were learned from, if it has some.
    pub ranking_tokens: Option<u64>,
}

impl FileInfo {
    fn new(path: &Path, header: &Header) -> Self {
        Self {
            path: path.to_owned(),
            version: header.version(),
            uuid: header.uuid,
            vocab_size: header.vocab_size,
            fingerprint: header.fingerprint,
            tokens: header.tokens,
            documents: header.documents,
            segments: header.segments,
            segment_symbols: header.segment_symbols,
            deduplicated: header.deduplicated,
            file_bytes: header.file_length,
            ranking_tokens: header.tables.as_ref().map(|tables| tables.learned),
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

    /// The same, of which only some of the pages of 2^`page_bits` bytes count as being in memory.
    #[cfg(test)]
    pub(crate) fn from_part(
        bytes: Vec<u8>,
        page_bits: u32,
        resident: impl Fn(usize) -> bool,
    ) -> Result<Self> {
        let mut store = Self::empty();
        let residency = Residency::fixed(page_bits, bytes.len().div_ceil(1 << page_bits), resident);
        let bytes = Bytes::Part(bytes, residency);
        let parts =
            format::parse(Path::new("part"), bytes.len() as u64, &|start, out| bytes.read(start, out))?;
        store.add(Path::new("part"), parts, || Ok(bytes))?;
        store.complete()
    }

    fn empty() -> Self {
        Self {
            files: Vec::new(),
            segments: Vec::new(),
            domains: Vec::new(),
            numbers: Vec::new(),
            domains_said: false,
            owns: Vec::new(),
            parts: Vec::new(),
            vocab_size: 0,
            merged: Merged::empty(),
            tables: None,
        }
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
        let mut bytes = load()?;
        // all but the text and the suffixes
        let preferred = table.iter().flat_map(|entry| &entry.sections[2..]);
        let preferred = preferred.chain(header.tables.iter().map(|entry| &entry.place));
        let mut ranges = Vec::new();
        ranges.try_reserve(4 * table.len() + 1).map_err(Error::memory("the segments of a datastore"))?;
        ranges.extend(preferred.map(|section| section.start as usize..section.end as usize));
        bytes.keep_account(ranges).map_err(Error::io(path))?;
        let bytes = Arc::new(bytes);
        let id = u64::from_le_bytes(std::array::from_fn(|at| header.uuid[at]));
        let open = |entry: &TablesEntry| {
            Tables::open(&bytes, &entry.place, header.vocab_size, entry.learned, id).map(Arc::new)
        };
        let tables = header.tables.as_ref().map(open).transpose().map_err(Error::read(path))?;
        self.segments.try_reserve(table.len()).map_err(Error::memory("the segments of a datastore"))?;
        self.parts.try_reserve(table.len()).map_err(Error::memory("the segments of a datastore"))?;
        self.files.try_reserve(1).map_err(Error::memory("the files of a datastore"))?;
        for entry in &table {
            let segment = (entry.suffixes > 0).then_some(self.segments.len());
            self.parts.push(Part { file: self.files.len(), documents: entry.documents, segment });
            if segment.is_some() {
                self.segments.push(Segment::new(bytes.clone(), header.vocab_size, entry));
            }
        }
        self.vocab_size = header.vocab_size;
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let domain = self.files.len().min(DOMAINS - 1) as u8;
        let runs = [DomainRun { documents: info.documents, tokens: info.tokens, domain }].into();
        self.files.push(OpenFile { info, absolute, bytes, tables, tombstones: None, runs });
        Ok(())
    }

    /// Passes over the dead documents of a file, which [`crate::write_tombstones`] has written for it, from now on. The
    /// tombstones are read into memory and checked whole.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`], [`Error::Version`], [`Error::OutOfMemory`], [`Error::Cancelled`];
    /// [`Error::InvalidArgument`] for those of another store, or if there is no such file.
    pub fn add_tombstones(&mut self, file: usize, path: &Path, progress: &Progress) -> Result<()> {
        let tombstones = Tombstones::open(path, &self.buried(file)?, progress)?;
        self.bury(file, path, tombstones)
    }

    /// The same for their contents.
    ///
    /// # Errors
    /// The same.
    pub fn add_tombstones_from_bytes(&mut self, file: usize, name: &str, bytes: Vec<u8>) -> Result<()> {
        let path = Path::new(name);
        let tombstones = Tombstones::from_bytes(path, Bytes::Owned(bytes), &self.buried(file)?)?;
        self.bury(file, path, tombstones)
    }

    /// What the tombstones of a file must agree with.
    fn buried(&self, file: usize) -> Result<Buried<'_>> {
        let problem =
            || Error::InvalidArgument(format!("there is no file {file}, so it cannot have tombstones"));
        let info = &self.files.get(file).ok_or_else(problem)?.info;
        let mut suffixes = Vec::new();
        suffixes.try_reserve_exact(self.parts.len()).map_err(Error::memory("tombstones"))?;
        suffixes.extend(self.segments_of(file).map(|segment| self.segments[segment].suffixes()));
        Ok(Buried {
            path: &info.path,
            uuid: info.uuid,
            vocab_size: info.vocab_size,
            documents: info.documents,
            suffixes,
        })
    }

    fn bury(&mut self, file: usize, path: &Path, mut tombstones: Tombstones) -> Result<()> {
        let segments: SmallVec<[usize; 64]> = self.segments_of(file).collect();
        for (segment, living) in segments.into_iter().zip(tombstones.segments.drain(..)) {
            self.segments[segment].set_living(living);
        }
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        self.files[file].tombstones = Some((Arc::new(tombstones), absolute));
        self.forget_merged()
    }

    fn segments_of(&self, file: usize) -> impl Iterator<Item = usize> {
        self.parts.iter().filter(move |part| part.file == file).filter_map(|part| part.segment)
    }

    /// Of each file the path of its tombstones from the root, if it has some.
    pub fn tombstones_paths(&self) -> impl ExactSizeIterator<Item = Option<&Path>> {
        self.files.iter().map(|file| file.tombstones.as_ref().map(|(_, path)| path.as_path()))
    }

    /// Dead documents and tokens of a file.
    pub fn dead(&self, file: usize) -> (u64, u64) {
        let tombstones = self.files.get(file).and_then(|file| file.tombstones.as_ref());
        tombstones.map_or((0, 0), |(tombstones, _)| (tombstones.dead_documents, tombstones.dead_tokens))
    }

    /// Whether a document of a file is dead.
    pub(crate) fn is_dead(&self, file: usize, document: u64) -> bool {
        self.files[file].tombstones.as_ref().is_some_and(|(tombstones, _)| tombstones.is_dead(document))
    }

    /// The files of several stores as one, which shares what they have open.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if they differ in vocabulary size or (known) tokenizer, [`Error::OutOfMemory`],
    /// [`Error::InvalidArgument`] without a store.
    pub fn union<'a>(stores: impl IntoIterator<Item = &'a Self>) -> Result<Self> {
        let memory = || Error::memory("the segments of a datastore");
        let mut all = Self::empty();
        let (mut known, mut owns, mut stores_held) = (0, Vec::new(), 0);
        for store in stores {
            stores_held += 1;
            owns.clone_from(&store.owns);
            all.domains_said |= store.domains_said;
            for file in &store.files {
                all.files.first().map_or(Ok(()), |first| agree(&first.info, &file.info))?;
                all.files.try_reserve(1).map_err(memory())?;
                all.files.push(file.clone());
                if let (Some(file), true) = (all.files.last_mut(), known > 0) {
                    file.runs = file.runs.iter().map(|run| run.after(known)).collect();
                }
            }
            known += store.numbers.len();
            let (files, segments) = (all.files.len() - store.files.len(), all.segments.len());
            all.parts.try_reserve(store.parts.len()).map_err(memory())?;
            all.segments.try_reserve(store.segments.len()).map_err(memory())?;
            all.parts.extend(store.parts.iter().map(|part| Part {
                file: part.file + files,
                documents: part.documents,
                segment: part.segment.map(|segment| segment + segments),
            }));
            all.segments.extend(store.segments.iter().cloned());
            all.vocab_size = store.vocab_size;
        }
        let mut all = all.complete()?;
        if stores_held == 1 {
            all.owns = owns;
        }
        Ok(all)
    }

    /// Whether these files, with the tombstones of each, hold what is open. Reads only their headers.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`].
    pub fn is_of<P: AsRef<Path>>(&self, files: &[(P, Option<P>)]) -> Result<bool> {
        if files.len() != self.files.len() || !self.is_readable() {
            return Ok(false);
        }
        for (file, (path, tombstones)) in self.files.iter().zip(files) {
            let mut header = [0; format::PAGE as usize];
            file.bytes.read(0, &mut header).map_err(Error::read(&file.info.path))?;
            let same = is_file(path.as_ref(), file.info.file_bytes, &header)?
                && match (&file.tombstones, tombstones) {
                    (None, None) => true,
                    (Some((held, _)), Some(path)) => is_file(path.as_ref(), held.len(), held.header())?,
                    _ => false,
                };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn complete(mut self) -> Result<Self> {
        if self.files.is_empty() {
            return Err(Error::InvalidArgument("no datastore file was given".into()));
        }
        let largest =
            self.files.iter().filter(|file| file.tables.is_some()).max_by_key(|file| file.info.tokens);
        self.tables = largest.and_then(|file| file.tables.clone());
        self.forget_merged()?;
        self.find_domains()?;
        Ok(self)
    }

    /// Says for each file which domains its documents are of, in their order. Each is sampled by itself from now on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if that is not said of all files and all of their documents, or of more than
    /// [`DOMAINS`] domains; [`Error::OutOfMemory`].
    pub fn set_domains(&mut self, files: &[Vec<DomainRun>]) -> Result<()> {
        if files.len() != self.files.len() {
            let (given, files) = (files.len(), self.files.len());
            return Err(Error::InvalidArgument(format!(
                "domains of {given} files are given, not of {files}"
            )));
        }
        for (file, runs) in self.files.iter_mut().zip(files) {
            let sum = |of: fn(&DomainRun) -> u64| runs.iter().map(of).fold(0, u64::saturating_add);
            let (documents, tokens) = (sum(|run| run.documents), sum(|run| run.tokens));
            let path = file.info.path.display();
            if (documents, tokens) != (file.info.documents, file.info.tokens) {
                return Err(Error::InvalidArgument(format!(
                    "{path} has {} documents of {} tokens, but domains are given of {documents} of {tokens}",
                    file.info.documents, file.info.tokens
                )));
            }
            if let Some(run) = runs.iter().find(|run| usize::from(run.domain) >= DOMAINS) {
                let most = DOMAINS - 1;
                return Err(Error::InvalidArgument(format!("{path}: domain {} is above {most}", run.domain)));
            }
            file.runs = runs.as_slice().into();
        }
        self.domains_said = true;
        self.find_domains()
    }

    /// Of each file its domains, if they were said.
    pub fn domains_of_files(&self) -> Option<impl ExactSizeIterator<Item = &[DomainRun]>> {
        self.domains_said.then(|| self.files.iter().map(|file| &*file.runs))
    }

    fn find_domains(&mut self) -> Result<()> {
        self.domains.clear();
        let runs = || self.files.iter().flat_map(|file| file.runs.iter());
        let mut tokens = vec![0u64; runs().map(|run| usize::from(run.domain) + 1).max().unwrap_or(1)];
        runs().for_each(|run| tokens[usize::from(run.domain)] += run.tokens);
        let (numbers, count) = numbers(&tokens);
        let mut owns = vec![(0, None); count];
        numbers.iter().zip(tokens).for_each(|(&number, tokens)| owns[usize::from(number)].0 += tokens);
        (self.numbers, self.owns) = (numbers, owns);
        if count == 1 {
            return Ok(());
        }
        self.domains.try_reserve(self.segments.len()).map_err(Error::memory("the domains of a datastore"))?;
        for (index, file) in self.files.iter().enumerate() {
            let parts = || self.parts.iter().filter(|part| part.file == index);
            let symbols = |part: &Part| match part.segment {
                Some(segment) => self.segments[segment].symbols(),
                None => part.documents,
            };
            let all = stretches(&file.runs, &self.numbers, parts().map(symbols))?;
            let searched = parts().zip(all).filter(|(part, _)| part.segment.is_some());
            self.domains.extend(searched.map(|(_, stretches)| stretches));
        }
        Ok(())
    }

    /// Of a file the documents that follow one another in a domain, with their symbols and the domain's number.
    pub(crate) fn numbered_runs(&self, file: usize) -> impl Iterator<Item = (u64, u64, u8)> {
        let number = |run: &DomainRun| self.numbers[usize::from(run.domain)];
        self.files[file].runs.iter().map(move |run| (run.documents, run.documents + run.tokens, number(run)))
    }

    /// Of the domain of each number its tokens, and room for what follows tokens there.
    pub(crate) fn owns_mut(&mut self) -> &mut [(u64, Option<Arc<Own>>)] {
        &mut self.owns
    }

    /// The segments of a file that is being written, to be read from while nothing else changes them.
    pub(crate) fn of_segments(
        bytes: Bytes,
        vocab_size: u32,
        table: &[SegmentEntry],
    ) -> std::io::Result<Self> {
        let (mut store, bytes) = (Self { vocab_size, ..Self::empty() }, Arc::new(bytes));
        let searched = table.iter().filter(|entry| entry.suffixes > 0);
        store.segments.try_reserve(table.len())?;
        store.segments.extend(searched.map(|entry| Segment::new(Arc::clone(&bytes), vocab_size, entry)));
        store.merged.reset(vocab_size)?;
        Ok(store)
    }

    /// All segments with tokens.
    pub(crate) fn all_segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The tables for ranking, if nothing of the text that they were learned from is dead.
    pub(crate) fn living_tables(&self) -> Option<&Arc<Tables>> {
        let dead = self.files.iter().any(|file| file.tombstones.is_some());
        self.tables.as_ref().filter(|_| !dead)
    }

    fn forget_merged(&mut self) -> Result<()> {
        if self.segments.len() > 1 {
            let memory = |_| Error::OutOfMemory("the successors of a datastore".into());
            self.merged.reset(self.vocab_size).map_err(memory)?;
        }
        Ok(())
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
        self.files.first().map_or(Load::Ram, |file| file.bytes.load())
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
        self.verify_blocks(progress, &|_, _| true)
    }

    /// The same for the documents and the tables for ranking alone.
    pub(crate) fn verify_text(&self, progress: &Progress) -> Result<()> {
        self.verify_blocks(progress, &|file, block| {
            let holds = |place: &Range<u64>| place.start < block.end && block.start < place.end;
            if self.files[file].tables.as_ref().is_some_and(|tables| holds(&tables.place())) {
                return true;
            }
            let parts = self.parts.iter().filter(|part| part.file == file);
            parts.filter_map(|part| part.segment).any(|segment| holds(&self.segments[segment].text_place()))
        })
    }

    fn verify_blocks(&self, progress: &Progress, wanted: &dyn Fn(usize, &Range<u64>) -> bool) -> Result<()> {
        for (index, OpenFile { info, bytes, .. }) in self.files.iter().enumerate() {
            let wanted = |block: &Range<u64>| wanted(index, block);
            let proceed = || progress.check().and_then(|()| bytes.check(&info.path));
            proceed()?;
            let read = |start, out: &mut [u8]| bytes.read(start, out);
            let damaged = format::damage(&info.path, info.file_bytes, &read, &wanted, &proceed);
            bytes.check(&info.path)?; // whatever was found
            let damaged = damaged?;
            if !damaged.is_empty() {
                return Err(Error::corrupt(&info.path, format!("bytes changed in {}", list(&damaged))));
            }
        }
        Ok(())
    }

    /// Occurrences of `tokens` within living documents; without tokens, the number of their tokens.
    ///
    /// # Errors
    /// [`Error::InvalidToken`], [`Error::Changed`], [`Error::OutOfMemory`].
    pub fn count(&self, tokens: &[Token]) -> Result<u64> {
        if tokens.is_empty() {
            let living =
                self.files.iter().enumerate().map(|(index, file)| file.info.tokens - self.dead(index).1);
            return Ok(living.sum());
        }
        self.check_tokens(tokens)?;
        self.check()?;
        let query = Query::new(tokens, self.vocab_size)?;
        Ok(self.intervals(&query).map(|found| length(&found)).sum())
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
        intervals.extend(self.intervals(&query));
        let total: u64 = intervals.iter().map(length).sum();
        positions
            .try_reserve_exact(usize::try_from(total).map_or(limit, |total| total.min(limit)))
            .map_err(memory())?;
        sample(&intervals, limit, |segment, rank, _| {
            let start = self.segments[segment].position(rank, Everything).unwrap_or(u64::MAX);
            positions.push(position(segment, start.saturating_add(tokens.len() as u64)));
        });
        Ok(positions)
    }

    /// The documents by segment, in the order of the files.
    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(crate) fn segment(&self, index: usize) -> &Segment {
        &self.segments[index]
    }

    /// Documents of all files, the empty ones included.
    pub fn documents(&self) -> u64 {
        self.files.iter().map(|file| file.info.documents).sum()
    }

    pub(crate) fn check_file(&self, index: usize) -> Result<&Path> {
        let OpenFile { info, bytes, .. } = &self.files[index];
        bytes.check(&info.path)?;
        Ok(&info.path)
    }

    /// Copies the tokens from a position on, at most to the end of the document, and returns how many. Waits for a disk,
    /// unlike [`Corpus::continuation`].
    pub fn read(&self, position: u64, out: &mut [Token]) -> usize {
        self.segment_at(position)
            .map_or(0, |segment| segment.continuation(position & u64::from(u32::MAX), out, Everything))
    }

    /// What can be looked up of a context: its last tokens, those of the vocabulary.
    fn usable<'a>(&self, context: &'a [Token], max_length: usize) -> &'a [Token] {
        let valid = context.iter().rev().take_while(|&&token| token < self.vocab_size);
        let usable = valid.take(max_length.min(MAX_MATCH)).count();
        &context[context.len() - usable..]
    }

    fn segment_at(&self, position: u64) -> Option<&Segment> {
        usize::try_from(position >> OFFSET_BITS).ok().and_then(|index| self.segments.get(index))
    }

    /// The occurrences in each segment.
    fn intervals(&self, query: &Query) -> impl Iterator<Item = Interval> {
        self.segments.iter().map(|segment| segment.interval(query, Everything).unwrap_or(0..0))
    }

    fn check_tokens(&self, tokens: &[Token]) -> Result<()> {
        match tokens.iter().find(|&&token| token >= self.vocab_size) {
            Some(&token) => Err(Error::InvalidToken { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }
}

impl Corpus for Datastore {
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
        let context = self.usable(context, max_length);
        if let Some(mut lookup) = Lookup::new(&self.segments, self.vocab_size, context) {
            lookup.matches(max_samples, out);
        }
    }

    fn domains(&self) -> usize {
        self.owns.len().max(1)
    }

    fn matches_by_domain(
        &self,
        context: &[Token],
        max_length: usize,
        max_samples: usize,
        weights: &[f32; DOMAINS],
        out: &mut Vec<Match>,
    ) {
        let context = self.usable(context, max_length);
        if let Some(lookup) = Lookup::new(&self.segments, self.vocab_size, context) {
            let mut lookup =
                if self.domains.is_empty() { lookup } else { lookup.by_domain(&self.domains, weights) };
            lookup.matches(max_samples, out);
        }
    }

    fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        let Some(segment) = self.segment_at(position) else { return 0 };
        let offset = position & u64::from(u32::MAX);
        match segment.residency() {
            None => segment.continuation(offset, out, Everything),
            Some(resident) => segment.continuation(offset, out, resident),
        }
    }

    fn successors(&self, token: Token, out: &mut Vec<(Token, f32)>) {
        if token >= self.vocab_size {
            return;
        }
        if let [segment] = self.segments.as_slice() {
            if out.try_reserve(MAX_SUCCESSORS).is_ok() && has_successors(segment, token) {
                out.extend(segment.successors(token));
            }
            return;
        }
        self.merged.get(token, out, |out| {
            let held = |segment: &Segment| bucket(segment, token).map_or(0, |bucket| length(&bucket));
            let whole = self.segments.iter().fold(true, |whole, segment| {
                whole & bucket(segment, token).is_some_and(|_| has_successors(segment, token))
            });
            let holders = || self.segments.iter().filter(|segment| held(segment) > 0);
            let (count, total) =
                holders().fold((0, 0), |(count, total), segment| (count + 1, total + held(segment)));
            let parts = holders().filter(|segment| whole || has_successors(segment, token));
            let parts = parts.map(|segment| (held(segment) as f32 / total as f32, segment.successors(token)));
            self.merged.merge(parts, count, out) && whole
        });
    }

    fn successors_by_domain(&self, token: Token, weights: &[f32; DOMAINS], out: &mut Vec<(Token, f32)>) {
        let best =
            (0..self.owns.len()).fold(0, |best, at| if weights[at] > weights[best] { at } else { best });
        if let Some((own, Some(lists))) = self.owns.get(best) {
            let counted = |(own, weight): (&(u64, _), &f32)| own.0 as f32 * weight;
            let (all, tokens) = self
                .owns
                .iter()
                .zip(weights)
                .fold((0.0, 0), |(all, tokens), held| (all + counted(held), tokens + held.0.0));
            let others = (all - *own as f32) / (tokens - own).max(1) as f32;
            if let Some(list) = lists.successors(token, others.max(0.0)) {
                if out.try_reserve(list.len()).is_ok() {
                    out.extend_from_slice(list);
                }
                return;
            }
        }
        self.successors(token, out);
    }

    fn tables(&self) -> Option<&dyn LogBilinear> {
        self.tables.as_deref().map(|tables| tables as &dyn LogBilinear)
    }

    fn is_readable(&self) -> bool {
        self.files.iter().all(|file| file.bytes.is_intact())
    }
}

/// Whether a file has this length and header.
fn is_file(path: &Path, length: u64, header: &[u8]) -> Result<bool> {
    let source = Source::open(path)?;
    let mut page = [0; format::PAGE as usize];
    if source.len() != length {
        return Ok(false);
    }
    source.read(0, &mut page).map_err(Error::read(path))?;
    Ok(page == header)
}

fn bucket(segment: &Segment, token: Token) -> Option<Interval> {
    match segment.residency() {
        None => segment.bucket(token, Everything),
        Some(resident) => segment.bucket(token, resident),
    }
}

fn has_successors(segment: &Segment, token: Token) -> bool {
    segment.residency().is_none_or(|resident| segment.has_successors(token, resident))
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
