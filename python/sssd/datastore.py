"""Datastores: a corpus of token documents on disk, how one is built, and whose tokens it holds."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sssd._core import (
    BuildSummary,
    Datastore,
    DatastoreBuilder,
    DatastoreInfo,
    Documents,
    FileInfo,
    write_tombstones,
)
from sssd.errors import (
    CorpusError,
    DatastoreChangedError,
    EmptyCorpusError,
    InvalidArgumentError,
    InvalidTokenError,
    OutputError,
    VocabularyMismatchError,
)
from sssd.reading.inputs import DATASTORE_MAGIC, Input, find_inputs
from sssd.reading.options import ReadOptions, ReadReport, shown
from sssd.reading.reader import Stretch, read
from sssd.reading.records import Content, Records
from sssd.reading.tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_fingerprint

__all__ = [
    "BuildSummary",
    "Built",
    "CorpusError",
    "Datastore",
    "DatastoreBuilder",
    "DatastoreInfo",
    "Documents",
    "FileInfo",
    "build",
    "check_output",
    "check_tokenizer",
    "tokenizer_fingerprint",
    "write_tombstones",
]

Progress = Callable[[str, int, int | None], object]
"""Called with "reading" and bytes, then with "indexing" and symbols: how many are done, and of how many if
known.
"""

MAX_VOCAB_SIZE = 1 << 24
"""The most token ids that a datastore can have."""

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096

_Waiting = tuple[str, Content, tuple[str | int, ...]]
"""Place, document and id."""


@dataclass(frozen=True)
class Built:
    """What :func:`build` has written.

    Attributes:
        path: the file.
        summary: tokens, documents and the like.
        report: what was left out, skipped or changed.
    """

    path: Path
    summary: BuildSummary
    report: ReadReport


def _reopen(
    paths: list[Path],
    load: Literal["mmap", "mmap-wait", "ram"],
    uuids: list[str],
    tombstones: list[Path | None] | None = None,
    domains: list[list[tuple[int, int, int]]] | None = None,
) -> Datastore:
    """The datastore of a pickle: the same files, by their contents."""
    store = Datastore.open(paths, load=load, tombstones=tombstones, domains=domains)
    for path, file, uuid in zip(paths, store.info.files, uuids, strict=True):
        if file.uuid != uuid:
            store.close()
            raise DatastoreChangedError(
                f"{path}: another datastore than the one that was pickled or copied (UUID {file.uuid}, "
                f"not {uuid}); put that one back, or open this one by its path"
            )
    return store


def build(
    inputs: Any,
    output: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    chat_template: str | None = None,
    vocab_size: int | None = None,
    end_token_id: int | None = None,
    options: ReadOptions | None = None,
    deduplicate: bool = False,
    max_memory: int | None = None,
    ranking: bool | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Builds a datastore from a corpus, all that ``python -m sssd build`` does. ``docs/reading.md`` has the
    formats.

    Args:
        inputs: a file, folder, pattern, URL, "-" for standard input, ``datasets`` dataset or list of
            records; or a list of these.
        output: the file to write. Appears at the end; an interrupted build leaves what was there.
        tokenizer: for text: a tokenizer.json, its folder, or a tokenizer of tokenizers or transformers.
        chat_template: file of a chat template, or "none"; by default the tokenizer's.
        vocab_size: number of token ids; the tokenizer's if None.
        end_token_id: ends documents in token arrays; appended to every document that is text.
        options: how inputs are read.
        deduplicate: leave out repeated documents.
        max_memory: bound of the builder's memory, bytes.
        ranking: learn tables by which drafts rank candidates, about 4 us a token of one core; if None, where
            the text has 2^23 tokens or more and ``max_memory`` has room for it.
        threads: threads that sort; the number of cores, at most 8, if None. The file does not depend on it.
        force: replace ``output`` if it is a datastore. What is none is never replaced.
        progress: see :data:`Progress`.

    Raises:
        OutputError: ``output`` may not be replaced.
        CorpusError: an input cannot be read; the message names file, line and field.
        EmptyCorpusError: there is no document.
        InvalidArgumentError: an argument is out of range or missing, or a package is not installed.
        OSError: a file cannot be read or written.
    """
    options = options or ReadOptions()
    target = check_output(Path(output), force=force)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer, chat_template)
    if vocab_size is None:
        if loaded is None:
            raise InvalidArgumentError("give --vocab-size or --tokenizer")
        vocab_size = loaded.vocab_size
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise InvalidArgumentError(f"vocab_size must be between 1 and {MAX_VOCAB_SIZE}, not {vocab_size}")
    if max_memory is not None and not 0 < max_memory < 1 << 63:
        raise InvalidArgumentError(f"max_memory must be a number of bytes, not {max_memory}")
    if end_token_id is not None and not 0 <= end_token_id < vocab_size:
        raise InvalidArgumentError(f"the end token {end_token_id} is outside 0..{vocab_size - 1}")
    report = ReadReport()
    found = find_inputs(as_items(inputs), options, report, output=target)
    builder = DatastoreBuilder(
        target,
        vocab_size=vocab_size,
        fingerprint=loaded.fingerprints[0] if loaded else None,
        deduplicate=deduplicate,
        max_memory=max_memory,
        ranking=ranking,
        threads=threads,
    )
    try:
        work = Reading(builder, loaded, vocab_size, end_token_id, options, report)
        work.read(found, progress or (lambda *_: None))
        if not work.tokens and options.shard is None:
            raise no_document(len(found), report)
        check_output(Path(output), force=force)
        indexed = None if progress is None else lambda done, total: progress("indexing", done, total)
        return Built(target, builder.finish(indexed), report)
    finally:
        builder.close()


