"""``python -m sssd query``: what follows a text in a datastore."""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from sssd.cli.arguments import add_any_tokenizer_argument, open_datastore
from sssd.errors import InvalidArgumentError
from sssd.reading.tokenizer import load_tokenizer

_SHOWN_LENGTHS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="datastore file or corpus")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--ids", type=_ids, metavar="IDS", help="token ids separated by commas")
    query.add_argument("--text", help="text, with --tokenizer")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer.json or its folder; also decodes what is shown"
    )
    add_any_tokenizer_argument(parser)
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="occurrences that the tree counts"
    )
    parser.add_argument("--depth", type=int, default=6, metavar="N", help="tokens below the query")
    parser.add_argument("--width", type=int, default=4, metavar="N", help="children shown of a node")


def run(arguments: argparse.Namespace) -> None:
    """Prints the occurrences of each suffix of the query, and what follows the longest that occurs."""
    tokenizer = load_tokenizer(arguments.tokenizer, "none") if arguments.tokenizer else None
    ids = arguments.ids
    if arguments.text is not None:
        if tokenizer is None:
            raise InvalidArgumentError("--text needs --tokenizer")
        try:
            arguments.text.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError("--text is not UTF-8") from None
        ids = tokenizer.encode(arguments.text)
    if not ids:
        raise InvalidArgumentError("the query has no tokens")

    def show(tokens: list[int]) -> str:
        shown = " ".join(map(str, tokens))
        if tokenizer:
            shown += f"  {tokenizer.decode(tokens)!r}"
        return str(escape(shown))

    console = Console()
    if arguments.text is not None:
        console.print(f"{len(ids)} tokens: {' '.join(map(str, ids))}", highlight=False, soft_wrap=True)
    store = open_datastore(arguments.files, tokenizer, arguments.any_tokenizer)
    assert store is not None
    with store:
        suffixes = [ids[-length:] for length in range(min(len(ids), _SHOWN_LENGTHS), 0, -1)]
        counts = [store.count(suffix) for suffix in suffixes]
        table = Table("length", "occurrences", "tokens")
        for suffix, count in zip(suffixes, counts, strict=True):
            table.add_row(str(len(suffix)), f"{count:,}", show(suffix))
        console.print(table)
        longest = next((suffix for suffix, count in zip(suffixes, counts, strict=True) if count), None)
        if longest is None:
            return
        samples = store.continuations(longest, limit=arguments.samples, max_tokens=arguments.depth)
    tree = Tree(f"{show(longest)} ({len(samples)} samples)")
    _grow(tree, samples, arguments.width, show)
    console.print(tree)


def _grow(tree: Tree, samples: list[NDArray[np.int32]], width: int, show: Callable[[list[int]], str]) -> None:
    """Hangs the most frequent first tokens below a node, and what follows them below these."""
    for token, count in Counter(int(sample[0]) for sample in samples if len(sample)).most_common(width):
        node = tree.add(f"{count / len(samples):4.0%}  {show([token])}")
        _grow(node, [sample[1:] for sample in samples if len(sample) and sample[0] == token], width, show)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids separated by commas, got {text!r}") from None
