"""``python -m sssd build``: builds a datastore from corpus files."""

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sssd.datastore import (
    FORMATS,
    CorpusError,
    DatastoreBuilder,
    Document,
    corpus_files,
    corpus_format,
    read_documents,
    read_tokens,
    tokenizer_fingerprint,
)
from sssd.errors import InvalidArgumentError, InvalidTokenError

_BATCH_CHARACTERS = 1 << 20
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Builds a datastore from JSON Lines and text (also .gz, .xz, .zst), Parquet, Arrow, .npy and .bin "
        "token arrays, and folders of these. OUT is replaced in one step at the end; an interrupted build "
        "leaves it as it was."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the datastore file to write or replace")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="corpus file or folder")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or its folder, for text")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="number of token ids; by the tokenizer if left out"
    )
    parser.add_argument(
        "--end-token",
        type=int,
        metavar="ID",
        help="where documents end in token arrays; appended to every document that is text",
    )
    parser.add_argument("--field", help="JSON member or column that holds the document")
    parser.add_argument("--format", choices=FORMATS, help="format of all inputs; by their names if left out")
    parser.add_argument(
        "--dtype", choices=("uint16", "uint32", "int32", "int64"), help="type of ids in .bin files"
    )
    parser.add_argument("--deduplicate", action="store_true", help="leave out repeated documents")
    parser.add_argument(
        "--max-memory", type=_size, metavar="SIZE", help="bound of the builder's memory, e.g. 4G"
    )


def run(arguments: argparse.Namespace) -> None:
    """Builds the datastore, with a progress bar on stderr, and prints what was built."""
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    vocab_size = arguments.vocab_size
    if vocab_size is None:
        if tokenizer is None:
            raise InvalidArgumentError("give --vocab-size or --tokenizer")
        vocab_size = 1 + max(tokenizer.get_vocab().values())
    builder = DatastoreBuilder(
        arguments.out,
        vocab_size=vocab_size,
        fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None,
        deduplicate=arguments.deduplicate,
        max_memory=arguments.max_memory,
    )
    files = [file for path in arguments.inputs for file in corpus_files(path)]
    console = Console(stderr=True)
    with contextlib.closing(builder):
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("reading", total=sum(file.stat().st_size for file in files))
            for file in files:
                _add_file(builder, file, arguments, tokenizer, vocab_size, progress, task)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("indexing")
            summary = builder.finish(lambda done, total: progress.update(task, completed=done, total=total))
    duplicates = f", {summary.duplicates:,} duplicates left out" if arguments.deduplicate else ""
    Console().print(
        f"{arguments.out}: {summary.tokens:,} tokens in {summary.documents:,} documents{duplicates}, "
        f"{summary.segments} segments, {summary.file_bytes:,} bytes",
        highlight=False,
        soft_wrap=True,
    )


def _add_file(
    builder: DatastoreBuilder,
    path: Path,
    arguments: argparse.Namespace,
    tokenizer: Any,
    vocab_size: int,
    progress: Progress,
    task: Any,
) -> None:
    before = progress.tasks[0].completed
    format = arguments.format or corpus_format(path)
    with path.open("rb") as file:
        if format in ("npy", "bin"):
            if arguments.end_token is None:
                raise InvalidArgumentError(
                    f"{path}: --end-token must tell where documents end in token arrays"
                )
            dtype = arguments.dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")
            pieces: Iterator[Any] = read_tokens(file, str(path), format=format, dtype=dtype)
            add = partial(builder.add_stream, end_token_id=arguments.end_token)
        else:
            documents = read_documents(file, str(path), format=format, field=arguments.field)
            pieces = _tokenized(documents, path, tokenizer, arguments.end_token)
            add = partial(builder.add)
        for piece in pieces:
            try:
                add(piece)
            except InvalidTokenError as error:
                raise CorpusError(f"{path}: {error}") from None
            progress.update(task, completed=before + file.tell())
        builder.end_stream()
    progress.update(task, completed=before + path.stat().st_size)


def load_tokenizer(path: str) -> Any:
    """The ``tokenizers.Tokenizer`` of a tokenizer.json or of the folder that holds it."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InvalidArgumentError("--tokenizer needs tokenizers: pip install 'sssd[corpus]'") from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InvalidArgumentError(f"no tokenizer.json at {path}")
    return Tokenizer.from_file(str(file))


def _tokenized(
    documents: Iterator[Document], path: Path, tokenizer: Any, end_token: int | None
) -> Iterator[list[int] | NDArray[np.int64]]:
    """Token ids of each document; texts go to the tokenizer in batches."""
    end = [] if end_token is None else [end_token]
    for is_text, group in itertools.groupby(documents, key=lambda document: isinstance(document, str)):
        if not is_text:
            yield from cast(Iterator[NDArray[np.int64]], group)
        elif tokenizer is None:
            raise InvalidArgumentError(f"{path}: the corpus is text; give --tokenizer")
        for batch in _batches(group) if is_text else ():
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids + end


def _batches(texts: Iterator[Any]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(text: str) -> int:
    """Bytes, from a number with an optional K, M or G (powers of 1024)."""
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if unit > 1 else text) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 4G, got {text!r}") from None
