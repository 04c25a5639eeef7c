"""Datastores: a corpus of token documents on disk, how one is built, and whose tokens it holds."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sssd._core import BuildSummary, Datastore, DatastoreBuilder, DatastoreInfo, FileInfo
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
    "FileInfo",
    "build",
    "check_output",
    "check_tokenizer",
    "tokenizer_fingerprint",
]

Progress = Callable[[str, int, int | None], object]
"""Called with "reading" and bytes, then with "indexing" and symbols: how many are done, and of how many if
known.
"""

MAX_VOCAB_SIZE = 1 << 24
"""The most token ids that a datastore can have."""

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096


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


def _reopen(paths: list[Path], load: Literal["mmap", "mmap-wait", "ram"], uuids: list[str]) -> Datastore:
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
    single = isinstance(inputs, str | bytes | os.PathLike | Mapping) or hasattr(inputs, "features")
    report = ReadReport()
    found = find_inputs([inputs] if single else inputs, options, report, output=target)
    builder = DatastoreBuilder(
        target,
        vocab_size=vocab_size,
        fingerprint=loaded.fingerprints[0] if loaded else None,
        deduplicate=deduplicate,
        max_memory=max_memory,
        threads=threads,
    )
    try:
        with ThreadPoolExecutor(1, "sssd-tokenize") as tokenizing:
            work = _Build(builder, loaded, vocab_size, end_token_id, options, report, tokenizing)
            work.read(found, progress or (lambda *_: None))
        if not work.tokens:
            reasons = "; ".join(report.notes()) or "they are empty"
            raise EmptyCorpusError(f"no document in the inputs ({len(found)}): {reasons}")
        check_output(Path(output), force=force)
        indexed = None if progress is None else lambda done, total: progress("indexing", done, total)
        return Built(target, builder.finish(indexed), report)
    finally:
        builder.close()


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


class _Build:
    """One build: inputs in, documents added."""

    def __init__(
        self,
        builder: DatastoreBuilder,
        tokenizer: LoadedTokenizer | None,
        vocab_size: int,
        end_token_id: int | None,
        options: ReadOptions,
        report: ReadReport,
        tokenizing: Executor,
    ) -> None:
        self.builder, self.tokenizer, self.vocab_size = builder, tokenizer, vocab_size
        self.end_token_id, self.options = end_token_id, options
        self.records = Records(options, report, tokenizer.template if tokenizer else None)
        self.report, self.bad = report, report.bad_record(options)
        self.tokens = 0
        self._waiting: list[tuple[str, Content]] = []
        self._characters = 0
        self._executor = tokenizing
        self._tokenizing: tuple[list[tuple[str, Content]], Future[list[list[int]]]] | None = None

    def read(self, inputs: list[Input], progress: Progress) -> None:
        """Adds the documents of all inputs. Where bad records are skipped, so is the rest of a bad file."""
        sizes = [input.size for input in inputs]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        before = 0
        for input in inputs:
            pieces = read(
                input,
                self.options,
                self.report,
                self.records.documents,
                wanted=self.records.wanted,
                vocab_size=self.vocab_size,
            )
            for source, place, piece in pieces:
                if isinstance(piece, Stretch):
                    self._add_stretch(place, piece)
                else:
                    self._wait(place, piece)
                progress("reading", before + source.position(), total)
            self._add_waiting()
            self._add_waiting()  # those before, and those
            self.builder.end_stream()
            before += input.size or 0
            progress("reading", before, total)

    def _add_stretch(self, place: str, piece: Stretch) -> None:
        if self.end_token_id is None:
            raise InvalidArgumentError(f"{place}: --end-token must tell where documents end in token arrays")
        self.builder.add_stream(piece.ids, self.end_token_id)
        self.tokens += len(piece.ids)

    def _wait(self, place: str, document: Content) -> None:
        """Texts go to the tokenizer in batches."""
        if isinstance(document, str):
            if self.tokenizer is None:
                raise InvalidArgumentError(f"{place}: the corpus is text; give --tokenizer")
            self._characters += len(document)
        self._waiting.append((place, document))
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

    def _tokenize(self, documents: list[tuple[str, Content]]) -> Future[list[list[int]]]:
        texts = [document for _, document in documents if isinstance(document, str)]
        if self.tokenizer and texts:
            with suppress(RuntimeError):  # no thread is to be had
                return self._executor.submit(self.tokenizer.encode_batch, texts)
        done: Future[list[list[int]]] = Future()
        done.set_result(self.tokenizer.encode_batch(texts) if self.tokenizer and texts else [])
        return done

    def _add_tokenized(
        self, documents: list[tuple[str, Content]], ids_of_texts: Future[list[list[int]]]
    ) -> None:
        encoded = iter(ids_of_texts.result())
        end = [] if self.end_token_id is None else [self.end_token_id]
        for place, document in documents:
            ids = np.asarray([*next(encoded), *end] if isinstance(document, str) else document, np.int64)
            try:
                self.builder.add(ids)
            except InvalidTokenError as error:
                self.bad(CorpusError(f"{place}: {error}"))
            else:
                self.tokens += len(ids)
