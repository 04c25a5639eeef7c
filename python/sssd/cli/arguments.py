"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path

from sssd._core import MAX_NODES
from sssd.errors import InvalidArgumentError
from sssd.replay import Tokenize


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what commands that replay traces take."""
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="JSON Lines, plain, .gz or .xz")
    parser.add_argument("--tokenizer", help="tokenizer.json or model folder, for traces that hold text")
    parser.add_argument(
        "--end-token-id", type=int, action="append", metavar="ID", help="draft nothing after this"
    )
    parser.add_argument(
        "--datastore", type=Path, action="append", metavar="FILE", help="datastore file; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


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


def tokenizer(path: str) -> Tokenize:
    """The tokenizer of a tokenizer.json or of the folder that holds it; adds no special tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InvalidArgumentError("--tokenizer needs tokenizers: pip install 'sssd[hf]'") from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InvalidArgumentError(f"no tokenizer.json at {path}")
    loaded = Tokenizer.from_file(str(file))
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)
