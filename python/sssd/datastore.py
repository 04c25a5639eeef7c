"""Datastores: a corpus of token documents on disk, and the readers that corpora are built from."""

import gzip
import hashlib
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from sssd._core import BuildSummary, Datastore, DatastoreBuilder, DatastoreInfo, FileInfo
from sssd.errors import DatastoreChangedError, InvalidArgumentError, SssdError

__all__ = [
    "BuildSummary",
    "CorpusError",
    "Datastore",
    "DatastoreBuilder",
    "DatastoreInfo",
    "Document",
    "FileInfo",
    "corpus_files",
    "corpus_format",
    "read_documents",
    "read_tokens",
    "tokenizer_fingerprint",
]

Document = str | NDArray[np.int64]
"""One document, as text or as token ids."""

FORMATS = ("jsonl", "parquet", "arrow", "text", "npy", "bin")
"""What :func:`corpus_format` recognises."""

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".npy": "npy",
    ".bin": "bin",
}
_COMPRESSIONS = (".gz", ".xz", ".zst")
_FIELDS = ("text", "messages", "conversations", "input_ids", "token_ids", "ids", "content")
_TEXT_BYTES = 1 << 20
_CHUNK_TOKENS = 1 << 20


class CorpusError(SssdError, ValueError):
    """A corpus file does not contain what its format demands."""


