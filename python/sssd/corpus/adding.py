"""Documents that come into a corpus: read from inputs, or taken over with their segments."""

import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import Datastore
from sssd.corpus.documents import CONTENT, LENGTH, digest_of
from sssd.corpus.folder import SHARDS, Folder, link, load_dead, load_table
from sssd.corpus.manifest import NAME, Manifest, Part, Segment, load_manifest
from sssd.corpus.segments import Limits, Writer, after, describe, open_segment, settled, victims, with_segment
from sssd.datastore import MAX_VOCAB_SIZE, Progress, Reading, no_document
from sssd.errors import CorpusError, InvalidArgumentError, VocabularyMismatchError
from sssd.reading.inputs import DATASTORE_MAGIC, Input
from sssd.reading.options import ReadOptions, ReadReport, shown
from sssd.reading.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class Added:
    """What an addition has done.

    Attributes:
        manifest: of the corpus afterwards.
        documents: that came in.
        tokens: of these.
        duplicates: documents left out because they are in the corpus or came twice.
        known: what was to be added was in the corpus already, and nothing has changed.
        report: what reading left out, skipped or changed.
    """

    manifest: Manifest
    documents: int
    tokens: int
    duplicates: int
    known: bool
    report: ReadReport


@dataclass(frozen=True)
class Origin:
    """What is said of new documents: ``source`` (the input's name if None), ``added``, ``metadata``, and the
    member of records that is their id.
    """

    source: str | None
    added: int
    metadata: dict[str, str]
    id_field: str | None = None


@dataclass(frozen=True)
class Found:
    """Inputs, and how they are read."""

    inputs: list[Input]
    stores: list[Path]
    tokenizer: LoadedTokenizer | None
    vocab_size: int | None
    end_token_id: int | None
    options: ReadOptions
    report: ReadReport


def add_inputs(
    folder: Folder,
    found: Found,
    origin: Origin,
    limits: Limits,
    *,
    deduplicate: bool,
    merge: bool,
    progress: Progress,
) -> Added:
    """Adds what inputs hold, and merges segments as the policy says if ``merge``."""
    with ExitStack() as opened:
        stores = []
        for path in found.stores:
            store, table = describe(path)
            opened.enter_context(store)
            stores.append((path, store, table))
        manifest = _for_tokens(folder.manifest, found, [store for _, store, _ in stores])
        known = _contents(folder, manifest) if deduplicate else None
        writer = opened.enter_context(Writer(folder, manifest, limits, known))
        collector = writer.collector
        for path, store, table in stores:
            writer.add_store(store, table, origin.source or shown(path))
        reading = Reading(
            collector,
            found.tokenizer,
            manifest.vocab_size,
            found.end_token_id,
            found.options,
            found.report,
            origin.id_field,
        )
        reading.read(
            found.inputs, progress, lambda input: collector.start(origin.source or input.name[:_LABEL])
        )
        table, parts = collector.result(origin.added, origin.metadata)
        duplicates, tokens = collector.duplicates, sum(part.tokens for part in parts)
        if not parts and not duplicates and found.options.shard is None:
            raise no_document(len(found.inputs) + len(stores), found.report)
        if folder.manifest is not None and is_known(manifest, parts):
            return Added(manifest, 0, 0, duplicates, True, found.report)
        writer.collected(table, parts)
        merged = victims(manifest, tokens) if merge else []
        for segment in merged:
            writer.merge(segment)
        new = folder.commit(with_segment(manifest, writer, merged))
        return Added(new, len(table), tokens, duplicates, False, found.report)


_LABEL = 4096


def is_known(manifest: Manifest, parts: Iterable[Part]) -> bool:
    """Whether documents are in a corpus already, in the order in which they would be added."""
    there = {part.digest for segment in manifest.segments for part in segment.parts if part.digest}
    return all(part.digest in there for part in parts)


def split_datastores(items: Iterable[Any]) -> tuple[list[Path], list[Any]]:
    """The paths of datastore files among inputs, and the other inputs."""
    stores: list[Path] = []
    rest = []
    for item in items:
        path = Path(item) if isinstance(item, str | Path) else None
        try:
            with path.open("rb") if path and path.is_file() else ExitStack() as file:
                is_store = file is not None and hasattr(file, "read") and file.read(8) == DATASTORE_MAGIC
        except ValueError:  # no name of a file
            is_store = False
        if is_store and path is not None:
            stores.append(path)
        else:
            rest.append(item)
    return stores, rest


