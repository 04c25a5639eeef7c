//! A file that is checksummed while it is written and replaces its target in one durable step.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::TempPath;
use xxhash_rust::xxh3::Xxh3Default;

use crate::format::{BLOCK, Header, PAGE, SegmentEntry};

/// The temporary file beside the target; removed when dropped before [`Output::seal`].
pub struct Output {
    target: PathBuf,
    path: PathBuf,
    temporary: Own<TempPath>,
    file: Own<BufWriter<Checksummed>>,
    position: u64,
}

impl Output {
    /// Starts a file with room for the header.
    pub fn create(target: &Path) -> io::Result<Self> {
        let Some(name) = target.file_name().filter(|_| !target.is_dir()) else {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "not the name of a file"));
        };
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let made = tempfile::Builder::new().prefix(&prefix).suffix(".tmp").make_in(folder(target), create)?;
        let (mut file, temporary) = made.into_parts();
        file.seek(SeekFrom::Start(PAGE))?;
        let file = Own::new(BufWriter::with_capacity(BLOCK as usize, Checksummed::new(file)));
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
        self.file.get()?.flush()?;
        File::open(&self.path)
    }

    /// Writes the checksums, the segment table, the trailer and the header, syncs, and renames. Returns the
    /// bytes of the file.
    pub fn seal(self, header: Header, table: &[SegmentEntry]) -> io::Result<u64> {
        let body_end = self.position;
        let Checksummed { mut file, checksums, .. } = self.file.take()?.into_inner()?.finish();
        let (header, tail) = header.seal(body_end, &checksums, table);
        file.write_all(&tail)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header)?;
        file.sync_all()?;
        drop(file);
        self.temporary.take()?.persist(&self.target)?;
        sync_folder(folder(&self.target))?;
        Ok(body_end + tail.len() as u64)
    }
}

/// What a forked child has a copy of, and must leave to its parent: not even to be dropped, which would remove the file
/// or write what is buffered a second time.
struct Own<T> {
    value: Option<T>,
    process: u32,
}

impl<T> Own<T> {
    fn new(value: T) -> Self {
        Self { value: Some(value), process: std::process::id() }
    }

    /// The value, in the process that made it.
    fn get(&mut self) -> io::Result<&mut T> {
        let own = self.process == std::process::id();
        self.value.as_mut().filter(|_| own).ok_or_else(|| io::Error::other(FOREIGN))
    }

    fn take(mut self) -> io::Result<T> {
        self.get()?;
        self.value.take().ok_or_else(|| io::Error::other(FOREIGN))
    }
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
        let written = self.file.get()?.write(bytes)?;
        self.position += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.get()?.flush()
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

/// Takes a checksum of every block.
struct Checksummed {
    file: File,
    block: Xxh3Default,
    room: u64,
    checksums: Vec<u64>,
}

impl Checksummed {
    fn new(file: File) -> Self {
        Self { file, block: Xxh3Default::new(), room: BLOCK, checksums: Vec::new() }
    }

    fn close_block(&mut self) {
        self.checksums.push(self.block.digest());
        self.block.reset();
        self.room = BLOCK;
    }

    fn finish(mut self) -> Self {
        if self.room < BLOCK {
            self.close_block();
        }
        self
    }
}

impl Write for Checksummed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fitting = bytes.len().min(self.room as usize);
        let written = self.file.write(&bytes[..fitting])?;
        self.block.update(&bytes[..written]);
        self.room -= written as u64;
        if self.room == 0 {
            self.close_block();
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