class VocabularyOwner(Protocol):
    """What :func:`tokenizer_fingerprint` needs of a tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""


def _reopen(paths: list[Path], load: Literal["mmap", "ram"], uuids: list[str]) -> Datastore:
    """The datastore of a pickle: the same files, by their contents."""
    store = Datastore.open(paths, load=load)
    for path, file, uuid in zip(paths, store.info.files, uuids, strict=True):
        if file.uuid != uuid:
            store.close()
            raise DatastoreChangedError(
                f"{path}: another datastore than the one that was pickled or copied (UUID {file.uuid}, "
                f"not {uuid}); put that one back, or open this one by its path"
            )
    return store


def tokenizer_fingerprint(tokenizer: VocabularyOwner) -> bytes:
    """SHA-256 of the vocabulary in the order of the ids, 32 bytes; equal for equal vocabularies."""
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id}\t{len(token)}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.digest()


def corpus_format(path: Path) -> str | None:
    """The format that the name of a file tells (compression aside), None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def corpus_files(path: Path) -> list[Path]:
    """The corpus files at a path: itself, or all below a folder in the order of their names.

    A folder saved by the Hugging Face library datasets gives the files of its ``state.json`` only.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CorpusError: the folder holds no corpus file.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(2, os.strerror(2), str(path))
    states = sorted(path.rglob("state.json"))
    if states:
        files = [
            state.parent / entry["filename"]
            for state in states
            for entry in json.loads(state.read_text("utf-8")).get("_data_files", [])
        ]
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file() and corpus_format(file))
    if not files:
        raise CorpusError(f"{path}: no file in a known format below this folder ({', '.join(_SUFFIXES)})")
    return files


def read_documents(
    file: IO[bytes], name: str, *, format: str | None = None, field: str | None = None
) -> Iterator[Document]:
    """Reads the documents of one file, without holding it in memory.

    Args:
        file: opened for reading in binary mode, compressed if ``name`` ends in .gz, .xz or .zst.
        name: file name, for the format and for messages.
        format: one of ``FORMATS`` but npy and bin; by the name if None.
        field: member or column with the document: text, token ids, or a chat (a list of messages with
            ``role`` and ``content``, of which each assistant turn becomes a document). If None, the first
            present of text, messages, conversations, input_ids, token_ids, ids, content.

    Raises:
        CorpusError: the contents are not as expected; the message tells the place.
        InvalidArgumentError: the format is unknown, or its package is not installed.
    """
    format = format or corpus_format(Path(name))
    if format == "jsonl":
        rows = _json_rows(file, name)
    elif format in ("parquet", "arrow"):
        rows = _arrow_rows(file, name, format, field)
    elif format == "text":
        yield from _text(file, name)
        return
    else:
        known = ", ".join(FORMATS)
        raise InvalidArgumentError(f"{name}: unknown corpus format; choose one with --format ({known})")
    for place, row in rows:
        yield from _row_documents(row, field, place)


def read_tokens(
    file: IO[bytes], name: str, *, format: str | None = None, dtype: str = "uint32"
) -> Iterator[NDArray[Any]]:
    """Reads a one-dimensional token array in stretches of about a million.

    Args:
        file: opened for reading in binary mode.
        name: file name, for the format and for messages.
        format: "npy", or "bin" (nothing but little-endian ids); by the name if None.
        dtype: type of the ids in a .bin file.

    Raises:
        CorpusError: the file is not a one-dimensional array of integers, or ends within an id.
    """
    format = format or corpus_format(Path(name))
    kind = np.dtype(dtype).newbyteorder("<")
    if format == "npy":
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, kind = read_header(file)
        except (ValueError, KeyError) as error:
            raise CorpusError(f"{name}: not a .npy file ({error})") from None
        if len(shape) != 1:
            raise CorpusError(f"{name}: an array of shape {shape}; token ids must be one-dimensional")
    if kind.kind not in "iu":
        raise CorpusError(f"{name}: an array of {kind}; token ids must be integers")
    while data := file.read(_CHUNK_TOKENS * kind.itemsize):
        if len(data) % kind.itemsize:
            raise CorpusError(f"{name}: ends within a token id of {kind.itemsize} bytes (wrong --dtype?)")
        yield np.frombuffer(data, kind).astype(kind.newbyteorder("="), copy=False)


_Damage = tuple[type[Exception], ...]


def _decompressed(file: IO[bytes], name: str) -> tuple[IO[bytes], _Damage]:
    """The plain contents, and what reading them raises if they are damaged."""
    suffix = Path(name).suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file)), (EOFError, gzip.BadGzipFile, zlib.error)
    if suffix == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(cast(BinaryIO, file))), (EOFError, lzma.LZMAError)
    if suffix == ".zst":
        try:
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd
        except ImportError:
            raise InvalidArgumentError(
                f"{name}: .zst needs backports.zstd: pip install 'sssd[corpus]'"
            ) from None
        return cast(IO[bytes], zstd.ZstdFile(file)), (EOFError, zstd.ZstdError)
    return file, ()


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    stream, damage = _decompressed(file, name)
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, line
    except damage as error:
        raise CorpusError(f"{name}: damaged compressed data after line {number} ({error})") from None


def _json_rows(file: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(file, name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{name}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise CorpusError(f"{name}: line {number} is not a JSON object")
        yield f"{name}: line {number}", row


def _arrow_rows(
    stream: IO[bytes], name: str, format: str, field: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InvalidArgumentError(f"{name}: {format} needs pyarrow: pip install 'sssd[corpus]'") from None
    try:
        number = 0
        for batch in _arrow_batches(stream, format, pyarrow):
            wanted = (field,) if field else _FIELDS
            batch = batch.select([column for column in wanted if column in batch.schema.names][:1])
            for row in batch.to_pylist():
                number += 1
                yield f"{name}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{name}: not a readable {format} file ({error})") from None


def _arrow_batches(stream: IO[bytes], format: str, pyarrow: Any) -> Iterable[Any]:
    if format == "parquet":
        return cast(Iterable[Any], pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024))
    magic = stream.read(6)
    stream.seek(0)
    if magic != b"ARROW1":
        return cast(Iterable[Any], pyarrow.ipc.open_stream(stream))
    reader = pyarrow.ipc.open_file(stream)
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def _text(file: IO[bytes], name: str) -> Iterator[Document]:
    """Plain text in documents of about a MiB that end with a line, so that no file is too large."""
    lines: list[bytes] = []
    size = 0
    for _, line in _lines(file, name):
        lines.append(line)
        size += len(line)
        if size >= _TEXT_BYTES:
            yield b"".join(lines).decode("utf-8", "replace")
            lines, size = [], 0
    if lines:
        yield b"".join(lines).decode("utf-8", "replace")


def _row_documents(row: dict[str, Any], field: str | None, place: str) -> Iterator[Document]:
    name = field or next((known for known in _FIELDS if known in row), None)
    if name is None or name not in row:
        wanted = f"no field {field!r}" if field else "no field with a document; choose one with --field"
        raise CorpusError(f"{place}: {wanted} (fields: {', '.join(row) or 'none'})")
    value = row[name]
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value) and value:
        yield from _assistant_turns(value)
    elif isinstance(value, list) and all(type(item) is int for item in value):
        yield np.array(value, np.int64)
    elif value is not None:
        raise CorpusError(f"{place}: field {name!r} is neither text, nor token ids, nor a list of messages")


def _assistant_turns(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        if message.get("role", message.get("from")) not in ("assistant", "gpt", "model"):
            continue
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which some may be images
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if content:
            yield str(content)