def as_items(inputs: Any) -> Iterable[Any]:
    """One or several inputs, as several."""
    single = isinstance(inputs, str | bytes | os.PathLike | Mapping) or hasattr(inputs, "features")
    return [inputs] if single else inputs


def no_document(inputs: int, report: ReadReport) -> EmptyCorpusError:
    """The error for inputs that hold no document, with the reasons."""
    reasons = "; ".join(report.notes()) or "they are empty"
    return EmptyCorpusError(f"no document in the inputs ({inputs}): {reasons}")


def check_output(path: Path, *, force: bool) -> Path:
    """The file that a build to ``path`` writes: itself, or what it links to.

    Raises:
        OutputError: there is something that is no datastore, or a datastore and not ``force``.
    """
    if path == Path("-"):
        raise OutputError("a datastore cannot be written to standard output; give the name of a file")
    target = Path(os.path.realpath(path))
    if not target.exists():
        return target
    if not target.is_file():
        raise OutputError(f"{shown(path)} is a folder or device; give the name of a file to write")
    with target.open("rb") as file:
        if file.read(len(DATASTORE_MAGIC)) != DATASTORE_MAGIC:
            raise OutputError(
                f"{shown(path)} is there and no datastore, so it is not replaced; choose another name"
            )
    if not force:
        raise OutputError(f"{shown(path)} is there already; --force (force=True) replaces it")
    return target


def check_tokenizer(store: Datastore, tokenizer: Any) -> None:
    """Refuses a store whose tokens are another tokenizer's. Files that do not say whose they are are not
    compared.

    Args:
        store: an open datastore.
        tokenizer: what :func:`build` takes.

    Raises:
        VocabularyMismatchError: names both.
    """
    loaded = load_tokenizer(tokenizer, "none")
    for file in store.info.files:
        if file.fingerprint is not None and file.fingerprint not in loaded.fingerprints:
            built, given = file.fingerprint.hex()[:16], loaded.fingerprints[0].hex()[:16]
            raise VocabularyMismatchError(
                f"{shown(file.path)} was built with another tokenizer (fingerprint {built}) than "
                f"{loaded.name} (fingerprint {given}); build it with this one, or use it all the same with "
                "--any-tokenizer (check_tokenizer=False)"
            )


class Sink(Protocol):
    """What documents are read into: a ``DatastoreBuilder``, or what stands before one."""

    def add(self, ids: Any) -> None:
        """Takes a document, int [n]."""

    def add_stream(self, ids: Any, end_token_id: int) -> None:
        """Takes a stretch of a stream, int [n], whose documents end with ``end_token_id``."""

    def end_stream(self) -> None:
        """Ends the document that ``add_stream`` has left open."""


