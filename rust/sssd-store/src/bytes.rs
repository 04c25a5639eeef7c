//! The bytes of a file: mapped, or in memory.
//!
//! A page of a mapped file that was shortened meanwhile ends the process when it is touched. So everything that is read
//! once (opening, `verify`) is read through the descriptor, and look-ups ask [`Bytes::check`] first.

use std::fs::{File, Metadata};
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

#[cfg(unix)]
use memmap2::Advice;
use memmap2::{Mmap, MmapMut};
use xxhash_rust::xxh3::xxh3_64;

use crate::format::PAGE;
use crate::progress::Progress;
use crate::residency::Residency;
use crate::{Error, Result};

/// How a file is brought into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Load {
    /// Map the file: pages are read when first touched and shared with other processes. The file must not be changed
    /// in place meanwhile, only replaced by a rename; a store whose file was is noticed and no longer read.
    /// [`sssd_core::Corpus`] leaves out what is not in memory, and has it read in the background.
    #[default]
    Mmap,
    /// The same, but everything waits for what is not in memory: answers depend on the contents alone.
    MmapWait,
    /// Read the whole file into private memory, on huge pages where the system has them.
    Ram,
}

/// An open file whose header has yet to be looked at.
pub struct Source {
    file: File,
    length: u64,
}

impl Source {
    pub fn open(path: &Path) -> Result<Self> {
        // before it is opened: that of a pipe waits for a writer, and that of a device may do something
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(Error::corrupt(path, "not a datastore file"));
        }
        let mut options = File::options();
        options.read(true);
        // should it have become a pipe since
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
        let file = options.open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(Error::corrupt(path, "not a datastore file"));
        }
        Ok(Self { file, length: metadata.len() })
    }

    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn read(&self, start: u64, out: &mut [u8]) -> io::Result<()> {
        read_at(&self.file, start, out)
    }

    /// Maps or reads the file.
    pub fn load(self, path: &Path, load: Load, progress: &Progress) -> Result<Bytes> {
        let length = usize::try_from(self.length)
            .map_err(|_| Error::corrupt(path, "file larger than the address space"))?;
        match load {
            Load::Mmap | Load::MmapWait => {
                Ok(Bytes::Mapped(Mapped::new(self, load).map_err(Error::io(path))?))
            }
            Load::Ram => {
                let mut memory = MmapMut::map_anon(length).map_err(Error::io(path))?;
                #[cfg(target_os = "linux")]
                let _ = memory.advise(Advice::HugePage); // an optimisation; kernels without it refuse
                for (index, piece) in memory.chunks_mut(PIECE).enumerate() {
                    self.read((index * PIECE) as u64, piece).map_err(Error::read(path))?;
                    progress.check()?;
                }
                Ok(Bytes::Loaded(memory.make_read_only().map_err(Error::io(path))?))
            }
        }
    }
}

/// Read between two looks at whether it is still wanted.
const PIECE: usize = 4 << 20;

fn read_at(file: &File, start: u64, out: &mut [u8]) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, out, start);
    #[cfg(not(unix))]
    {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(out)
    }
}

/// A mapped file, and what tells whether it has been changed in place.
pub struct Mapped {
    map: Arc<Mmap>,
    load: Load,
    /// What of it is in memory, if drafts are not to wait for the rest.
    residency: Option<Residency>,
    source: Source,
    /// Hash of the header, which differs for other contents.
    header: u64,
    /// When the header was last seen to be the same.
    modified: Mutex<SystemTime>,
    changed: AtomicBool,
}

impl Mapped {
    fn new(source: Source, load: Load) -> io::Result<Self> {
        // SAFETY: the map is read-only and private to this value. That nobody changes the file in place is the
        // documented contract of a datastore; the builder only ever replaces files.
        let map = Arc::new(unsafe { Mmap::map(&source.file) }?);
        let modified = Mutex::new(source.file.metadata()?.modified()?);
        let header = header_hash(&source)?;
        let changed = AtomicBool::new(false);
        Ok(Self { map, load, residency: None, source, header, modified, changed })
    }

