"""Records of text files and tables, and the ids of token arrays, without holding a file in memory."""

import csv
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sssd.errors import CorpusError, InvalidArgumentError
from sssd.reading.options import DTYPES, MAX_RECORD_BYTES, Bad
from sssd.reading.streams import damage, lines, peeked, text_of

_TEXT_BYTES = 1 << 20
_CHUNK_TOKENS = 1 << 20


def text_documents(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """Plain text in documents of about a MiB that end with a line, or else with a word, so that no file is
    too large.

    Raises:
        CorpusError: the text is not UTF-8 or holds NULs.
    """
    rest = b""
    line = 1
    ended = False
    while not ended:
        with damage(name, f", after line {line}"):
            data = _read(file, _TEXT_BYTES)
        ended = len(data) < _TEXT_BYTES
        data = rest + data
        cut = len(data) if ended else data.rfind(b"\n") + 1 or data.rfind(b" ") + 1
        if not cut:  # no line and no word ends here: cut between two characters
            cut = len(data)
            while cut and data[cut - 1] & 0xC0 == 0x80:
                cut -= 1
            cut = cut - 1 if cut > 1 else len(data)
        piece, rest = data[:cut], data[cut:]
        if piece:
            place = f"{name}, line {line}"
            try:
                text = text_of(piece, place)
            except CorpusError:
                _name_the_line(piece, name, line)
                raise
            yield place, text.replace("\r\n", "\n")
            line += piece.count(b"\n")


def _name_the_line(piece: bytes, name: str, line: int) -> None:
    for number, data in enumerate(piece.split(b"\n"), line):
        text_of(data, f"{name}, line {number}")


def csv_rows(file: IO[bytes], name: str, delimiter: str, bad: Bad) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a header, quoted as in RFC 4180.

    Raises:
        CorpusError: what ``bad`` raises.
    """
    # a limit of the whole process, whose default is less than many a document
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, text in lines(file, name, bad):  # noqa: B007
            yield text

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad(CorpusError(f"{name}, line {number}: not CSV ({error})"))
            continue
        if not row:
            continue
        if header is None:
            header = row
            if len(set(row)) < len(row):
                raise CorpusError(f"{name}, line {number}: two columns of one name")
        elif len(row) != len(header):
            bad(CorpusError(f"{name}, line {number}: {len(row)} cells, but {len(header)} columns"))
        else:
            yield f"{name}, line {number}", dict(zip(header, row, strict=True))


def arrow_rows(
    file: IO[bytes], name: str, format: str, wanted: Iterable[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet or Arrow file, of the wanted columns only; the others are there, but None.

    Columns of lists of integers come as int64 arrays.

    Raises:
        CorpusError: the file is damaged.
        InvalidArgumentError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InvalidArgumentError(f"{name}: {format} needs pyarrow: pip install 'sssd[corpus]'") from None
    number = 0
    wanted = set(wanted)
    try:
        with damage(name), tempfile.TemporaryFile() as copy:
            for batch in _batches(file, copy, format, pyarrow, wanted):
                batch.validate(full=True)  # or damaged offsets would end the process
                names = batch.schema.names
                if len(set(names)) < len(names):
                    raise CorpusError(f"{name}: two columns of one name")
                columns = {column: _values(batch.column(column), pyarrow) for column in set(names) & wanted}
                for row in range(batch.num_rows):
                    number += 1
                    found = {column: columns[column][row] if column in columns else None for column in names}
                    yield f"{name}, row {number}", found
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        raise CorpusError(f"{name}, after row {number}: not a readable {format} file ({error})") from None


def _batches(file: IO[bytes], copy: IO[bytes], format: str, pyarrow: Any, wanted: set[str]) -> Iterator[Any]:
    head, rest = peeked(file, 6)
    if format == "arrow" and head != b"ARROW1":
        with pyarrow.ipc.open_stream(rest) as stream:
            yield from stream
        return
    # the table of contents is at the end
    if file.seekable():
        file.seek(0)
    else:
        shutil.copyfileobj(rest, copy)
        copy.seek(0)
        file = copy
    if format == "arrow":
        with pyarrow.ipc.open_file(file) as reader:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        return
    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        for batch in table.iter_batches(batch_size=256, columns=[name for name in names if name in wanted]):
            # the columns that are not wanted, for messages
            arrays = {column: batch.column(column) for column in batch.schema.names}
            nothing = pyarrow.nulls(batch.num_rows)
            yield pyarrow.record_batch([arrays.get(column, nothing) for column in names], names)


def _values(column: Any, pyarrow: Any) -> Any:
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not lists or not types.is_integer(kind.value_type):
        return column.to_pylist()
    return [_ids(item.values) if item.is_valid else None for item in column]


def _ids(values: Any) -> Any:
    return values.to_pylist() if values.null_count else values.to_numpy(zero_copy_only=False)


def token_pieces(
    file: IO[bytes], name: str, format: str, *, dtype: str | None, vocab_size: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Places and stretches of about a million ids of a one-dimensional token array.

    Args:
        file: plain contents.
        name: for messages.
        format: "npy", or "bin" (nothing but little-endian ids).
        dtype: type of the ids of a .bin file; by ``vocab_size`` if None.
        vocab_size: number of token ids.

    Raises:
        CorpusError: the file is not a one-dimensional array of integers, ends within an id, is of another
            type, or has ids outside the vocabulary. The message names the type that would fit, if one does.
    """
    if format == "npy":
        kind, count = _npy_header(file, name)
    else:
        kind = np.dtype(dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")).newbyteorder("<")
        count = None
    done = 0
    while True:
        with damage(name, f", after {done:,} ids"):
            data = _read(file, _CHUNK_TOKENS * kind.itemsize)
        if not data:
            break
        if format == "bin" and not done:
            _check_bare(data, kind, name, vocab_size)
        if len(data) % kind.itemsize:
            raise CorpusError(f"{name}: ends within a token id of {kind.itemsize} bytes (wrong --dtype?)")
        ids = np.frombuffer(data, kind).astype(kind.newbyteorder("="), copy=False)
        if count is not None and done + len(ids) > count:
            raise CorpusError(f"{name}: more ids than the {count:,} that its header says")
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            at = int(outside[0])
            hint = _fitting(data, kind, vocab_size) if format == "bin" else ""
            raise CorpusError(f"{name}, id {done + at:,}: {ids[at]} is outside 0..{vocab_size - 1}{hint}")
        yield f"{name}, ids from {done:,}", ids
        done += len(ids)
    if count is not None and done != count:
        raise CorpusError(f"{name}: {done:,} ids, but its header says {count:,}")


def _read(file: IO[bytes], size: int) -> bytes:
    """As many bytes as asked for, fewer only at the end."""
    parts = []
    while size and (data := file.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _npy_header(file: IO[bytes], name: str) -> tuple[np.dtype[Any], int]:
    try:
        with damage(name):
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, kind = read(file)
    except (CorpusError, OSError):
        raise
    except Exception as error:  # the header is an expression of Python, which numpy parses
        raise CorpusError(f"{name}: not a .npy file ({error})") from None
    if len(shape) != 1:
        raise CorpusError(f"{name}: an array of shape {shape}; token ids must be one-dimensional")
    if kind.kind not in "iu":
        raise CorpusError(f"{name}: an array of {kind}; token ids must be integers")
    return kind, shape[0]


_NO_IDS = {
    b"\x93NUMPY": "a .npy array; call it .npy",
    b"PK\x03\x04": "a zip archive, such as saved weights",
    b"\x80\x02\x8a\x0a": "pickled data, such as saved weights",
    (20240520).to_bytes(4, "little"): "a file with the header of llm.c; leave its 1024 bytes out",
}


def _check_bare(data: bytes, kind: np.dtype[Any], name: str, vocab_size: int) -> None:
    """Refuses bytes that are no bare ids of this type, though they may happen to be in the vocabulary."""
    what = next((what for magic, what in _NO_IDS.items() if data.startswith(magic)), None)
    if what and len(data) > 64:
        raise CorpusError(f"{name}: {what}, not bare token ids")
    ids = np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)
    if len(ids) >= 16 and not ids[1::2].any() and ids.any():
        hint = _fitting(data, kind, vocab_size) or "; save it as .npy if it is not"
        raise CorpusError(f"{name}: every other {kind.name} is 0, so its ids must be wider{hint}")


def _fitting(data: bytes, kind: np.dtype[Any], vocab_size: int) -> str:
    """The type that makes ids of the vocabulary of these bytes, in words; nothing if none does."""
    for other in DTYPES:
        wide = np.dtype(other).newbyteorder("<")
        if wide.itemsize == kind.itemsize or len(data) % wide.itemsize:
            continue
        ids = np.frombuffer(data, wide)
        if ((ids >= 0) & (ids < vocab_size)).all() and (len(ids) < 16 or ids[1::2].any() or not ids.any()):
            return f"; with --dtype {other} all are inside"
    return ""


def sniffed(head: bytes) -> str | None:
    """The format that the first bytes of plain contents show, None if they show none."""
    for magic, format in ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow")):
        if head.startswith(magic):
            return format
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    return "json" if re.match(rb"(?:\xef\xbb\xbf)?\s*[\[{]", head) else None
