"""A log in a folder that replicas share, such as one on NFS. No locks: each writes files of its own."""

import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sssd.errors import InvalidArgumentError
from sssd.sharing.log import MAX_RECORD_BYTES

_MAGIC = bytes.fromhex("89 53 53 46")
_HEADER = struct.Struct("<4sII")  # magic, bytes of the record, their CRC-32
_READ = MAX_RECORD_BYTES + _HEADER.size
_NAME = re.compile(r"([0-9a-f]{16})-(\d{8})\.log")
_PATIENCE = 5.0
"""Seconds that a record may be on its way: NFS may show a file's length before its bytes."""
_IDLE = 3600.0
"""Seconds after which a file that grows no more may be deleted for want of room."""
_SYNC = 0.05
"""Seconds after which what was written is made visible to others."""
_TRIES = 64
"""Places in a damaged stretch that are tried for the next record."""


class FolderLog:
    """A log in a folder. Each writer appends to files of its own, which all others read; nobody locks
    anything.

    What is half written is not read; a writer that fails in the middle goes on in another file. Records that
    are damaged are passed over. Old files are deleted by whoever writes, so that a folder needs no care.

    On NFS, records are seen once the reader's client looks again, 3 to 60 s by default; mount with
    ``actimeo=1``. Files are their owner's alone (0600): replicas are to run as the same user.

    Args:
        folder: made if need be (0700).
        file_bytes: a file that has so many bytes is followed by the next.
        keep_bytes: bytes of all files together, beyond which the oldest go.
        keep_seconds: age at which files go.

    Attributes:
        damaged: how often damaged bytes were passed over.

    Raises:
        InvalidArgumentError: a limit is not positive.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        file_bytes: int = 4 << 20,
        keep_bytes: int = 256 << 20,
        keep_seconds: float = 86400.0,
    ) -> None:
        if min(file_bytes, keep_bytes, keep_seconds) <= 0:
            raise InvalidArgumentError("file_bytes, keep_bytes and keep_seconds must be positive")
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file_bytes, self._keep_bytes, self._keep_seconds = file_bytes, keep_bytes, keep_seconds
        self._writer, self._number = os.urandom(8).hex(), 0
        self._file: int | None = None
        self._written = 0
        self._synced, self._synced_at = True, 0.0
        self._tails: dict[str, _Tail] = {}
        self.damaged = 0

    def publish(self, record: bytes) -> None:
        """Appends a record; others see it at the latest after the next ``poll``."""
        if not 0 < len(record) <= MAX_RECORD_BYTES:
            raise InvalidArgumentError(f"a record has 1 to {MAX_RECORD_BYTES} bytes, not {len(record)}")
        frame = _HEADER.pack(_MAGIC, len(record), zlib.crc32(record)) + record
        file = self._file_to_append(len(frame))
        self._synced = False
        try:
            if os.write(file, frame) != len(frame):
                raise OSError(f"{self.folder}: a record was written in part")
        except OSError:
            # nothing may follow a torn record
            self._end_file()
            raise
        self._written += len(frame)
        if time.monotonic() - self._synced_at > _SYNC:
            self._sync()

    def poll(self) -> Iterator[bytes]:
        """Gives out what others have written, the oldest files first."""
        self._sync()
        files = self._list()
        self._tails = {file.name: self._tails.get(file.name) or _Tail() for file in files}
        for file in files:
            tail = self._tails[file.name]
            if file.writer != self._writer and not tail.has_all_of(file):
                before = tail.damaged
                try:
                    yield from tail.read(self.folder / file.name, file.grows)
                finally:
                    self.damaged += tail.damaged - before

    def close(self) -> None:
        """Closes the file. What is in the folder stays for others."""
        self._sync()
        self._end_file()

    def _file_to_append(self, more: int) -> int:
        if self._file is not None and (
            self._written + more > self._file_bytes or not os.fstat(self._file).st_nlink
        ):
            self._sync()
            self._end_file()
        if self._file is None:
            self._number += 1
            self._expire()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            self._file = os.open(self.folder / self._name(), flags, 0o600)
            self._written = 0
        return self._file

    def _name(self) -> str:
        return f"{self._writer}-{self._number:08d}.log"

    def _end_file(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        os.close(file)
        if not self._written:
            (self.folder / self._name()).unlink(missing_ok=True)

    def _sync(self) -> None:
        """Makes what was written visible to other hosts, which NFS may put off."""
        if self._file is not None and not self._synced:
            os.fsync(self._file)
        self._synced, self._synced_at = True, time.monotonic()

    def _list(self) -> list["_File"]:
        """The files of all writers, the oldest first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if name := _NAME.fullmatch(entry.name):
                    try:
                        seen = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISREG(seen.st_mode):
                        found.append(_File(entry.name, name[1], int(name[2]), seen.st_mtime, seen.st_size))
        newest: dict[str, int] = {}
        for file in found:
            newest[file.writer] = max(file.number, newest.get(file.writer, 0))
        for file in found:
            file.grows = file.number == newest[file.writer]
        return sorted(found, key=lambda file: (file.changed, file.name))

    def _expire(self) -> None:
        files, now = self._list(), time.time()
        held = sum(file.size for file in files)
        for file in files:
            age = now - file.changed
            too_much = held > self._keep_bytes and (not file.grows or age > _IDLE)
            if too_much or age > self._keep_seconds:
                # whoever else deletes it is welcome
                (self.folder / file.name).unlink(missing_ok=True)
                held -= file.size


@dataclass
class _File:
    """A file as it is listed."""

    name: str
    writer: str
    number: int
    changed: float
    size: int
    grows: bool = False
    """Whether it is its writer's newest."""


class _Tail:
    """How far a file was read."""

    def __init__(self) -> None:
        self._offset = 0
        self._stuck: float | None = None
        self.damaged = 0

    def has_all_of(self, file: _File) -> bool:
        """Whether nothing is left to read. Lengths of files that grow may be old ones."""
        return self._offset >= file.size and not file.grows

    def read(self, path: Path, grows: bool) -> Iterator[bytes]:
        """The next records that are whole."""
        flags = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
        try:
            file = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
        except FileNotFoundError:
            return
        try:
            while data := _read_at(file, self._offset):
                at = 0
                while (record := _whole(data, at)) is not None:
                    at += _HEADER.size + len(record)
                    self._offset += _HEADER.size + len(record)
                    self._stuck = None
                    yield record
                if not at and not self._pass_over(data, grows):
                    return
        finally:
            os.close(file)

    def _pass_over(self, data: bytes, grows: bool) -> bool:
        """Goes on behind what is no whole record, unless it may yet become one."""
        now = time.monotonic()
        self._stuck = self._stuck or now
        if grows and now - self._stuck < _PATIENCE:
            return False
        at = 0
        for _ in range(_TRIES):
            at = data.find(_MAGIC, at + 1)
            if at < 0 or _whole(data, at) is not None:
                break
        if at < 0 and grows and len(data) < _READ:
            return False
        self._offset += at if at > 0 else len(data)
        self.damaged += 1
        return True


def _read_at(file: int, offset: int) -> bytes:
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, _READ)


def _whole(data: bytes, at: int) -> bytes | None:
    """The record in the frame at a place, if it is whole."""
    if len(data) - at < _HEADER.size:
        return None
    magic, size, checksum = _HEADER.unpack_from(data, at)
    record = data[at + _HEADER.size : at + _HEADER.size + size] if size <= MAX_RECORD_BYTES else b""
    fits = magic == _MAGIC and 0 < size == len(record) and zlib.crc32(record) == checksum
    return record if fits else None
