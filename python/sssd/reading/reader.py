"""An input, opened, and its records one after another."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, TypeVar

from numpy.typing import NDArray

from sssd.errors import CorpusError
from sssd.reading.formats import arrow_rows, csv_rows, sniffed, text_documents, token_pieces
from sssd.reading.inputs import DATASTORE_MAGIC, Input
from sssd.reading.json_rows import json_rows
from sssd.reading.options import FORMATS, Bad, ReadOptions, ReadReport
from sssd.reading.streams import compression_of, damage, decompressed, peeked, utf8

T = TypeVar("T")

ARRAYS = ("npy", "bin")
"""Formats that hold nothing but token ids."""


class Opened:
    """An input that is open.

    Attributes:
        input: which one.
        format: one of ``FORMATS``, found out where the name did not tell it; "records" for a dataset.
        file: plain contents, None for a dataset.
    """

    def __init__(self, input: Input, format: str, file: IO[bytes] | None, raw: IO[bytes] | None) -> None:
        self.input, self.format, self.file, self._raw = input, format, file, raw

    def position(self) -> int:
        """Bytes of the input read so far; 0 where that cannot be told."""
        try:
            return self._raw.tell() if self._raw is not None else 0
        except (OSError, ValueError, AttributeError):
            return 0


@contextmanager
def opened(input: Input, options: ReadOptions) -> Iterator[Opened]:
    """Opens an input.

    Raises:
        CorpusError: it is a datastore, is damaged, or its format cannot be told.
        OSError: it cannot be opened.
        InvalidArgumentError: a package is missing.
    """
    if input.open is None:
        yield Opened(input, "records", None, None)
        return
    raw = input.open()
    try:
        head, file = peeked(raw, len(DATASTORE_MAGIC))
        if head == DATASTORE_MAGIC:
            raise CorpusError(f"{input.name}: is a datastore, not a corpus")
        sniff = input.format not in ARRAYS
        kind = compression_of(head, input.name, named=input.compression, sniff=sniff)
        if raw.seekable():
            raw.seek(0)
            file = raw
        if kind is not None:
            file = decompressed(file, kind, input.name)
        format = input.format
        with damage(input.name):
            head, file = peeked(file, 64)
        if kind is None and raw.seekable():  # as tables need it
            raw.seek(0)
            file = raw
        found = sniffed(head)
        if found in ("parquet", "arrow", "npy") and options.format is None and format != "bin":
            format = found
        if format is None:
            format = found or ("text" if not head.strip() else None)
        if format is None:
            raise CorpusError(
                f"{input.name}: its format cannot be told; --format names it ({', '.join(FORMATS)})"
            )
        yield Opened(input, format, file, raw)
    finally:
        raw.close()


@dataclass(frozen=True)
class Stretch:
    """A part of a token array, int [n], which says nothing of where documents end."""

    ids: NDArray[Any]


def read(
    input: Input,
    options: ReadOptions,
    report: ReadReport,
    take: Callable[[Any, str], list[T]],
    *,
    wanted: Iterable[str],
    vocab_size: int | None = None,
) -> Iterator[tuple[Opened, str, T | Stretch]]:
    """What ``take`` makes of each record of an input, with the record's place (file and line).
    Token arrays come whole, whatever the input's shard.

    Args:
        input: what to read.
        options: how; if bad records are skipped, so is the rest of an input that breaks off.
        report: counts what is skipped.
        take: gets a record (an object as a dict, a text, or a list) and its place.
        wanted: columns that it looks at; others of a Parquet or Arrow file may come as None.
        vocab_size: number of token ids. If None, token arrays are refused.

    Raises:
        CorpusError: the input, or one of its records, cannot be read, and that is not to be skipped.
        OSError: likewise, for the system's reasons.
        InvalidArgumentError: a package is missing.
    """
    bad = report.bad_record(options)
    try:
        with opened(input, options) as source:
            if source.format in ARRAYS and vocab_size is not None and source.file is not None:
                pieces = token_pieces(
                    source.file, input.name, source.format, dtype=options.dtype, vocab_size=vocab_size
                )
                yield from ((source, place, Stretch(ids)) for place, ids in pieces)
                return
            records = _records(source, options, bad, wanted)
            if input.shard is not None:
                records = islice(records, input.shard[0], None, input.shard[1])
            for place, record in records:
                try:
                    taken = take(record, place)
                except CorpusError as error:
                    bad(error)
                else:
                    report.documents += len(taken)
                    yield from ((source, place, item) for item in taken)
    except CorpusError as error:
        bad(error)
    except OSError as error:
        if not options.skip_bad:
            raise
        bad(CorpusError(f"{input.name}: cannot be read ({error})"))


def _records(
    source: Opened, options: ReadOptions, bad: Bad, wanted: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    name, file = source.input.name, source.file
    if file is None:
        yield from _plain_records(source.input)
    elif source.format in ("parquet", "arrow"):
        yield from arrow_rows(file, name, source.format, wanted)
    elif source.format in ARRAYS:
        raise CorpusError(f"{name}: token ids, where records with fields are needed")
    else:
        with damage(name):
            file = utf8(file, name, options.encoding)
        if source.format == "text":
            yield from text_documents(file, name)
        elif source.format in ("csv", "tsv"):
            yield from csv_rows(file, name, "\t" if source.format == "tsv" else ",", bad)
        else:
            yield from json_rows(file, name, bad)


def _plain_records(input: Input) -> Iterator[tuple[str, Any]]:
    assert input.records is not None
    for number, record in enumerate(input.records(), 1):
        yield f"{input.name}, row {number}", record