def new_manifest(vocab_size: int, fingerprint: str | None) -> Manifest:
    """The manifest of a corpus without segments, which is written with its first."""
    return Manifest(uuid.uuid4().hex, 0, vocab_size, fingerprint, 0, ())


def _for_tokens(manifest: Manifest | None, found: Found, stores: Sequence[Datastore]) -> Manifest:
    """The manifest that tokens of this kind go into; a new one if there is none.

    Raises:
        VocabularyMismatchError: the corpus is another tokenizer's.
        InvalidArgumentError: an argument is missing or out of range.
    """
    loaded, size = found.tokenizer, found.vocab_size
    if manifest is None:
        prints = {file.fingerprint for store in stores for file in store.info.files}
        if size is None:
            sizes = [loaded.vocab_size] if loaded else [store.vocab_size for store in stores]
            if not sizes:
                raise InvalidArgumentError("give --vocab-size or --tokenizer")
            size = sizes[0]
        if not 1 <= size <= MAX_VOCAB_SIZE:
            raise InvalidArgumentError(f"vocab_size must be between 1 and {MAX_VOCAB_SIZE}, not {size}")
        fingerprint = loaded.fingerprints[0] if loaded else next(iter(prints)) if len(prints) == 1 else None
        manifest = new_manifest(size, fingerprint.hex() if fingerprint else None)
    elif size is not None and size != manifest.vocab_size:
        raise VocabularyMismatchError(
            f"the corpus has a vocabulary of {manifest.vocab_size} tokens, not of {size}"
        )
    if loaded is not None:
        _check_fingerprint(manifest, [print.hex() for print in loaded.fingerprints], loaded.name)
        if loaded.vocab_size > manifest.vocab_size:
            raise VocabularyMismatchError(
                f"{loaded.name} has {loaded.vocab_size} tokens, the corpus {manifest.vocab_size}"
            )
    for store in stores:
        for file in store.info.files:
            _check_store(manifest, store, shown(file.path))
    if found.end_token_id is not None and not 0 <= found.end_token_id < manifest.vocab_size:
        raise InvalidArgumentError(
            f"the end token {found.end_token_id} is outside 0..{manifest.vocab_size - 1}"
        )
    return manifest


def _check_store(manifest: Manifest, store: Datastore, name: str) -> None:
    if store.vocab_size != manifest.vocab_size:
        raise VocabularyMismatchError(
            f"{name} has a vocabulary of {store.vocab_size} tokens, the corpus one of {manifest.vocab_size}"
        )
    for file in store.info.files:
        if file.fingerprint is not None:
            _check_fingerprint(manifest, [file.fingerprint.hex()], name)


def _check_fingerprint(manifest: Manifest, given: list[str], name: str) -> None:
    if manifest.fingerprint is not None and manifest.fingerprint not in given:
        raise VocabularyMismatchError(
            f"the corpus holds tokens of another tokenizer (fingerprint {manifest.fingerprint[:16]}) than "
            f"{name} (fingerprint {given[0][:16]}); make another corpus for it"
        )


def _contents(folder: Folder, manifest: Manifest) -> NDArray[np.uint64]:
    """The hashes of all documents that are not deleted."""
    found = [
        load_table(folder.path, segment)[~load_dead(folder.path, segment), CONTENT]
        for segment in manifest.segments
    ]
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def adopt(
    folder: Folder,
    paths: Sequence[Path] | None,
    origin: Origin,
    limits: Limits,
    *,
    merge: bool,
) -> Added:
    """Takes over the segments of other corpora, and datastore files. What is in the corpus already, by its
    contents, is passed over. ``paths`` None: the shares that the jobs of an array have written.
    """
    shares = paths is None
    paths = _complete_shares(folder.path / SHARDS) if paths is None else sorted(paths)
    manifest = folder.manifest
    documents = tokens = 0
    known = True
    for path in paths:
        manifest, segments = _taken(folder, manifest, path, origin)
        for segment in segments:
            known = False
            documents += segment.documents - segment.dead_documents
            tokens += segment.living
    if manifest is None:
        raise InvalidArgumentError("no segment to adopt was named")
    if not manifest.segments:  # shares without any document
        with Writer(folder, manifest, limits) as writer:
            manifest = with_segment(manifest, writer, [])
    if manifest is not folder.manifest:
        manifest = folder.commit(manifest)
    if merge:
        manifest = settled(folder, manifest, limits)
    if shares:
        shutil.rmtree(folder.path / SHARDS, ignore_errors=True)
    return Added(manifest, documents, tokens, 0, known, ReadReport())


