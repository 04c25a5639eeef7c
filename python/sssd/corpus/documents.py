"""What is known of each document of a segment: a table with a row for each, beside the datastore file."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sssd.corpus.manifest import Part
from sssd.errors import CorpusError

Table = NDArray[np.uint64]
"""A row for each document, uint64 [n, 3]: hash of its tokens, hash of its id (0: it has none), its tokens."""

CONTENT, ID, LENGTH = range(3)

MAX_DOCUMENT_TOKENS = 1 << 28
"""The longest document that is taken: 1 GiB while it is added."""

NO_TABLE: Table = np.zeros((0, 3), np.uint64)


def content_hash(ids: NDArray[np.int32]) -> int:
    """BLAKE2b of a document's tokens, 64 bits."""
    data = ids.astype("<i4", copy=False).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def id_hash(document_id: str | int) -> int:
    """BLAKE2b of a document's id, 64 bits and never 0. The number 7 and the text "7" are the same id."""
    digest = hashlib.blake2b(str(document_id).encode("utf-8", "surrogatepass"), digest_size=8, person=b"id")
    return int.from_bytes(digest.digest(), "little") or 1


def digest_of(contents: NDArray[np.uint64]) -> str:
    """A name for documents in their order, from the hashes of their tokens."""
    data = np.ascontiguousarray(contents).astype("<u8", copy=False).tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _Takes(Protocol):
    def add(self, ids: Any) -> None: ...


class Collector:
    """Passes documents on to a builder and keeps a row of each, in parts by their source.

    Args:
        builder: a ``DatastoreBuilder``.
        known: hashes of documents that are left out, as are repeated ones; None to take every document.
    """

    def __init__(self, builder: _Takes, known: NDArray[np.uint64] | None) -> None:
        self._builder = builder
        self._known = None if known is None else set(known.tolist())
        self._rows: list[tuple[int, int, int]] = []
        self._starts: list[tuple[str, int]] = []
        self._open: list[NDArray[np.int32]] = []
        self._open_tokens = 0
        self.duplicates = 0

    def start(self, source: str) -> None:
        """The documents that follow are of this source."""
        self.end_stream()
        if not self._starts or self._starts[-1][0] != source:
            self._starts.append((source, len(self._rows)))

    def add(self, ids: Any, document_id: str | int | None = None) -> None:
        """Takes a document, int [n]; empty ones are left out."""
        ids = np.asarray(ids)
        if not len(ids):
            return
        plain = ids.astype(np.int32)
        if (plain != ids).any():
            self._builder.add(ids)  # which refuses it
        content = content_hash(plain)
        if self._known is not None and content in self._known:
            self.duplicates += 1
            return
        self._builder.add(ids)
        if self._known is not None:
            self._known.add(content)
        self._rows.append((content, 0 if document_id is None else id_hash(document_id), len(ids)))

    def add_stream(self, ids: Any, end_token_id: int) -> None:
        """Takes a stretch of a stream, int [n], whose documents end with ``end_token_id``."""
        ids = np.asarray(ids)
        start = 0
        for end in (np.flatnonzero(ids == end_token_id) + 1).tolist():
            self._open.append(ids[start:end])
            self.end_stream()
            start = end
        if start < len(ids):
            self._open.append(ids[start:].copy())
            self._open_tokens += len(ids) - start
            if self._open_tokens > MAX_DOCUMENT_TOKENS:
                raise CorpusError(
                    f"a document of more than {MAX_DOCUMENT_TOKENS:,} tokens; is {end_token_id} the token "
                    "that ends documents (--end-token)?"
                )

    def end_stream(self) -> None:
        """Ends the document that is open."""
        if self._open:
            pieces, self._open, self._open_tokens = self._open, [], 0
            self.add(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))

    def take(self, source: str, table: Table) -> NDArray[np.bool_]:
        """Notes documents that the builder is given otherwise; returns which are wanted, bool [n]."""
        self.start(source)
        wanted = np.ones(len(table), np.bool_)
        for at, row in enumerate(table.tolist()):
            if row[LENGTH] == 0 or (self._known is not None and row[CONTENT] in self._known):
                wanted[at] = False
                self.duplicates += row[LENGTH] > 0
                continue
            if self._known is not None:
                self._known.add(row[CONTENT])
            self._rows.append(tuple(row))
        return wanted

    def result(self, added: int, metadata: dict[str, str]) -> tuple[Table, list[Part]]:
        """The table of all documents, and the parts that they are in."""
        self.end_stream()
        table = np.array(self._rows, np.uint64).reshape(-1, 3)
        ends = [start for _, start in self._starts[1:]] + [len(table)]
        parts = []
        for (source, start), end in zip(self._starts, ends, strict=True):
            if start < end:
                rows = table[start:end]
                tokens, digest = int(rows[:, LENGTH].sum()), digest_of(rows[:, CONTENT])
                parts.append(Part(source, added, end - start, tokens, digest=digest, metadata=metadata))
        return table, parts


def table_of(documents: Iterable[NDArray[np.int32] | None]) -> Table:
    """The table of a datastore file's documents."""
    rows = [(content_hash(ids), 0, len(ids)) for ids in documents if ids is not None]
    return np.array(rows, np.uint64).reshape(-1, 3)


def bounds(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """First document of each part, and the one after its last."""
    ends = np.cumsum([part.documents for part in parts], dtype=np.int64).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def with_dead(parts: Sequence[Part], table: Table, dead: NDArray[np.bool_]) -> tuple[Part, ...]:
    """The parts with their deleted documents counted anew."""
    found = []
    for part, (start, end) in zip(parts, bounds(parts), strict=True):
        gone = dead[start:end]
        tokens = int(table[start:end, LENGTH][gone].sum())
        digest = None if gone.any() else part.digest
        found.append(replace(part, dead_documents=int(gone.sum()), dead_tokens=tokens, digest=digest))
    return tuple(found)


def living(parts: Iterable[Part]) -> list[Part]:
    """The parts without their deleted documents."""
    return [
        replace(
            part,
            documents=part.documents - part.dead_documents,
            tokens=part.tokens - part.dead_tokens,
            dead_documents=0,
            dead_tokens=0,
        )
        for part in parts
        if part.documents > part.dead_documents
    ]
