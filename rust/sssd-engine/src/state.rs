//! What a drafter has learned, in a file: everything or nothing of it, checked before it is believed.
//!
//! Little-endian: magic, version, payload length, payload, and the XXH3-64 of all bytes before. The payload is in
//! `docs/serving.md`.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sssd_core::{FEEDBACK_WORDS, MAX_TOKEN, Token};
use xxhash_rust::xxh3::xxh3_64;

/// Name of the file in its folder.
pub const FILE: &str = "drafter.sssd-state";

const MAGIC: [u8; 8] = *b"\x89SST\r\n\x1a\n";
const VERSION: u32 = 1;
const HEADER: usize = 20;

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
}

/// What a drafter is and has learned.
#[derive(Debug, Default, PartialEq)]
pub struct State {
    /// Number of token ids, 0 if not known.
    pub vocab_size: u64,
    /// Tokens that end a sequence.
    pub end_tokens: Vec<Token>,
    /// Memory for the live store of each namespace.
    pub live_bytes: u64,
    /// Memory for the target's probabilities of each namespace.
    pub soft_bytes: u64,
    /// One entry each.
    pub namespaces: Vec<NamespaceState>,
}

/// What a namespace has learned.
#[derive(Debug, Default, PartialEq)]
pub struct NamespaceState {
    /// Its name.
    pub name: String,
    /// The predictor's weights.
    pub weights: Vec<u8>,
    /// Documents of the live store, oldest first, and how often each was of use.
    pub documents: Vec<(Vec<Token>, u32)>,
    /// Entries of the table of the target's probabilities, with their places.
    pub feedback: Vec<(u64, [u64; FEEDBACK_WORDS])>,
}

/// For its owner alone: it holds what users have said. As tempfile does it, but for errors that keep their number.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.read(true).write(true).create_new(true).open(path)
}

impl State {
    /// Writes the file in `folder`, which is made if need be. Whatever happens, the file is the old one or the new
    /// one; after success the new one survives a loss of power.
    pub fn save(&self, folder: &Path) -> Result<(), StateError> {
        let failed = |source| StateError::Io { path: folder.to_owned(), source };
        let write = || {
            std::fs::create_dir_all(folder)?;
            let temporary =
                tempfile::Builder::new().prefix(".drafter.").suffix(".tmp").make_in(folder, create);
            let mut file = temporary?;
            file.as_file_mut().write_all(&self.to_bytes())?;
            file.as_file().sync_all()?;
            file.persist(folder.join(FILE)).map_err(|failure| failure.error)?;
            // makes the rename durable; Windows has no such call
            if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
        };
        write().map_err(failed)
    }

