//! A file that is checksummed while it is written and replaces its target in one durable step.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::TempPath;
use xxhash_rust::xxh3::xxh3_64;

use crate::format::{BLOCK, PAGE};

/// The temporary file beside the target; removed when dropped before [`Output::seal`].
pub struct Output {
    target: PathBuf,
    path: PathBuf,
    temporary: Own<TempPath>,
    file: Checksummed,
    position: u64,
}

impl Output {
    /// Starts a file with room for the header.
    pub fn create(target: &Path) -> io::Result<Self> {
        // a rename would put the file in the place of a pipe or a device as well
        let other = std::fs::metadata(target).is_ok_and(|metadata| !metadata.is_file());
        let Some(name) = target.file_name().filter(|_| !other) else {
            let kind =
                if target.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
            return Err(io::Error::new(kind, "not the name of a file"));
        };
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let made = tempfile::Builder::new().prefix(&prefix).suffix(".tmp").make_in(folder(target), create)?;
        let (mut file, temporary) = made.into_parts();
        file.seek(SeekFrom::Start(PAGE))?;
        let file = Checksummed::new(file)?;
        let (target, path) = (target.to_owned(), temporary.to_path_buf());
        Ok(Self { target, path, temporary: Own::new(temporary), file, position: PAGE })
    }

    pub fn temporary_path(&self) -> &Path {
        &self.path
    }

    /// Lets only the owner read the file: it holds what users have said.
    pub fn make_private(&self) -> io::Result<()> {
        #[cfg(unix)]
        std::fs::set_permissions(&self.path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(())
    }

    /// Bytes from the start of the file.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Fills up with zeros to where a section may start, and returns that position.
    pub fn align(&mut self) -> io::Result<u64> {
        let missing = self.position.next_multiple_of(PAGE) - self.position;
        self.write_all(&[0; PAGE as usize][..missing as usize])?;
        Ok(self.position)
    }

    /// What has been written, opened for reading.
    pub fn read_back(&mut self) -> io::Result<File> {
        self.file.flush()?;
        File::open(&self.path)
    }

    /// Writes the header and what follows the body, which `end` makes of the body's end and checksums, syncs, and renames.
    /// Returns the bytes of the file.
    pub fn seal(
        self,
        end: impl FnOnce(u64, &[u64]) -> io::Result<([u8; PAGE as usize], Vec<u8>)>,
    ) -> io::Result<u64> {
        let body_end = self.position;
        let Checksummed { mut file, checksums, .. } = self.file.finish()?;
        let (header, tail) = end(body_end, &checksums)?;
        file.write_all(&tail)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header)?;
        file.sync_all()?;
        drop(file);
        // by the C library, for tests of its failure; tempfile asks the kernel itself
        let temporary = self.temporary.take()?.keep()?;
        std::fs::rename(&temporary, &self.target).inspect_err(|_| drop(std::fs::remove_file(&temporary)))?;
        sync_folder(folder(&self.target))?;
        Ok(body_end + tail.len() as u64)
    }
}

/// What a forked child has a copy of, and must leave to its parent: not even to be dropped, which would remove the file.
struct Own<T> {
    value: Option<T>,
    process: u32,
}

impl<T> Own<T> {
    fn new(value: T) -> Self {
        Self { value: Some(value), process: std::process::id() }
    }

    /// The value, in the process that made it.
    fn take(mut self) -> io::Result<T> {
        check_process(self.process)?;
        self.value.take().ok_or_else(|| io::Error::other(FOREIGN))
    }
}

fn check_process(process: u32) -> io::Result<()> {
    if process == std::process::id() { Ok(()) } else { Err(io::Error::other(FOREIGN)) }
}

const FOREIGN: &str = "the file belongs to the process that began it, not to a fork of it";

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            std::mem::forget(self.value.take());
        }
    }
}

impl Write for Output {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.position += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Readable as the umask says.
fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

fn folder(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename durable. Windows has no such call, and orders renames by itself.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Writes in blocks, of each of which it takes a checksum.
struct Checksummed {
    file: File,
    /// The block that is being filled.
    block: Vec<u8>,
    /// How much of it is in the file already.
    flushed: usize,
    checksums: Vec<u64>,
    process: u32,
}

impl Checksummed {
    fn new(file: File) -> io::Result<Self> {
        let mut block = Vec::new();
        block.try_reserve_exact(BLOCK as usize)?;
        Ok(Self { file, block, flushed: 0, checksums: Vec::new(), process: std::process::id() })
    }

    fn close_block(&mut self) -> io::Result<()> {
        self.checksums.try_reserve(1)?;
        self.flush()?;
        self.checksums.push(xxh3_64(&self.block));
        self.block.clear();
        self.flushed = 0;
        Ok(())
    }

    fn finish(mut self) -> io::Result<Self> {
        if !self.block.is_empty() {
            self.close_block()?;
        }
        Ok(self)
    }
}

impl Write for Checksummed {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.block.len() == BLOCK as usize {
            self.close_block()?;
        }
        let fitting = bytes.len().min(BLOCK as usize - self.block.len());
        self.block.extend_from_slice(&bytes[..fitting]);
        Ok(fitting)
    }

    fn flush(&mut self) -> io::Result<()> {
        check_process(self.process)?;
        self.file.write_all(&self.block[self.flushed..])?;
        self.flushed = self.block.len();
        Ok(())
    }
}
