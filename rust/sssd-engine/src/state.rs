//! What a drafter has learned, in a file: everything or nothing of it, checked before it is believed.
//!
//! Little-endian: magic, version, eight bytes of 0, what the drafter is, records, and the XXH3-64 of all bytes before. The
//! records are in `docs/serving.md`. They are written and read one by one: neither takes memory of the size of the file.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sssd_core::{FEEDBACK_WORDS, MAX_TOKEN, MemoryFull, Token};
use tempfile::TempPath;
use xxhash_rust::xxh3::Xxh3;

/// Name of the file in its folder.
pub const FILE: &str = "drafter.sssd-state";

const MAGIC: [u8; 8] = *b"\x89SST\r\n\x1a\n";
const VERSION: u32 = 3;
/// Bytes that are read or written at once.
const BUFFER: usize = 1 << 13;

// Kinds of records.
const END: u8 = 0;
const NAMESPACE: u8 = 1;
const DOCUMENT: u8 = 2;
const FEEDBACK: u8 = 3;

/// Why a state cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is none, or is damaged.
    #[error("{}: {problem}; remove it to start anew", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        problem: &'static str,
    },
    /// The file was written by another release.
    #[error("{}: state version {found}, but this release reads version {VERSION}; remove it to start anew", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The weights in it are those of another release.
    #[error("{}: the weights are not those of this release; remove it to start anew", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
    },
    /// There is no memory for what is in it.
    #[error(transparent)]
    Memory(#[from] MemoryFull),
    /// Somebody has asked for it.
    #[error("the call was interrupted")]
    Interrupted,
}

/// What a drafter is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Identity {
    /// Number of token ids, 0 if not known.
    pub vocab_size: u64,
    /// Tokens that end a sequence.
    pub end_tokens: Vec<Token>,
    /// Memory for the live store of each namespace.
    pub live_bytes: u64,
    /// Memory for the target's probabilities of each namespace.
    pub soft_bytes: u64,
}

/// Part of what a drafter has learned.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// What follows, to the next one, is of a namespace of this name, with these weights.
    Namespace {
        /// Its name.
        name: String,
        /// The predictor's weights.
        weights: Vec<u8>,
        /// How many entries its table has, or somewhat more.
        entries: u64,
    },
    /// A document of its live store, the oldest first.
    Document {
        /// The text.
        tokens: Vec<Token>,
        /// How often it was of use.
        used: u32,
    },
    /// An entry of its table of the target's probabilities.
    Feedback([u64; FEEDBACK_WORDS]),
}

/// For its owner alone: it holds what users have said. As tempfile does it, but for errors that keep their number.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.read(true).write(true).create_new(true).open(path)
}

/// Writes the file in a folder, which is made if need be. Until it is finished there is the old file, or none.
pub struct StateWriter {
    folder: PathBuf,
    path: TempPath,
    out: BufWriter<File>,
    hash: Box<Xxh3>,
}

