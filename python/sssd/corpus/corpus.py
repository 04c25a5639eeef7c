"""A corpus: a folder of datastore files that grows and shrinks."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import Datastore
from sssd.corpus import deleting
from sssd.corpus.adding import Added, Found, Origin, add_inputs, adopt, split_datastores
from sssd.corpus.deleting import Chooses, Removed, delete
from sssd.corpus.documents import CONTENT, LENGTH, bounds, content_hash, with_dead
from sssd.corpus.domains import Run, domains
from sssd.corpus.folder import SHARDS, Folder, load_dead, load_table, writing
from sssd.corpus.manifest import Manifest, Segment, check_metadata, is_own, load_manifest
from sssd.corpus.segments import Limits, open_segment, rewritten, settled
from sssd.datastore import Progress, as_items
from sssd.errors import CorruptCorpusError, DatastoreError, InvalidArgumentError
from sssd.reading.inputs import find_inputs
from sssd.reading.options import ReadOptions, ReadReport, shown
from sssd.reading.tokenizer import load_tokenizer

_OPENINGS = 10
"""How often a reader begins anew because a file has gone since it read the manifest."""


@dataclass(frozen=True)
class Document:
    """A document of a corpus.

    Attributes:
        ids: its tokens, int32 [n].
        source: the label that it was added with.
        added: when, in seconds since 1970 (UTC).
        metadata: what was said about its source.
    """

    ids: NDArray[np.int32]
    source: str
    added: int
    metadata: Mapping[str, str]


def files(folder: str | os.PathLike[str]) -> list[tuple[Path, Path | None]]:
    """The datastore files of a corpus as it is now, each with the file of its tombstones if it has one.

    Raises:
        CorpusError: the folder is no corpus.
        CorruptCorpusError: its manifest is damaged.
        DatastoreVersionError: another release wrote it.
    """
    return [(path, tombstones) for path, tombstones, _ in opened(folder)]


def opened(folder: str | os.PathLike[str]) -> list[tuple[Path, Path | None, list[Run]]]:
    """The same, each with its documents by domain, as ``Datastore.open`` takes them.

    Raises:
        As :func:`files`.
    """
    path = Path(folder)
    manifest = load_manifest(path)
    return [
        (path / segment.file, None if segment.dead is None else path / segment.dead.tombstones, runs)
        for segment, runs in zip(manifest.segments, domains(manifest), strict=True)
    ]


class Corpus:
    """A folder of datastore files with a manifest. ``docs/corpora.md`` is the guide.

    Readers (``Datastore.open(folder)``, ``Drafter(datastore=folder)``) take no lock and keep the version
    that they have opened. Writers exclude one another; one that dies leaves the version before or the one
    after, and the next cleans up.

    Args:
        path: the folder. :meth:`add` and :meth:`adopt` make it.
        timeout: seconds to wait for another writer.
        grace: seconds for which files stay that a new version does without, for readers that have read the
            manifest and are about to open what it names. A later writer deletes them, or this one if it is 0.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0, grace: float = 60.0) -> None:
        self.path, self._timeout, self._grace = Path(path), timeout, grace

    def _writing(self, *, create: bool = False) -> AbstractContextManager[Folder]:
        return writing(self.path, timeout=self._timeout, grace=self._grace, create=create)

    @property
    def manifest(self) -> Manifest:
        """What the corpus holds.

        Raises:
            CorpusError: the folder is no corpus.
            CorruptCorpusError: the manifest is damaged.
            DatastoreVersionError: another release wrote it.
        """
        return load_manifest(self.path)

    def add(
        self,
        inputs: Any,
        *,
        tokenizer: Any = None,
        chat_template: str | None = None,
        vocab_size: int | None = None,
        end_token_id: int | None = None,
        options: ReadOptions | None = None,
        source: str | None = None,
        metadata: Mapping[str, str] | None = None,
        id_field: str | None = None,
        added: int | None = None,
        deduplicate: bool = False,
        merge: bool = True,
        max_memory: int | None = None,
        progress: Progress | None = None,
    ) -> Added:
        """Adds documents; makes the corpus if there is none. Small segments are merged with them as the
        policy says, so that there are at most four, full ones (2^30 tokens) aside. Nothing changes if all
        that is to be added is in the corpus already, in the same order.

        Args:
            inputs: what ``sssd.datastore.build`` takes, and datastore files.
            tokenizer: as ``build`` takes it; so are ``chat_template``, ``vocab_size``, ``end_token_id``,
                ``options``, ``max_memory`` and ``progress``. They must fit the corpus that is there. With
                ``options.shard`` the share becomes a corpus of its own inside the folder, which
                :meth:`adopt` takes over.
            source: label by which the documents can be deleted; the input's name if None.
            metadata: texts by name, for the manifest.
            id_field: member of each record that is its id, a text or an integer, by which it can be deleted.
            added: when, in seconds since 1970 (UTC); now if None.
            deduplicate: leave out documents that are in the corpus or come twice.
            merge: merge segments if the policy says so.

        Raises:
            VocabularyMismatchError: the corpus holds another tokenizer's tokens.
            LockedError: another process is writing.
            SssdError, OSError: as ``build``; the corpus is as it was.
        """
        options = options or ReadOptions()
        origin = _origin(source, added, metadata, id_field)
        stores, rest = split_datastores(as_items(inputs))
        target: Corpus = self
        if options.shard is not None:
            share, shares = options.shard
            target = Corpus(self.path / SHARDS / f"{share}-of-{shares}", timeout=self._timeout)
            stores = stores[share::shares]
        report = ReadReport()
        found = Found(
            find_inputs(rest, options, report, output=self.path) if rest else [],
            stores,
            None if tokenizer is None else load_tokenizer(tokenizer, chat_template),
            vocab_size,
            end_token_id,
            options,
            report,
        )
        with target._writing(create=True) as folder:
            return add_inputs(
                folder,
                found,
                origin,
                _limits(max_memory, progress),
                deduplicate=deduplicate,
                merge=merge,
                progress=progress or (lambda *_: None),
            )

    def adopt(
        self,
        paths: Iterable[str | os.PathLike[str]] | None = None,
        *,
        source: str | None = None,
        metadata: Mapping[str, str] | None = None,
        added: int | None = None,
        merge: bool = True,
        max_memory: int | None = None,
        progress: Progress | None = None,
    ) -> Added:
        """Takes over whole segments, without sorting them again unless they must be merged.

        Args:
            paths: other corpora, and datastore files. None: the shares that :meth:`add` has written in the
                folder with ``options.shard``, of which none may be missing; they go afterwards.
            source, metadata, added: what to say of datastore files, as in :meth:`add`. Corpora say it
                themselves.
            merge: merge segments if the policy says so.
            max_memory, progress: as in :meth:`add`.

        Raises:
            CorpusError: there are no shares, or one is missing.
            CorruptDatastoreError: a file is damaged.
            VocabularyMismatchError: a segment holds another tokenizer's tokens.
            LockedError: another process is writing.
        """
        origin = _origin(source, added, metadata)
        with self._writing(create=True) as folder:
            chosen = None if paths is None else [Path(path) for path in paths]
            return adopt(folder, chosen, origin, _limits(max_memory, progress), merge=merge)

    def remove(
        self,
        *,
        source: str | Sequence[str] | None = None,
        before: int | None = None,
        ids: Iterable[str | int] | None = None,
        merge: bool = True,
    ) -> Removed:
        """Deletes the documents that all that is given means. No reader that opens the corpus afterwards sees
        them; the bytes go when their segment is merged, at once if half of it is deleted, and by
        :meth:`merge` in any case.

        Args:
            source: labels, or patterns such as ``"logs/2026-*"``.
            before: what was added earlier, in seconds since 1970 (UTC).
            ids: ids of documents that were added with ``id_field``.
            merge: merge segments if the policy says so.

        Raises:
            InvalidArgumentError: nothing is given.
            LockedError: another process is writing.
        """
        chosen: list[Chooses] = []
        if source is not None:
            chosen.append(deleting.of_sources([source] if isinstance(source, str) else list(source)))
        if before is not None:
            chosen.append(deleting.of_parts(lambda part: part.added < before))
        if ids is not None:
            if isinstance(ids, str):
                raise InvalidArgumentError(f"ids must be several ids, not one text: [{ids!r}]")
            chosen.append(deleting.of_ids(ids))
        if not chosen:
            raise InvalidArgumentError("say what to delete: source, before or ids")
        with self._writing() as folder:
            assert folder.manifest is not None
            return delete(folder, folder.manifest, deleting.of_all(chosen), Limits(), merge=merge)

    def expire(
        self, older_than: timedelta | None = None, *, max_tokens: int | None = None, merge: bool = True
    ) -> Removed:
        """Deletes what was added longest ago.

        Args:
            older_than: everything that is older.
            max_tokens: as much as must go for no more to stay. What came at one time goes together.
            merge: as in :meth:`remove`.

        Raises:
            InvalidArgumentError: nothing is given.
            LockedError: another process is writing.
        """
        if older_than is None and max_tokens is None:
            raise InvalidArgumentError("say what to delete: older_than or max_tokens")
        with self._writing() as folder:
            manifest = folder.manifest
            assert manifest is not None
            documents = tokens = 0
            if older_than is not None:
                limit = time.time() - older_than.total_seconds()
                meant = deleting.of_parts(lambda part: part.added < limit)
                first = delete(folder, manifest, meant, Limits(), merge=False)
                manifest, documents, tokens = first.manifest, first.documents, first.tokens
            none = deleting.of_parts(lambda _: False)
            meant = none if max_tokens is None else deleting.of_parts(deleting.oldest(manifest, max_tokens))
            second = delete(folder, manifest, meant, Limits(), merge=merge)
            return Removed(second.manifest, documents + second.documents, tokens + second.tokens)

    def merge(
        self, *, whole: bool = False, max_memory: int | None = None, progress: Progress | None = None
    ) -> Manifest:
        """Writes every segment with deleted documents anew, without them, and merges those that are more than
        four.

        Args:
            whole: merge all segments into one.
            max_memory, progress: as in :meth:`add`.

        Raises:
            CorruptDatastoreError: a segment is damaged.
            LockedError: another process is writing.
        """
        limits = _limits(max_memory, progress)
        with self._writing() as folder:
            manifest = folder.manifest
            assert manifest is not None
            if whole and (len(manifest.segments) > 1 or manifest.segments[0].dead):
                return folder.commit(rewritten(folder, manifest, manifest.segments, limits))
            for segment in manifest.segments:
                if segment.dead is not None:
                    manifest = folder.commit(rewritten(folder, manifest, [segment], limits))
            return settled(folder, manifest, limits)

    def documents(self, *, source: str | Sequence[str] | None = None) -> Iterator[Document]:
        """All documents that are not deleted, those of given sources only if there are any.

        Raises:
            CorpusError, DatastoreError, OSError: as :func:`files` and ``Datastore.open``.
        """
        choose = deleting.of_parts(lambda _: True)
        if source is not None:
            choose = deleting.of_sources([source] if isinstance(source, str) else list(source))
        with ExitStack() as opened:
            for segment, store, dead in self._opened(opened):
                wanted = choose(segment, lambda: np.zeros((0, 3), np.uint64)) & ~dead
                for part, (start, end) in zip(segment.parts, bounds(segment.parts), strict=True):
                    if not wanted[start:end].any():
                        continue
                    for ids, take in zip(store.documents(start, end), wanted[start:end], strict=True):
                        if take and ids is not None:
                            yield Document(ids, part.source, part.added, part.metadata)

    def _opened(self, opened: ExitStack) -> list[tuple[Segment, Datastore, NDArray[np.bool_]]]:
        """All segments, open until ``opened`` ends, with their deleted documents."""
        for attempt in range(_OPENINGS):
            try:
                with ExitStack() as held:
                    found = [
                        (
                            segment,
                            held.enter_context(open_segment(self.path, segment)),
                            load_dead(self.path, segment),
                        )
                        for segment in self.manifest.segments
                    ]
                    opened.push(held.pop_all())
                    return found
            except FileNotFoundError:
                if attempt == _OPENINGS - 1:
                    raise
        raise AssertionError

    def verify(self) -> list[str]:
        """Compares every byte with its checksum, and files with the manifest. Nothing is repaired.

        Returns:
            What is wrong, in words; an empty list if nothing is.

        Raises:
            CorpusError: the folder is no corpus.
        """
        found: list[str] = []
        try:
            manifest = self.manifest
        except DatastoreError as error:
            return [str(error)]
        for segment in manifest.segments:
            try:
                _verify_segment(self.path, segment)
            except (DatastoreError, OSError) as error:
                found.append(str(error))
        known = manifest.files | manifest.retired.keys()
        found += [
            f"{shown(self.path / name)} belongs to no version (a writer was killed; the next deletes it)"
            for name in sorted(os.listdir(self.path))
            if is_own(name) and name not in known
        ]
        return found