    /// Reads the file in `folder`.
    pub fn load(folder: &Path) -> Result<Self, StateError> {
        let path = folder.join(FILE);
        let read = || {
            // a pipe or an endless device is none, and to open a pipe waits for a writer
            let kind = std::fs::metadata(&path)?;
            if kind.is_file() { std::fs::read(&path) } else { Err(io::ErrorKind::InvalidInput.into()) }
        };
        match read() {
            Ok(bytes) => Self::from_bytes(&bytes).map_err(|problem| match problem {
                Problem::Version(found) => StateError::Version { path, found },
                Problem::Corrupt(problem) => StateError::Corrupt { path, problem },
            }),
            Err(source) => Err(StateError::Io { path, source }),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Output(Vec::new());
        out.0.extend(MAGIC);
        out.0.extend(VERSION.to_le_bytes());
        out.number(0);
        out.number(self.vocab_size);
        out.tokens(&self.end_tokens);
        out.number(self.live_bytes);
        out.number(self.soft_bytes);
        out.number(self.namespaces.len() as u64);
        for namespace in &self.namespaces {
            out.bytes(namespace.name.as_bytes());
            out.bytes(&namespace.weights);
            out.number(namespace.documents.len() as u64);
            for (tokens, used) in &namespace.documents {
                out.number((*used).into());
                out.tokens(tokens);
            }
            out.number(namespace.feedback.len() as u64);
            for (place, words) in &namespace.feedback {
                out.number(*place);
                words.iter().for_each(|&word| out.number(word));
            }
        }
        let mut bytes = out.0;
        let length = (bytes.len() - HEADER) as u64;
        bytes[HEADER - 8..HEADER].copy_from_slice(&length.to_le_bytes());
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, Problem> {
        let mut input = Input(bytes);
        if input.take(MAGIC.len())? != MAGIC {
            return Err(Problem::Corrupt("not a saved drafter"));
        }
        let version = u32::from_le_bytes(input.array()?);
        if version != VERSION {
            return Err(Problem::Version(version));
        }
        let length = input.number()?;
        if (bytes.len() - HEADER).checked_sub(8).map(|held| held as u64) != Some(length) {
            return Err(Problem::Corrupt("the file is cut short or has grown"));
        }
        let (sealed, sum) = bytes.split_at(bytes.len() - 8);
        if xxh3_64(sealed).to_le_bytes() != *sum {
            return Err(Problem::Corrupt("the checksum does not fit"));
        }
        input.0 = &sealed[HEADER..];
        let mut state = Self { vocab_size: input.number()?, ..Self::default() };
        let limit = if state.vocab_size == 0 { u64::from(MAX_TOKEN) + 1 } else { state.vocab_size };
        state.end_tokens = input.tokens(limit)?;
        state.live_bytes = input.number()?;
        state.soft_bytes = input.number()?;
        for _ in 0..input.number()? {
            let name = String::from_utf8(input.bytes()?.to_vec());
            let name = name.map_err(|_| Problem::Corrupt("a namespace's name is not text"))?;
            let mut namespace =
                NamespaceState { name, weights: input.bytes()?.to_vec(), ..Default::default() };
            for _ in 0..input.number()? {
                let used = u32::try_from(input.number()?).unwrap_or(u32::MAX);
                namespace.documents.push((input.tokens(limit)?, used));
            }
            for _ in 0..input.number()? {
                let place = input.number()?;
                let mut words = [0; FEEDBACK_WORDS];
                for word in &mut words {
                    *word = input.number()?;
                }
                namespace.feedback.push((place, words));
            }
            state.namespaces.push(namespace);
        }
        if input.0.is_empty() { Ok(state) } else { Err(Problem::Corrupt("there is more than was announced")) }
    }
}

#[derive(Debug)]
enum Problem {
    Corrupt(&'static str),
    Version(u32),
}

struct Output(Vec<u8>);

impl Output {
    fn number(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn tokens(&mut self, tokens: &[Token]) {
        self.number(tokens.len() as u64);
        tokens.iter().for_each(|token| self.0.extend(token.to_le_bytes()));
    }
}

/// What is left to read. Nothing is allocated for more than is there.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Problem> {
        let (taken, rest) =
            self.0.split_at_checked(count).ok_or(Problem::Corrupt("the file is cut short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        self.take(N)?.try_into().map_err(|_| Problem::Corrupt("the file is cut short"))
    }

    fn number(&mut self) -> Result<u64, Problem> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bytes(&mut self) -> Result<&'a [u8], Problem> {
        let length = self.number()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn tokens(&mut self, limit: u64) -> Result<Vec<Token>, Problem> {
        let length = self.number()?.saturating_mul(4);
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        let tokens = bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
        let tokens: Vec<Token> = tokens.collect();
        if tokens.iter().any(|&token| u64::from(token) >= limit || token > MAX_TOKEN) {
            return Err(Problem::Corrupt("a token is outside the vocabulary"));
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> State {
        let namespace = NamespaceState {
            name: "ä".into(),
            weights: vec![1, 2, 3],
            documents: vec![(vec![5, 6, 7], 2), (vec![8], 0)],
            feedback: vec![(3, [9; FEEDBACK_WORDS])],
        };
        State {
            vocab_size: 10,
            end_tokens: vec![2],
            live_bytes: 1 << 20,
            soft_bytes: 0,
            namespaces: vec![NamespaceState::default(), namespace],
        }
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("new/folder");
        state().save(&inner).unwrap();
        state().save(&inner).unwrap();
        assert_eq!(State::load(&inner).unwrap(), state());
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 1);
        assert!(matches!(State::load(folder.path()), Err(StateError::Io { .. })));
    }

    #[test]
    fn another_layout_is_another_version() {
        // of bytes that some release has written; a change needs a new VERSION, and then a new sum
        assert_eq!((VERSION, xxh3_64(&state().to_bytes())), (1, 5_718_229_632_276_512_962));
    }

    #[test]
    fn the_old_file_is_replaced_and_never_written_to() {
        let folder = tempfile::tempdir().unwrap();
        State::default().save(folder.path()).unwrap();
        let (file, old) = (folder.path().join(FILE), folder.path().join("old"));
        let before = std::fs::read(&file).unwrap();
        std::fs::hard_link(&file, &old).unwrap();
        state().save(folder.path()).unwrap();
        assert_eq!(std::fs::read(&old).unwrap(), before);
        assert_ne!(std::fs::read(&file).unwrap(), before);
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_noticed() {
        let bytes = state().to_bytes();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x41;
            assert!(State::from_bytes(&damaged).is_err(), "byte {at}");
            assert!(State::from_bytes(&bytes[..at]).is_err(), "{at} bytes");
        }
        assert!(State::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
    }

    proptest! {
        /// Whoever forges the checksum gets an error or a state, and no panic.
        #[test]
        fn forged_states_do_no_harm(changes in prop::collection::vec((HEADER..200, any::<u8>()), 1..6)) {
            let mut bytes = state().to_bytes();
            let end = bytes.len() - 8;
            for (at, value) in changes {
                bytes[at % (end - HEADER) + HEADER] = value;
            }
            let sum = xxh3_64(&bytes[..end]).to_le_bytes();
            bytes[end..].copy_from_slice(&sum);
            let _ = State::from_bytes(&bytes);
        }
    }
}
