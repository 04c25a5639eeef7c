"""``python -m sssd build``: builds a datastore from corpus files."""

import argparse
import os
import shlex
from pathlib import Path

from rich.console import Console

from sssd.cli.arguments import add_build_arguments, at_least, read_options
from sssd.cli.output import build_progress, notes
from sssd.datastore import Built, build, check_output
from sssd.errors import OutputError, UsageError
from sssd.reading.options import shown


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
        "inputs", nargs="+", metavar="INPUT", help="file, folder, pattern or URL, - for standard input"
    )
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
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Builds the datastore, with a progress bar and notes on stderr, and prints what was built."""
    if arguments.output is None:
        raise UsageError(_old_order(arguments.inputs))
    with build_progress(quiet=arguments.quiet) as show:
        built = build(
            arguments.inputs,
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