def _taken(
    folder: Folder, manifest: Manifest | None, path: Path, origin: Origin
) -> tuple[Manifest, list[Segment]]:
    """The manifest with the segments at a path, and these."""
    if (path / NAME).exists() or path.is_dir():
        other = load_manifest(path)
        manifest = manifest or new_manifest(other.vocab_size, other.fingerprint)
        if other.vocab_size != manifest.vocab_size:
            raise VocabularyMismatchError(
                f"{shown(path)} has a vocabulary of {other.vocab_size} tokens, the corpus one of "
                f"{manifest.vocab_size}"
            )
        if other.fingerprint is not None:
            _check_fingerprint(manifest, [other.fingerprint], shown(path))
        segments = [segment for segment in other.segments if _is_new(manifest, segment)]
        for segment in segments:
            load_table(path, segment), load_dead(path, segment)
            with open_segment(path, segment) as store:
                store.verify()
            for name in segment.files:
                link(path / name, folder.path / name)
    else:
        manifest, segments = _taken_store(folder, manifest, path, origin)
    for segment in segments:
        placed = replace(segment, written_at=manifest.written + segment.tokens)
        kept = [other for other in manifest.segments if other.documents]
        manifest = after(manifest, [*kept, placed], segment.tokens)
    return manifest, segments


def _taken_store(
    folder: Folder, manifest: Manifest | None, path: Path, origin: Origin
) -> tuple[Manifest, list[Segment]]:
    """The same for a datastore file."""
    store, table = describe(path)
    with store:
        file = store.info.files[0]
        fingerprint = None if file.fingerprint is None else file.fingerprint.hex()
        manifest = manifest or new_manifest(store.vocab_size, fingerprint)
        _check_store(manifest, store, shown(path))
    part = Part(
        origin.source or shown(path)[:_LABEL],
        origin.added,
        len(table),
        int(table[:, LENGTH].sum()),
        digest=digest_of(table[:, CONTENT]),
        metadata=origin.metadata,
    )
    name = folder.save_array(table, ".documents.npy")
    segment = Segment(file.uuid, file.tokens, file.documents, file.file_bytes, 0, name, (part,))
    if not _is_new(manifest, segment):
        return manifest, []
    link(path, folder.path / segment.file)
    return manifest, [segment]


def _is_new(manifest: Manifest, segment: Segment) -> bool:
    same = any(segment.uuid == other.uuid for other in manifest.segments)
    return segment.documents > 0 and not same and not is_known(manifest, segment.parts)


def _complete_shares(folder: Path) -> list[Path]:
    """The folders of all shares, in their order.

    Raises:
        CorpusError: there is none, or one is missing.
    """
    found = {}
    for path in folder.glob("*-of-*"):
        if match := re.fullmatch(r"(\d+)-of-(\d+)", path.name):
            found[int(match[1]), int(match[2])] = path
    counts = {shares for _, shares in found}
    if len(counts) != 1:
        raise CorpusError(
            f"{shown(folder)} has no shares to adopt; `corpus add --shard I/N` writes them"
            if not counts
            else f"{shown(folder)} has shares of several arrays ({', '.join(map(str, sorted(counts)))} jobs)"
        )
    shares = counts.pop()
    missing = [share for share in range(shares) if not (found.get((share, shares), Path()) / NAME).is_file()]
    if missing:
        raise CorpusError(
            f"{shown(folder)}: of {shares} shares these are missing: {', '.join(map(str, missing[:20]))}"
        )
    return [found[share, shares] for share in range(shares)]