impl StateWriter {
    /// Begins a file in `folder`.
    pub fn create(folder: &Path, identity: &Identity) -> Result<Self, StateError> {
        let failed = |source| StateError::Io { path: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(failed)?;
        let temporary = tempfile::Builder::new().prefix(".drafter.").suffix(".tmp").make_in(folder, create);
        // apart: tempfile's own writes wrap errors, which then have no number
        let (file, path) = temporary.map_err(failed)?.into_parts();
        let out = BufWriter::with_capacity(BUFFER, file);
        let mut writer = Self { folder: folder.to_owned(), path, out, hash: Box::default() };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.number(0)?;
        writer.number(identity.vocab_size)?;
        writer.tokens(&identity.end_tokens)?;
        writer.number(identity.live_bytes)?;
        writer.number(identity.soft_bytes)?;
        Ok(writer)
    }

    /// Begins a namespace.
    pub fn namespace(&mut self, name: &str, weights: &[u8], entries: u64) -> Result<(), StateError> {
        self.put(&[NAMESPACE])?;
        self.number(name.len() as u64)?;
        self.put(name.as_bytes())?;
        self.number(weights.len() as u64)?;
        self.put(weights)?;
        self.number(entries)
    }

    /// Adds a document of the namespace.
    pub fn document(&mut self, tokens: &[Token], used: u32) -> Result<(), StateError> {
        self.put(&[DOCUMENT])?;
        self.put(&used.to_le_bytes())?;
        self.tokens(tokens)
    }

    /// Adds an entry of the namespace's table.
    pub fn feedback(&mut self, words: &[u64; FEEDBACK_WORDS]) -> Result<(), StateError> {
        self.put(&[FEEDBACK])?;
        words.iter().try_for_each(|&word| self.number(word))
    }

    /// Puts the file in the place of the old one. From then on it survives a loss of power.
    pub fn finish(mut self) -> Result<(), StateError> {
        self.put(&[END])?;
        let sum = self.hash.digest();
        self.put(&sum.to_le_bytes())?;
        let Self { folder, path, out, .. } = self;
        let finish = || {
            let file = out.into_inner().map_err(|failure| failure.into_error())?;
            file.sync_all()?;
            path.persist(folder.join(FILE)).map_err(|failure| failure.error)?;
            // makes the rename durable; Windows has no such call
            if cfg!(unix) { File::open(&folder)?.sync_all() } else { Ok(()) }
        };
        finish().map_err(|source| StateError::Io { path: folder.clone(), source })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.hash.update(bytes);
        self.out.write_all(bytes).map_err(|source| StateError::Io { path: self.folder.clone(), source })
    }

    fn number(&mut self, value: u64) -> Result<(), StateError> {
        self.put(&value.to_le_bytes())
    }

    fn tokens(&mut self, tokens: &[Token]) -> Result<(), StateError> {
        self.number(tokens.len() as u64)?;
        tokens.iter().try_for_each(|token| self.put(&token.to_le_bytes()))
    }
}

/// Reads a file that is sound.
#[derive(Debug)]
pub struct StateReader {
    path: PathBuf,
    input: BufReader<File>,
    /// Bytes that are left, the checksum not counted once it has been compared.
    left: u64,
    identity: Identity,
    /// Whether a namespace has begun.
    begun: bool,
}

impl StateReader {
    /// Checks the file in `folder` and reads what the drafter is. `interrupted` is asked now and then whether to give up.
    pub fn open(folder: &Path, interrupted: &dyn Fn() -> bool) -> Result<Self, StateError> {
        let path = folder.join(FILE);
        let open = || {
            // a pipe or an endless device is none, and to open a pipe waits for a writer
            let kind = std::fs::metadata(&path)?;
            if kind.is_file() { File::open(&path) } else { Err(io::ErrorKind::InvalidInput.into()) }
        };
        let file = open().map_err(|source| StateError::Io { path: path.clone(), source })?;
        let input = BufReader::with_capacity(BUFFER, file);
        let mut reader = Self { path, input, left: u64::MAX, identity: Identity::default(), begun: false };
        if reader.array()? != MAGIC {
            return Err(reader.corrupt("not a saved drafter"));
        }
        let found = u32::from_le_bytes(reader.array()?);
        if found != VERSION {
            return Err(StateError::Version { path: reader.path, found });
        }
        reader.check(interrupted)?;
        if reader.number()? != 0 {
            return Err(reader.corrupt("what is to be 0 is not"));
        }
        let vocab_size = reader.number()?;
        reader.identity.vocab_size = vocab_size;
        let end_tokens = reader.tokens()?;
        let (live_bytes, soft_bytes) = (reader.number()?, reader.number()?);
        reader.identity = Identity { vocab_size, end_tokens, live_bytes, soft_bytes };
        Ok(reader)
    }

