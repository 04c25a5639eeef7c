"""The folder of a corpus: who may write, how files come and go. Its manifest names whole files only."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd.corpus.documents import Table
from sssd.corpus.manifest import NAME, Manifest, Segment, is_own, load_manifest
from sssd.errors import CorruptCorpusError, LockedError
from sssd.locking import wait_for_lock
from sssd.reading.options import shown

LOCK = ".lock"
WORK = ".work"
"""Folder of what is being written."""

SHARDS = "shards"
"""Folder of the corpora that jobs of an array write."""


class Folder:
    """A corpus that this process may write to, as long as :func:`writing` lasts.

    Attributes:
        path: the folder.
        work: a folder in it for files that are not whole yet.
        manifest: as it is on disk; None in a new corpus.
    """

    def __init__(self, path: Path, grace: float) -> None:
        self.path, self.work, self._grace = path, path / WORK, grace
        self.manifest = load_manifest(path) if (path / NAME).exists() else None

    def clean(self) -> None:
        """Deletes what killed writers have left, and what has been retired for long enough."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(exist_ok=True)
        if self.manifest is None:
            return
        now = time.time()
        needed = self.manifest.files | {
            # a clock that was set back keeps nothing for ever
            name
            for name, since in self.manifest.retired.items()
            if 0 <= now - since < self._grace
        }
        for name in os.listdir(self.path):
            if is_own(name) and name not in needed:
                (self.path / name).unlink(missing_ok=True)

    def commit(self, manifest: Manifest) -> Manifest:
        """Puts a manifest in the place of the current one, and returns it. Its files are in the folder."""
        kept = {name: since for name, since in manifest.retired.items() if (self.path / name).exists()}
        manifest = Manifest(**{**vars(manifest), "retired": kept})
        sync(self.path)  # the files' names, before the manifest tells them
        replace_file(self.work / NAME, self.path / NAME, manifest.to_bytes())
        self.manifest = manifest
        return manifest

    def place(self, work: Path, name: str) -> None:
        """Moves a finished file into the folder."""
        os.replace(work, self.path / name)

    def save_array(self, array: NDArray[np.generic], suffix: str) -> str:
        """Writes an array to a file that is named after its contents; returns the name."""
        work = self.work / f"array{suffix}"
        with work.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        return self.place_by_contents(work, suffix)

    def place_by_contents(self, work: Path, suffix: str) -> str:
        """Moves a finished file into the folder, named after its contents; returns the name."""
        name = file_digest(work) + suffix
        self.place(work, name)
        return name


@contextmanager
def writing(path: Path, *, timeout: float, grace: float, create: bool = False) -> Iterator[Folder]:
    """Keeps other writers out. The system takes the lock back from a process that dies.

    Args:
        path: the folder.
        timeout: seconds to wait for another writer.
        grace: seconds that files stay after the manifest has ceased to name them, for readers that are
            about to open them.
        create: make the folder if it is not there.

    Raises:
        LockedError: another process writes.
        CorpusError: the folder is no corpus.
        OSError: the folder cannot be written.
    """
    if create:
        path.mkdir(parents=True, exist_ok=True)
    else:
        load_manifest(path)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not wait_for_lock(lock, timeout):
            raise LockedError(
                f"another process is writing to {shown(path)}; wait for it (--wait SECONDS, timeout=)"
            )
        folder = Folder(path, grace)
        folder.clean()
        yield folder
        with suppress(OSError):  # all is done, and the next writer cleans as well
            folder.clean()
    finally:
        os.close(lock)


def replace_file(work: Path, target: Path, data: bytes) -> None:
    """Writes a file whole, or leaves the one that is there."""
    with work.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, target)
    sync(target.parent)


def sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """BLAKE2b of a file, 128 bits in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_table(folder: Path, segment: Segment) -> Table:
    """The row of each document of a segment.

    Raises:
        CorruptCorpusError: the file is damaged.
    """
    return _load_array(folder / segment.table, (segment.documents, 3), np.dtype("<u8"))


def load_dead(folder: Path, segment: Segment) -> NDArray[np.bool_]:
    """Which documents of a segment are deleted, bool [documents].

    Raises:
        CorruptCorpusError: the file is damaged.
    """
    if segment.dead is None:
        return np.zeros(segment.documents, np.bool_)
    packed = _load_array(folder / segment.dead.flags, (-(-segment.documents // 8),), np.dtype("u1"))
    return np.unpackbits(packed, count=segment.documents).astype(np.bool_)


def _load_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        if file_digest(path) != path.name.partition(".")[0]:
            raise ValueError("its contents have changed")
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{array.dtype}{list(array.shape)} instead of {dtype}{list(shape)}")
    except (ValueError, EOFError, SyntaxError) as error:
        raise CorruptCorpusError(f"{shown(path)} is damaged ({error}); put back a copy") from None
    return array


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where there can be none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