class Reading:
    """Documents of inputs on their way: read, tokenized in batches, handed to a sink.

    Args:
        sink: where they go. Its ``add`` gets the document's id as well if there is an ``id_field``.
        tokenizer: for text.
        vocab_size: number of token ids.
        end_token_id: ends documents in token arrays; appended to every document that is text.
        options: how inputs are read.
        report: takes note of what is skipped.
        id_field: member of each record that is the id of its documents.
    """

    def __init__(
        self,
        sink: Sink,
        tokenizer: LoadedTokenizer | None,
        vocab_size: int,
        end_token_id: int | None,
        options: ReadOptions,
        report: ReadReport,
        id_field: str | None = None,
    ) -> None:
        self.sink, self.tokenizer, self.vocab_size = sink, tokenizer, vocab_size
        self.end_token_id, self.options, self.id_field = end_token_id, options, id_field
        self.records = Records(options, report, tokenizer.template if tokenizer else None)
        self.report, self.bad = report, report.bad_record(options)
        self.tokens = 0
        self._waiting: list[_Waiting] = []
        self._characters = 0
        self._tokenizing: tuple[list[_Waiting], Future[list[list[int]]]] | None = None

    def read(
        self,
        inputs: list[Input],
        progress: Progress,
        started: Callable[[Input], object] = lambda _: None,
    ) -> None:
        """Adds the documents of all inputs, and calls ``started`` before each. Where bad records are skipped,
        so is the rest of a bad file.
        """
        with ThreadPoolExecutor(1, "sssd-tokenize") as self._executor:
            self._read(inputs, progress, started)

    def _read(self, inputs: list[Input], progress: Progress, started: Callable[[Input], object]) -> None:
        sizes = [input.size for input in inputs]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        before = 0
        wanted = self.records.wanted | ({self.id_field} if self.id_field else set())
        for input in inputs:
            started(input)
            pieces = read(
                input, self.options, self.report, self._documents, wanted=wanted, vocab_size=self.vocab_size
            )
            share = _Share(input.shard)
            for source, place, piece in pieces:
                if isinstance(piece, Stretch):
                    self._add_stretch(place, piece, share)
                else:
                    self._wait(place, *piece)
                progress("reading", before + source.position(), total)
            self._add_waiting()
            self._add_waiting()  # those before, and those
            self.sink.end_stream()
            before += input.size or 0
            progress("reading", before, total)

    def _documents(self, record: Any, place: str) -> list[tuple[Content, tuple[str | int, ...]]]:
        """The documents of a record, each with its id if records have one."""
        found = self.records.documents(record, place)
        if self.id_field is None:
            return [(document, ()) for document in found]
        document_id = record.get(self.id_field) if isinstance(record, Mapping) else None
        if not isinstance(document_id, str | int) or isinstance(document_id, bool):
            raise CorpusError(f"{place}: field {self.id_field!r} must be an id: a text or an integer")
        return [(document, (document_id,)) for document in found]

    def _add_stretch(self, place: str, piece: Stretch, share: "_Share") -> None:
        if self.end_token_id is None:
            raise InvalidArgumentError(f"{place}: --end-token must tell where documents end in token arrays")
        if self.id_field is not None:
            raise InvalidArgumentError(f"{place}: token arrays have no field {self.id_field!r}")
        ids = share.of(piece.ids, self.end_token_id)
        self.sink.add_stream(ids, self.end_token_id)
        self.tokens += len(ids)

    def _wait(self, place: str, document: Content, document_id: tuple[str | int, ...]) -> None:
        """Texts go to the tokenizer in batches."""
        if isinstance(document, str):
            if self.tokenizer is None:
                raise InvalidArgumentError(f"{place}: the corpus is text; give --tokenizer")
            self._characters += len(document)
        self._waiting.append((place, document, document_id))
        if self._characters >= _BATCH_CHARACTERS or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Has the documents that wait tokenized while the next are read, and adds those before them."""
        before, self._tokenizing = self._tokenizing, None
        if self._waiting:
            self._tokenizing = self._waiting, self._tokenize(self._waiting)
        self._waiting, self._characters = [], 0
        if before is not None:
            self._add_tokenized(*before)

    def _tokenize(self, documents: list[_Waiting]) -> Future[list[list[int]]]:
        texts = [document for _, document, _ in documents if isinstance(document, str)]
        if self.tokenizer and texts:
            with suppress(RuntimeError):  # no thread is to be had
                return self._executor.submit(self.tokenizer.encode_batch, texts)
        done: Future[list[list[int]]] = Future()
        done.set_result(self.tokenizer.encode_batch(texts) if self.tokenizer and texts else [])
        return done

    def _add_tokenized(self, documents: list[_Waiting], ids_of_texts: Future[list[list[int]]]) -> None:
        encoded = iter(ids_of_texts.result())
        end = [] if self.end_token_id is None else [self.end_token_id]
        for place, document, document_id in documents:
            ids = np.asarray([*next(encoded), *end] if isinstance(document, str) else document, np.int64)
            try:
                self.sink.add(ids, *document_id)
            except InvalidTokenError as error:
                self.bad(CorpusError(f"{place}: {error}"))
            else:
                self.tokens += len(ids)


class _Share:
    """Every n-th document of a stream."""

    def __init__(self, shard: tuple[int, int] | None) -> None:
        self._shard, self._before = shard, 0

    def of(self, ids: NDArray[Any], end_token_id: int) -> NDArray[Any]:
        """The tokens of a stretch that are of such documents."""
        if self._shard is None:
            return ids
        ends = np.cumsum(ids == end_token_id)
        documents = self._before + ends - (ids == end_token_id)
        self._before += int(ends[-1]) if len(ends) else 0
        mine: NDArray[Any] = ids[documents % self._shard[1] == self._shard[0]]
        return mine