    /// What the drafter is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next record, until there are no more.
    pub fn next_record(&mut self) -> Result<Option<Record>, StateError> {
        let [kind] = self.array()?;
        let record = match kind {
            END if self.left == 0 => return Ok(None),
            END => return Err(self.corrupt("there is more after its end")),
            NAMESPACE => {
                let name = String::from_utf8(self.bytes()?);
                let name = name.map_err(|_| self.corrupt("a namespace's name is not text"))?;
                self.begun = true;
                let weights = self.bytes()?;
                // whatever is claimed, no more than there can be
                let entries = self.number()?.min(self.left / (1 + 8 * FEEDBACK_WORDS as u64));
                Record::Namespace { name, weights, entries }
            }
            DOCUMENT if self.begun => {
                let used = u32::from_le_bytes(self.array()?);
                Record::Document { used, tokens: self.tokens()? }
            }
            FEEDBACK if self.begun => {
                let mut words = [0; FEEDBACK_WORDS];
                for word in &mut words {
                    *word = self.number()?;
                }
                Record::Feedback(words)
            }
            _ => return Err(self.corrupt("a record is of no known kind, or of no namespace")),
        };
        Ok(Some(record))
    }

    /// Compares the checksum with all bytes before it, and goes back to where it was.
    fn check(&mut self, interrupted: &dyn Fn() -> bool) -> Result<(), StateError> {
        let start = self.input.stream_position().map_err(|source| self.failed(source))?;
        let length = self.input.seek(SeekFrom::End(0)).map_err(|source| self.failed(source))?;
        let Some(sealed) = length.checked_sub(8).filter(|&sealed| sealed >= start) else {
            return Err(self.corrupt("the file is cut short"));
        };
        self.input.rewind().map_err(|source| self.failed(source))?;
        self.left = length;
        let (mut hash, mut buffer) = (Xxh3::new(), vec![0; BUFFER]);
        while self.left > 8 {
            let part = &mut buffer[..(self.left - 8).min(BUFFER as u64) as usize];
            self.take(part)?;
            hash.update(part);
            if interrupted() {
                return Err(StateError::Interrupted);
            }
        }
        if self.array()? != hash.digest().to_le_bytes() {
            return Err(self.corrupt("the checksum does not fit"));
        }
        self.input.seek(SeekFrom::Start(start)).map_err(|source| self.failed(source))?;
        self.left = sealed - start;
        Ok(())
    }

    fn corrupt(&self, problem: &'static str) -> StateError {
        StateError::Corrupt { path: self.path.clone(), problem }
    }

    fn failed(&self, source: io::Error) -> StateError {
        StateError::Io { path: self.path.clone(), source }
    }

    fn take(&mut self, out: &mut [u8]) -> Result<(), StateError> {
        let Some(left) = self.left.checked_sub(out.len() as u64) else {
            return Err(self.corrupt("the file is cut short"));
        };
        self.left = left;
        self.input.read_exact(out).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.corrupt("the file is cut short"),
            _ => self.failed(source),
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let mut out = [0; N];
        self.take(&mut out)?;
        Ok(out)
    }

    fn number(&mut self) -> Result<u64, StateError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Bytes after their number.
    fn bytes(&mut self) -> Result<Vec<u8>, StateError> {
        let length = self.number()?;
        self.sized(length)
    }

    /// So many bytes. No memory is taken for more than the file has left.
    fn sized(&mut self, length: u64) -> Result<Vec<u8>, StateError> {
        if length > self.left {
            return Err(self.corrupt("the file is cut short"));
        }
        let (wanted, mut out) = (length as usize, Vec::new());
        out.try_reserve_exact(wanted).map_err(|_| MemoryFull::System { wanted })?;
        out.resize(wanted, 0);
        self.take(&mut out)?;
        Ok(out)
    }

