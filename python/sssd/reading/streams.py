"""The bytes of an input: decompressed, in UTF-8, and cut into lines, always a piece at a time."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from sssd.errors import CorpusError, InvalidArgumentError
from sssd.reading.options import MAX_RECORD_BYTES, Bad

COMPRESSIONS = {
    ".gz": "gzip",
    ".bgz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",
    ".zst": "zstd",
    ".zstd": "zstd",
}
"""Endings of names of compressed files."""

_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([byte]) + b"\x2a\x4d\x18": "zstd" for byte in range(0x50, 0x60)},  # skippable frames come first
}
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHUNK = 1 << 18


class Chained(io.RawIOBase):
    """A file whose first bytes have been read already, put in front again."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def peeked(file: IO[bytes], size: int) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a file, fewer only at its end, and the file from its start again."""
    head = b""
    while len(head) < size and (more := file.read(size - len(head))):
        head += more
    return head, io.BufferedReader(Chained(head, file), _CHUNK)


class _Members(io.RawIOBase):
    """Decompresses one member after another. Zeros may follow the last one, as tapes leave them, but
    nothing else.

    Python's own readers of bzip2 and xz end in silence at anything that is no further member.
    """

    def __init__(self, file: IO[bytes], begin: Callable[[], Any]) -> None:
        self._file, self._begin = file, begin
        self._member = begin()
        self._data = b""
        self._between = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._member.eof:
                self._data = self._member.unused_data
                self._member, self._between = self._begin(), True
            needs_input = self._between or self._member.needs_input
            if needs_input and not self._data:
                self._data = self._file.read(_CHUNK)
                if not self._data and self._between:
                    return 0
                if not self._data:
                    raise EOFError("it ends too early")
            if self._between:
                self._data = self._data.lstrip(b"\0")
                if not self._data:
                    continue
                self._between = False
            data, self._data = self._member.decompress(self._data, len(buffer)), b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def _zstd_members(name: str) -> Callable[[], Any]:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise InvalidArgumentError(f"{name}: zstd needs backports.zstd: pip install 'sssd[corpus]'") from None
    window: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
    return lambda: zstd.ZstdDecompressor(options=window)


def compression_of(head: bytes, name: str, *, named: str | None, sniff: bool) -> str | None:
    """How contents are compressed, None if they are plain.

    Args:
        head: their first bytes, 8 if there are as many.
        name: for messages.
        named: the kind of compression that the file's name tells, if any.
        sniff: whether contents may be what their first bytes look like whatever the name says. Not for
            bare token ids, which can look like anything.

    Raises:
        CorpusError: the name says that it is compressed, and it is not.
    """
    kind = next((kind for magic, kind in _MAGICS.items() if head.startswith(magic)), None)
    if named and not head:
        raise CorpusError(f"{name}: damaged {named} data: the file is empty")
    if kind is None and named == "lzma":  # has no magic
        return named
    if kind is None and named and not sniff:
        raise CorpusError(f"{name}: not {named} data, which its name says")
    return kind if sniff or named else None


def decompressed(file: IO[bytes], kind: str, name: str) -> IO[bytes]:
    """The plain contents, to be read within :class:`damage`.

    Raises:
        InvalidArgumentError: a package is missing.
    """
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    begin: Callable[[], Any] = bz2.BZ2Decompressor if kind == "bzip2" else lzma.LZMADecompressor
    if kind == "zstd":
        begin = _zstd_members(name)
    return io.BufferedReader(_Members(file, begin), _CHUNK)


class damage:
    """A block that reads an input: what decoders raise becomes a :class:`CorpusError` that says
    where.
    """

    def __init__(self, name: str, where: str = "") -> None:
        self.name, self.where = name, where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        broken = isinstance(error, EOFError | gzip.BadGzipFile | zlib.error | lzma.LZMAError)
        broken |= type(error).__name__ == "ZstdError"
        # bz2 has no class of its own for its errors; those of the system have a number
        broken |= isinstance(error, OSError) and error.errno is None
        if isinstance(error, UnicodeDecodeError):  # of another encoding than UTF-8
            raise CorpusError(
                f"{self.name} cannot be read{self.where}: not {error.encoding} ({error.reason})"
            ) from None
        if broken:
            raise CorpusError(f"{self.name} cannot be read{self.where}: damaged data ({error})") from None


class _Transcoded(io.RawIOBase):
    """Text in some encoding, as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._data = b""
        self._done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data and not self._done:
            data = self._file.read(_CHUNK)
            self._done = not data
            self._data = self._decoder.decode(data, self._done).encode()
        data, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def utf8(file: IO[bytes], name: str, encoding: str | None) -> IO[bytes]:
    """The contents in UTF-8 without a byte order mark. Bytes that are none are left to :func:`text_of`.

    Raises:
        CorpusError: the contents have the byte order mark of another encoding, and ``encoding`` is None.
    """
    head, file = peeked(file, 4)
    if encoding is None:
        found = next((known for bom, known in _BOMS.items() if head.startswith(bom)), None)
        if found:
            raise CorpusError(
                f"{name}: {found.upper()} by its byte order mark; read it with --encoding {found}"
            )
    elif codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig", "ascii"):
        file = io.BufferedReader(_Transcoded(file, encoding), _CHUNK)
    head, file = peeked(file, 3)
    if head == codecs.BOM_UTF8:
        file.read(3)
    return file


def text_of(data: bytes, place: str) -> str:
    """Decodes UTF-8.

    Raises:
        CorpusError: the bytes are no UTF-8, or hold NULs.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at byte {error.start + 1}"
        raise CorpusError(f"{place}: not UTF-8 ({found}); --encoding names another") from None
    if "\0" in text:
        raise CorpusError(
            f"{place}: not text: NUL at character {text.index(chr(0)) + 1} (UTF-16? --encoding)"
        )
    return text


def lines(file: IO[bytes], name: str, bad: Bad) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines, with their ends. Lines that cannot be read are told to
    ``bad``.

    Raises:
        CorpusError: the compressed data are damaged.
    """
    number = 0
    while True:
        with damage(name, f", after line {number}"):
            data = file.readline(MAX_RECORD_BYTES + 1)
            if not data:
                return
            number += 1
            long = len(data) > MAX_RECORD_BYTES
            while long and data and not data.endswith(b"\n"):
                data = file.readline(_CHUNK)
        place = f"{name}, line {number}"
        try:
            if long:
                raise CorpusError(f"{place}: longer than {MAX_RECORD_BYTES >> 20} MiB")
            text = text_of(data, place)
        except CorpusError as error:
            bad(error)
            continue
        yield number, text
