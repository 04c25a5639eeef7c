"""Segments of a corpus: opened, written, and merged with others."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd._core import Datastore, DatastoreBuilder, write_tombstones
from sssd.corpus.documents import NO_TABLE, Collector, Table, living, table_of, with_dead
from sssd.corpus.folder import Folder, load_dead, load_table
from sssd.corpus.manifest import Dead, Manifest, Part, Segment
from sssd.corpus.policy import FULL, MAX_SEGMENTS, merged_from
from sssd.errors import CorruptCorpusError, InvalidArgumentError
from sssd.reading.options import shown

Indexed = Callable[[int, int], object]
"""Called with the symbols indexed so far, and of how many."""


@dataclass(frozen=True)
class Limits:
    """What a builder is told: ``max_memory`` in bytes, and whom to tell how far it is."""

    max_memory: int | None = None
    indexed: Indexed | None = None


@contextlib.contextmanager
def open_segment(folder: Path, segment: Segment) -> Iterator[Datastore]:
    """The datastore of a segment, deleted documents included.

    Raises:
        CorruptCorpusError: it is another file than the manifest says.
    """
    with Datastore.open(folder / segment.file) as store:
        found = store.info
        expected = (segment.uuid, segment.tokens, segment.documents, segment.bytes)
        if (found.files[0].uuid, found.tokens, found.documents, found.file_bytes) != expected:
            raise CorruptCorpusError(
                f"{shown(folder / segment.file)} is not the file that the manifest names; put back a copy"
            )
        yield store


class Writer:
    """Writes one segment: new documents through ``collector``, then those of other segments.

    Args:
        folder: the corpus that it is for.
        manifest: of the corpus.
        known: see :class:`Collector`.
        limits: of the builder.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        limits: Limits,
        known: NDArray[np.uint64] | None = None,
        name: str = "segment",
    ) -> None:
        self._folder, self._manifest, self._limits, self._name = folder, manifest, limits, name
        fingerprint = manifest.fingerprint
        self._path = folder.work / f"{name}.sssd"
        self.builder = DatastoreBuilder(
            self._path,
            vocab_size=manifest.vocab_size,
            fingerprint=None if fingerprint is None else bytes.fromhex(fingerprint),
            max_memory=limits.max_memory,
        )
        self.collector = Collector(self.builder, known)
        self._tables: list[Table] = []
        self._parts: list[Part] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.builder.close()

    def collected(self, table: Table, parts: Sequence[Part]) -> None:
        """Notes what ``collector`` has taken."""
        self._tables.append(table)
        self._parts += parts

    def add_store(self, store: Datastore, table: Table, source: str) -> None:
        """Adds the documents of an open datastore, of which ``table`` has the rows, as new ones."""
        self.builder.add_datastore(store, self.collector.take(source, table))

    def merge(self, segment: Segment) -> None:
        """Adds the living documents of a segment.

        Raises:
            CorruptDatastoreError: a byte of its text is wrong.
        """
        alive = ~load_dead(self._folder.path, segment)
        with open_segment(self._folder.path, segment) as store:
            self.builder.add_datastore(store, alive)
        self.collected(load_table(self._folder.path, segment)[alive], living(segment.parts))

    def finish(self, others: list[Segment]) -> Segment:
        """Ends the file and places it in the folder.

        Args:
            others: segments that stay. One that has the same contents does not, and is taken off the list.
        """
        summary = self.builder.finish(self._limits.indexed)
        with Datastore.open(self._path) as store:
            uuid = store.info.files[0].uuid
            for same in [other for other in others if other.uuid == uuid]:
                others.remove(same)
                with Writer(self._folder, self._manifest, self._limits, name=f"{self._name}-") as both:
                    both.builder.add_datastore(store)
                    both._tables, both._parts = self._tables, self._parts
                    both.merge(same)
                    return both.finish(others)
        table = np.concatenate(self._tables) if self._tables else NO_TABLE
        if len(table) != summary.documents:
            raise InvalidArgumentError("a document was cut; give more max_memory than a segment of it takes")
        name = self._folder.save_array(table, ".documents.npy")
        segment = Segment(
            uuid=uuid,
            tokens=summary.tokens,
            documents=summary.documents,
            bytes=summary.file_bytes,
            written_at=self._manifest.written + summary.tokens,
            table=name,
            parts=tuple(self._parts),
        )
        self._folder.place(self._path, segment.file)
        return segment