    fn tokens(&mut self) -> Result<Vec<Token>, StateError> {
        let length = self.number()?;
        let bytes = self.sized(length.saturating_mul(4))?;
        let (mut tokens, wanted) = (Vec::new(), bytes.len());
        tokens.try_reserve_exact(wanted / 4).map_err(|_| MemoryFull::System { wanted })?;
        tokens.extend(bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)));
        let most = u64::from(MAX_TOKEN) + 1;
        let limit = if self.identity.vocab_size == 0 { most } else { self.identity.vocab_size.min(most) };
        if tokens.iter().any(|&token| u64::from(token) >= limit) {
            return Err(self.corrupt("a token is outside the vocabulary"));
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    /// Bytes before what the drafter is.
    const HEADER: usize = 20;

    fn identity() -> Identity {
        Identity { vocab_size: 10, end_tokens: vec![2], live_bytes: 1 << 20, soft_bytes: 3 }
    }

    fn records() -> Vec<Record> {
        let namespace =
            |name: &str, entries| Record::Namespace { name: name.into(), weights: vec![1, 2, 3], entries };
        vec![
            namespace("", 0),
            namespace("ä", 1),
            Record::Document { tokens: vec![5, 6, 7], used: 2 },
            Record::Document { tokens: vec![8], used: 0 },
            Record::Feedback([9; FEEDBACK_WORDS]),
        ]
    }

    fn save(folder: &Path, records: &[Record]) {
        let mut writer = StateWriter::create(folder, &identity()).unwrap();
        for record in records {
            match record {
                Record::Namespace { name, weights, entries } => writer.namespace(name, weights, *entries),
                Record::Document { tokens, used } => writer.document(tokens, *used),
                Record::Feedback(words) => writer.feedback(words),
            }
            .unwrap();
        }
        writer.finish().unwrap();
    }

    fn load(folder: &Path) -> Result<(Identity, Vec<Record>), StateError> {
        let mut reader = StateReader::open(folder, &|| false)?;
        let mut records = Vec::new();
        while let Some(record) = reader.next_record()? {
            records.push(record);
        }
        Ok((reader.identity().clone(), records))
    }

    fn bytes() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &records());
        std::fs::read(folder.path().join(FILE)).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(Identity, Vec<Record>), StateError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), bytes).unwrap();
        load(folder.path())
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("new/folder");
        save(&inner, &[]);
        save(&inner, &records());
        assert_eq!(load(&inner).unwrap(), (identity(), records()));
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 1);
        assert!(matches!(load(folder.path()), Err(StateError::Io { .. })));
        let interrupted = StateReader::open(&inner, &|| true);
        assert!(matches!(interrupted, Err(StateError::Interrupted)));
    }

    #[test]
    fn another_layout_is_another_version() {
        // of bytes that some release has written; a change needs a new VERSION, and then a new sum
        assert_eq!((VERSION, xxh3_64(&bytes())), (3, 16_816_488_668_219_683_236));
    }

    #[test]
    fn the_old_file_is_replaced_and_never_written_to() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &[]);
        let (file, old) = (folder.path().join(FILE), folder.path().join("old"));
        let before = std::fs::read(&file).unwrap();
        std::fs::hard_link(&file, &old).unwrap();
        save(folder.path(), &records());
        assert_eq!(std::fs::read(&old).unwrap(), before);
        assert_ne!(std::fs::read(&file).unwrap(), before);
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        drop(StateWriter::create(folder.path(), &identity()).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_noticed() {
        let bytes = bytes();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x41;
            assert!(read(&damaged).is_err(), "byte {at}");
            assert!(read(&bytes[..at]).is_err(), "{at} bytes");
        }
        assert!(read(&[&bytes[..], &[0]].concat()).is_err());
    }

    proptest! {
        /// Whoever forges the checksum gets an error or a state, and no panic.
        #[test]
        fn forged_states_do_no_harm(changes in prop::collection::vec((HEADER..300, any::<u8>()), 1..6)) {
            let mut bytes = bytes();
            let end = bytes.len() - 8;
            for (at, value) in changes {
                bytes[at % (end - HEADER) + HEADER] = value;
            }
            let sum = xxh3_64(&bytes[..end]).to_le_bytes();
            bytes[end..].copy_from_slice(&sum);
            let _ = read(&bytes);
        }
    }
}
