"""``python -m sssd build``: builds a datastore from corpus files."""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from sssd.cli.arguments import add_build_arguments, add_selection_arguments, at_least, read_options
from sssd.cli.output import build_progress, notes
from sssd.corpus.select import Document, select
from sssd.datastore import Built, build, check_output
from sssd.errors import OutputError, UsageError
from sssd.mini import records
from sssd.reading.options import ReadReport, shown
from sssd.reading.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Builds a datastore from JSON, JSON Lines, CSV and text (also compressed), Parquet, Arrow, .npy "
        "and .bin token arrays, chats, folders of these, and standard input. OUT appears in one step at "
        "the end; an interrupted build leaves what was there. What is no datastore is never replaced. "
        "Exit code 2 if the inputs hold no document."
    )
    parser.add_argument("-o", "--output", metavar="OUT", help="the datastore file to write")
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="file, folder, pattern or URL, - for standard input"
    )
    parser.add_argument("--mini", action="store_true", help="add the text of the mini store (docs/mini.md)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a datastore")
    parser.add_argument("--deduplicate", action="store_true", help="leave out repeated documents")
    parser.add_argument(
        "--ranking",
        action=argparse.BooleanOptionalAction,
        help="learn tables by which drafts rank candidates, some 4 us a token (default: from 2^23 tokens on)",
    )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="threads that sort (default: the number of cores, at most 8); the file does not depend on it",
    )
    add_selection_arguments(parser)
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Builds the datastore, with a progress bar and notes on stderr, and prints what was built."""
    if not arguments.inputs and not arguments.mini:
        raise UsageError("give inputs, or --mini")
    if arguments.output is None:
        raise UsageError(
            _old_order(arguments.inputs) if arguments.inputs else "give the file to write with -o"
        )
    inputs: list[Any] = list(arguments.inputs)
    if arguments.mini:
        inputs.append(records())
        if arguments.tokenizer is not None and arguments.end_token is None:  # as in the cache
            arguments.end_token = load_tokenizer(arguments.tokenizer, "none").end_token_id
    if arguments.take is not None:
        check_output(Path(arguments.output), force=arguments.force)
        inputs = [[{"input_ids": document.ids} for document in selected(arguments, inputs)]]
    with build_progress(quiet=arguments.quiet) as show:
        built = build(
            inputs,
            arguments.output,
            tokenizer=arguments.tokenizer,
            chat_template=arguments.chat_template,
            vocab_size=arguments.vocab_size,
            end_token_id=arguments.end_token,
            options=read_options(arguments),
            deduplicate=arguments.deduplicate,
            max_memory=arguments.max_memory,
            ranking=arguments.ranking,
            threads=arguments.threads,
            force=arguments.force,
            progress=show,
        )
    if not arguments.quiet:
        notes(built.report)
    Console().print(_summary(built, arguments.output), highlight=False, soft_wrap=True, markup=False)


def selected(arguments: argparse.Namespace, inputs: list[Any]) -> list[Document]:
    """The documents of inputs that the arguments select."""
    report = ReadReport()
    documents = select(
        inputs,
        arguments.take,
        by=arguments.by,
        traffic=arguments.traffic,
        tokenizer=arguments.tokenizer,
        chat_template=arguments.chat_template,
        vocab_size=arguments.vocab_size,
        end_token_id=arguments.end_token,
        options=read_options(arguments),
        report=report,
    )
    if not arguments.quiet:
        notes(report)
    return documents


def _summary(built: Built, output: str) -> str:
    summary = built.summary
    duplicates = f", {summary.duplicates:,} duplicates left out" if summary.duplicates else ""
    skipped = f", {built.report.bad:,} bad records skipped" if built.report.bad else ""
    return (
        f"{shown(Path(output))}: {summary.tokens:,} tokens in {summary.documents:,} documents"
        f"{duplicates}{skipped}, {summary.segments} segments, {summary.file_bytes:,} bytes"
    )


def _old_order(inputs: list[str]) -> str:
    """What to write instead of OUT INPUT..., if that may be meant."""
    start = "give the file to write with -o; it used to be the first argument"
    output, rest, force = inputs[0], inputs[1:], ""
    if rest and _is_datastore(output):
        force = " --force"
    elif not rest or os.path.exists(output):
        output, rest = "OUT", inputs
    return f"{start}: python -m sssd build -o {shlex.join([output, *rest])}{force} ..."


def _is_datastore(path: str) -> bool:
    try:
        check_output(Path(path), force=True)
    except (OutputError, OSError):
        return False
    return os.path.isfile(path)
