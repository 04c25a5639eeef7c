//! The bytes of a file: mapped, or in memory.

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::{Advice, Mmap, MmapMut};

use crate::{Error, Result};

/// How a file is brought into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Load {
    /// Map the file: pages are read when first touched and shared with other processes. Truncating the file
    /// while it is mapped kills the process (replacing it by a rename does not).
    #[default]
    Mmap,
    /// Read the whole file into private memory, on huge pages where the system has them.
    Ram,
}

/// Read-only bytes.
pub enum Bytes {
    Mapped(Mmap),
    Loaded(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub fn open(path: &Path, load: Load) -> Result<Self> {
        // before it is opened: that of a pipe waits for a writer
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(Error::corrupt(path, "not a datastore file"));
        }
        let mut file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(Error::corrupt(path, "not a datastore file"));
        }
        match load {
            Load::Mmap => {
                // SAFETY: the map is read-only and private to this value. That nobody changes the file in
                // place is the documented contract of a datastore; the builder only ever replaces files.
                let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
                Ok(Self::Mapped(map))
            }
            Load::Ram => {
                let length = usize::try_from(metadata.len())
                    .map_err(|_| Error::corrupt(path, "file larger than the address space"))?;
                let mut memory = MmapMut::map_anon(length).map_err(Error::io(path))?;
                #[cfg(target_os = "linux")]
                let _ = memory.advise(Advice::HugePage); // an optimisation; kernels without it refuse
                file.read_exact(&mut memory).map_err(Error::io(path))?;
                Ok(Self::Loaded(memory.make_read_only().map_err(Error::io(path))?))
            }
        }
    }

    /// Tells the system that this range will be read at scattered places.
    pub fn advise_random(&self, range: Range<usize>) {
        self.advise(Advice::Random, range);
    }

    /// Asks the system to read this range ahead.
    pub fn advise_soon(&self, range: Range<usize>) {
        self.advise(Advice::WillNeed, range);
    }

    #[cfg(unix)]
    fn advise(&self, advice: Advice, range: Range<usize>) {
        if let Self::Mapped(map) = self {
            let end = range.end.min(map.len());
            let _ = map.advise_range(advice, range.start.min(end), end - range.start.min(end)); // only a hint
        }
    }

    #[cfg(not(unix))]
    fn advise(&self, _: Advice, _: Range<usize>) {}
}

impl Deref for Bytes {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) | Self::Loaded(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// Brings the cache line of `byte` closer.
#[inline]
pub fn prefetch(byte: &u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing architecturally and cannot fault; the address is that of a live reference.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(byte).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = byte;
}
