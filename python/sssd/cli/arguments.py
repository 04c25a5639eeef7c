"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sssd._core import MAX_NODES, Datastore
from sssd.datastore import check_tokenizer
from sssd.reading.options import DTYPES, FORMATS, ReadOptions


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
    )


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
    parser.add_argument(
        "--datastore", type=Path, action="append", metavar="FILE", help="datastore file; repeatable"
    )
    add_any_tokenizer_argument(parser)
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="take the first N requests of each file (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def add_any_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Adds what lets a store of another tokenizer pass."""
    parser.add_argument(
        "--any-tokenizer", action="store_true", help="use datastores that were built with another tokenizer"
    )


def open_datastore(paths: list[Path] | None, tokenizer: Any, any_tokenizer: bool) -> Datastore | None:
    """The store of these files, None without any.

    Raises:
        VocabularyMismatchError: it was built with another tokenizer, and that is not to be overlooked.
    """
    if not paths:
        return None
    store = Datastore.open(paths)
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


def budgets(text: str) -> list[int]:
    """Node budgets separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None
    if not all(0 <= value <= MAX_NODES for value in values):
        raise argparse.ArgumentTypeError(f"budgets must be between 0 and {MAX_NODES}")
    return values