def rewritten(folder: Folder, manifest: Manifest, merged: Sequence[Segment], limits: Limits) -> Manifest:
    """The manifest with some segments as one, without their deleted documents, in the place of the first."""
    with Writer(folder, manifest, limits) as writer:
        for segment in merged:
            writer.merge(segment)
        return with_segment(manifest, writer, merged)


def with_segment(manifest: Manifest, writer: Writer, merged: Sequence[Segment]) -> Manifest:
    """The manifest with what ``writer`` holds instead of the segments that it has merged. Those without a
    document go as well, but for the last.
    """
    gone = {segment.uuid for segment in merged}
    others = [segment for segment in manifest.segments if segment.uuid not in gone and segment.documents]
    before = {segment.uuid for segment in manifest.segments[: _place(manifest, gone)]}
    new = writer.finish(others)
    at = sum(segment.uuid in before for segment in others)
    segments = [*others[:at], new, *others[at:]] if new.documents or not others else others
    return after(manifest, segments, new.tokens)


def victims(manifest: Manifest, tokens: int) -> list[Segment]:
    """The segments that the policy merges with so many new tokens, in their order."""
    small = [segment for segment in manifest.segments if segment.living < FULL]
    return small[merged_from(small, tokens, manifest.written) :]


def settled(folder: Folder, manifest: Manifest, limits: Limits) -> Manifest:
    """The manifest after what the policy wants done: segments that are mostly dead are written anew, and
    those that are too many are merged.
    """
    for segment in manifest.segments:
        if segment.dead_documents and 2 * segment.dead_tokens >= segment.tokens:
            manifest = folder.commit(rewritten(folder, manifest, [segment], limits))
    if sum(segment.living < FULL for segment in manifest.segments) > MAX_SEGMENTS:
        manifest = folder.commit(rewritten(folder, manifest, victims(manifest, 0), limits))
    return manifest


def after(manifest: Manifest, segments: Sequence[Segment], written: int) -> Manifest:
    """The next manifest."""
    return manifest.after(tuple(segments), written, int(time.time()))


def _place(manifest: Manifest, gone: set[str]) -> int:
    places = (at for at, segment in enumerate(manifest.segments) if segment.uuid in gone)
    return next(places, len(manifest.segments))


def without(folder: Folder, segment: Segment, dead: NDArray[np.bool_], table: Table) -> Segment:
    """A segment with these documents deleted: their tombstones are written, the rest stays.

    Args:
        folder: the corpus.
        segment: one of it.
        dead: bool [documents], those deleted before included.
        table: the segment's.
    """
    work = folder.work / "tombstones"
    with open_segment(folder.path, segment) as store:
        tokens = write_tombstones(store, dead, work)
    parts = with_dead(segment.parts, table, dead)
    if tokens != sum(part.dead_tokens for part in parts):
        raise CorruptCorpusError(f"{shown(folder.path / segment.table)} does not fit its datastore")
    flags = folder.save_array(np.packbits(dead), ".dead.npy")
    return replace(segment, parts=parts, dead=Dead(flags, folder.place_by_contents(work, ".tombstones")))


def describe(path: Path) -> tuple[Datastore, Table]:
    """A datastore file, checked byte by byte, and the table of its documents. The caller closes it."""
    store = Datastore.open(path)
    try:
        store.verify()
        return store, table_of(store.documents())
    except BaseException:
        store.close()
        raise