def _verify_segment(folder: Path, segment: Segment) -> None:
    tombstones = None if segment.dead is None else folder / segment.dead.tombstones
    with Datastore.open([folder / segment.file], tombstones=[tombstones]) as store:
        store.verify()
    table, dead = load_table(folder, segment), load_dead(folder, segment)
    with open_segment(folder, segment) as store:
        for row, ids in zip(table.tolist(), store.documents(), strict=True):
            assert ids is not None
            if (row[CONTENT], row[LENGTH]) != (content_hash(ids), len(ids)):
                raise CorruptCorpusError(f"{shown(folder / segment.table)} does not fit {segment.file}")
    if segment.parts != with_dead(segment.parts, table, dead):
        raise CorruptCorpusError(f"{segment.file}: the manifest's parts do not fit its documents")


def _origin(
    source: str | None,
    added: int | None,
    metadata: Mapping[str, str] | None,
    id_field: str | None = None,
) -> Origin:
    try:
        about = check_metadata(metadata or {})
        label = None if source is None else check_metadata({"source": source})["source"]
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(str(error)) from None
    when = int(time.time()) if added is None else added
    if not 0 <= when < 1 << 40:
        raise InvalidArgumentError(f"added must be seconds since 1970, not {added}")
    return Origin(label, when, about, id_field)


def _limits(max_memory: int | None, progress: Progress | None) -> Limits:
    if max_memory is not None and not 0 < max_memory < 1 << 63:
        raise InvalidArgumentError(f"max_memory must be a number of bytes, not {max_memory}")
    if progress is None:
        return Limits(max_memory)
    show: Callable[[str, int, int | None], object] = progress
    return Limits(max_memory, lambda done, total: show("indexing", done, total))