    /// What has happened to the file, if anything. A file that was once found changed stays so.
    fn change(&self) -> Option<&'static str> {
        if self.changed.load(Ordering::Relaxed) {
            return Some(CHANGED);
        }
        let problem = match self.source.file.metadata() {
            Ok(now) if now.len() < self.source.length => CHANGED,
            Ok(now) if self.is_same(&now) => return None,
            Ok(_) => CHANGED,
            Err(_) => return Some("the system does not tell what became of the file"),
        };
        self.changed.store(true, Ordering::Relaxed);
        Some(problem)
    }

    /// Whether the contents are those that were opened, which `touch` does not change.
    fn is_same(&self, now: &Metadata) -> bool {
        let mut modified = self.modified.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(time) = now.modified() else { return true };
        let same = *modified == time || header_hash(&self.source).is_ok_and(|hash| hash == self.header);
        if same {
            *modified = time;
        }
        same
    }
}

const CHANGED: &str = "the file was shortened or overwritten in place";

fn header_hash(source: &Source) -> io::Result<u64> {
    let mut page = [0; PAGE as usize];
    source.read(0, &mut page)?;
    Ok(xxh3_64(&page))
}

/// Read-only bytes.
pub enum Bytes {
    Mapped(Mapped),
    Loaded(Mmap),
    Owned(Vec<u8>),
    /// Of which some counts as being in memory.
    #[cfg(test)]
    Part(Vec<u8>, Residency),
}

impl Bytes {
    /// Whether they can be read now, as they were when the file was opened. Of a mapped file this takes a system call.
    pub fn check(&self, path: &Path) -> Result<()> {
        match self.change() {
            None => Ok(()),
            Some(problem) => Err(Error::Changed { path: path.to_owned(), problem }),
        }
    }

    /// The same.
    pub fn is_intact(&self) -> bool {
        self.change().is_none()
    }

    fn change(&self) -> Option<&'static str> {
        if let Self::Mapped(mapped) = self { mapped.change() } else { None }
    }

    /// How they were brought into memory.
    pub fn load(&self) -> Load {
        if let Self::Mapped(mapped) = self { mapped.load } else { Load::Ram }
    }

    /// If drafts are not to wait for a disk, begins to keep account of what is in memory. `preferred` is needed by all.
    pub fn keep_account(&mut self, preferred: Vec<Range<usize>>) -> io::Result<()> {
        if let Self::Mapped(mapped @ Mapped { load: Load::Mmap, .. }) = self {
            mapped.residency = Some(Residency::new(Arc::clone(&mapped.map), preferred)?);
        }
        Ok(())
    }

    /// What of a file is in memory, if drafts leave out the rest.
    pub fn residency(&self) -> Option<&Residency> {
        match self {
            Self::Mapped(mapped) => mapped.residency.as_ref(),
            #[cfg(test)]
            Self::Part(_, residency) => Some(residency),
            _ => None,
        }
    }

    /// Copies bytes, of a file without touching its pages.
    pub fn read(&self, start: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Mapped(mapped) => mapped.source.read(start, out),
            Self::Loaded(bytes) => copy(bytes, start, out),
            Self::Owned(bytes) => copy(bytes, start, out),
            #[cfg(test)]
            Self::Part(bytes, _) => copy(bytes, start, out),
        }
    }

    /// Tells the system that this range will be read at scattered places.
    #[cfg(unix)]
    pub fn advise_random(&self, range: Range<usize>) {
        if let Self::Mapped(Mapped { map, .. }) = self {
            let end = range.end.min(map.len());
            let _ = map.advise_range(Advice::Random, range.start.min(end), end - range.start.min(end)); // only a hint
        }
    }

    #[cfg(not(unix))]
    pub fn advise_random(&self, _: Range<usize>) {}
}

fn copy(bytes: &[u8], start: u64, out: &mut [u8]) -> io::Result<()> {
    let found = usize::try_from(start).ok().and_then(|start| bytes.get(start..)?.get(..out.len()));
    out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
    Ok(())
}

impl Deref for Bytes {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(mapped) => &mapped.map,
            Self::Loaded(map) => map,
            Self::Owned(bytes) => bytes,
            #[cfg(test)]
            Self::Part(bytes, _) => bytes,
        }
    }
}
