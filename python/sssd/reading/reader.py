"""An input, opened, and its records one after another."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sssd.errors import CorpusError
from sssd.reading.formats import arrow_rows, csv_rows, sniffed, text_documents, token_pieces
from sssd.reading.inputs import DATASTORE_MAGIC, Input
from sssd.reading.json_rows import json_rows
from sssd.reading.options import FORMATS, Bad, ReadOptions
from sssd.reading.streams import compression_of, damage, decompressed, peeked, utf8

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
        kind = compression_of(head, input.name, ending=input.compression, sniff=sniff)
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


def read_records(
    source: Opened, options: ReadOptions, bad: Bad, wanted: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """Places and records of an open input: objects as dicts, texts as strings, lists as they are.

    Args:
        source: the input, of any format but token arrays.
        options: its encoding.
        bad: told of records that cannot be read.
        wanted: columns that are looked at; others of a Parquet or Arrow file may come as None.

    Raises:
        CorpusError: what ``bad`` raises, or the rest of the input cannot be read.
    """
    name, file = source.input.name, source.file
    if file is None:
        yield from _plain_records(source.input)
    elif source.format in ("parquet", "arrow"):
        yield from arrow_rows(file, name, source.format, wanted)
    else:
        with damage(name):
            file = utf8(file, name, options.encoding)
        if source.format == "text":
            yield from text_documents(file, name)
        elif source.format in ("csv", "tsv"):
            yield from csv_rows(file, name, "\t" if source.format == "tsv" else ",", bad)
        elif source.format in ARRAYS:
            raise CorpusError(f"{name}: token ids, where records with fields are needed")
        else:
            yield from json_rows(file, name, bad)


def _plain_records(input: Input) -> Iterator[tuple[str, Any]]:
    assert input.records is not None
    for number, record in enumerate(input.records(), 1):
        yield f"{input.name}, row {number}", record


def token_arrays(
    source: Opened, options: ReadOptions, vocab_size: int
) -> Iterator[tuple[str, NDArray[np.integer[Any]]]]:
    """Places and stretches of an open token array; see :func:`sssd.reading.formats.token_pieces`."""
    assert source.file is not None
    dtype = options.dtype
    return token_pieces(source.file, source.input.name, source.format, dtype=dtype, vocab_size=vocab_size)
