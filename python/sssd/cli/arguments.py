"""Arguments that several commands share."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sssd._core import MAX_NODES, Datastore
from sssd.datastore import check_tokenizer
from sssd.errors import UsageError
from sssd.mini import MINI, mini_store
from sssd.reading.options import DTYPES, FORMATS, ReadOptions

_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says how inputs are read; :func:`read_options` takes it."""
    reading = parser.add_argument_group("reading (docs/reading.md)")
    reading.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer.json or the model's folder, for text and chats"
    )
    reading.add_argument(
        "--chat-template", metavar="FILE", help="file of a chat template, or none (default: the tokenizer's)"
    )
    reading.add_argument(
        "--format", choices=FORMATS, help="format of all inputs (default: by name and contents)"
    )
    reading.add_argument(
        "--encoding", metavar="NAME", help="of text, JSON and CSV, e.g. utf-16 (default: UTF-8)"
    )
    fields = (
        ("--field", "the document, in any form"),
        ("--text-field", "the document, as text"),
        ("--ids-field", "the document, as token ids"),
        ("--messages-field", "the chat, as a list of messages"),
        ("--prompt-field", "the prompt: text, token ids or messages"),
        ("--response-field", "the response to it"),
    )
    for name, what in fields:
        reading.add_argument(name, metavar="NAME", help=f"field or column that holds {what}")
    reading.add_argument(
        "--answer-role",
        action="append",
        default=[],
        metavar="ROLE",
        help="role whose messages are the model's; repeatable (default: all but those known as others')",
    )
    for name, what in (
        ("--include", "read only files that match"),
        ("--exclude", "leave out files that match"),
    ):
        reading.add_argument(
            name,
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"in folders, {what}, e.g. '*.jsonl'; repeatable",
        )
    reading.add_argument(
        "--skip-bad", action="store_true", help="skip what cannot be read, and count it, instead of stopping"
    )
    reading.add_argument("--quiet", action="store_true", help="print no progress and no notes")


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """What :func:`add_reading_arguments` was given.

    Raises:
        InvalidArgumentError: arguments that do not go together.
    """
    names = ("format", "field", "text_field", "ids_field", "messages_field", "prompt_field", "response_field")
    return ReadOptions(
        **{name: getattr(arguments, name) for name in names},
        answer_roles=tuple(arguments.answer_role),
        chats=getattr(arguments, "chats", "answers"),
        dtype=getattr(arguments, "dtype", None),
        encoding=arguments.encoding,
        include=tuple(arguments.include),
        exclude=tuple(arguments.exclude),
        skip_bad=arguments.skip_bad,
        shard=getattr(arguments, "shard", None),
    )


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says how documents are made of inputs and sorted, with :func:`add_reading_arguments`."""
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="number of token ids (default: the tokenizer's)"
    )
    parser.add_argument(
        "--end-token",
        type=int,
        metavar="ID",
        help="where documents end in token arrays; appended to every document that is text",
    )
    parser.add_argument(
        "--chats",
        choices=("answers", "whole"),
        default="answers",
        help="of a chat take each answer, or the whole as one document (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="take share I, from 0 on, of N: of the files, or of the records where files are fewer",
    )
    add_memory_argument(parser)
    add_dtype_argument(parser)
    add_reading_arguments(parser)


def add_selection_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds what says which documents are taken."""
    selection = parser.add_argument_group("selection (docs/mini.md)")
    selection.add_argument(
        "--take", type=at_least(1), required=required, metavar="N", help="take documents of at most N tokens"
    )
    selection.add_argument(
        "--by",
        choices=("source", "cluster", "traffic"),
        default="source",
        help="in equal shares of the inputs, or of clusters of like documents; or by what helps --traffic "
        "(default: %(default)s)",
    )
    selection.add_argument(
        "--traffic", action="append", default=[], metavar="TRACE", help="requests, as for replay; repeatable"
    )


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the bound of a builder's memory."""
    parser.add_argument(
        "--max-memory", type=_size, metavar="SIZE", help="bound of the builder's memory, e.g. 4G"
    )


def _shard(text: str) -> tuple[int, int]:
    share, _, shares = text.partition("/")
    if not (share.isdecimal() and shares.isdecimal() and int(share) < int(shares)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(share), int(shares)


def _size(text: str) -> int:
    """Bytes, from a number with an optional K, M or G (powers of 1024)."""
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 4G, got {text!r}") from None


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Adds what says how .bin files are read."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of ids in .bin files (default: by the vocabulary)"
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what commands that replay traces take."""
    parser.add_argument(
        "traces",
        nargs="+",
        metavar="TRACE",
        help="file, folder, pattern or URL with requests, - for standard input",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--end-token-id", type=int, action="append", metavar="ID", help="draft nothing after this"
    )
    add_datastore_arguments(parser, "none")
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="take the first N requests of each file (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def add_datastore_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds what :func:`open_datastore` takes."""
    parser.add_argument(
        "--datastore",
        action="append",
        metavar="FILE",
        help="datastore file or corpus, repeatable; mini for the mini store (docs/mini.md), none for none "
        f"(default: {default})",
    )
    add_any_tokenizer_argument(parser)


def add_any_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Adds what lets a store of another tokenizer pass."""
    parser.add_argument(
        "--any-tokenizer", action="store_true", help="use datastores that were built with another tokenizer"
    )


def open_datastore(
    names: Sequence[str | Path] | None, tokenizer: Any, any_tokenizer: bool
) -> Datastore | None:
    """The store of these files, or the mini store; None without any.

    Raises:
        UsageError: the mini store stands beside files, or is asked for without a tokenizer.
        VocabularyMismatchError: it was built with another tokenizer, and that is not to be overlooked.
    """
    if not names or list(names) == ["none"]:
        return None
    if MINI in names or "none" in names:
        if len(names) > 1:
            raise UsageError("--datastore mini, or none, stands alone; a file of that name is ./mini")
        if tokenizer is None:
            raise UsageError("the mini store is text; give --tokenizer")
        names = [str(mini_store(tokenizer))]
    # figures are to depend on the files alone
    store = Datastore.open([Path(name) for name in names], load="mmap-wait")
    if tokenizer is not None and not any_tokenizer:
        check_tokenizer(store, tokenizer)
    return store


def at_least(least: int) -> Callable[[str], int]:
    """A type of arguments: integers from ``least`` on."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def above_zero(most: float = float("inf")) -> Callable[[str], float]:
    """A type of arguments: finite numbers above zero, at most ``most``."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (0 < value < float("inf") and value <= most):
            limit = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be above 0{limit}, got {text}")
        return value

    return number


def budgets(text: str) -> list[int]:
    """Node budgets separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None
    if not all(0 <= value <= MAX_NODES for value in values):
        raise argparse.ArgumentTypeError(f"budgets must be between 0 and {MAX_NODES}")
    return values
