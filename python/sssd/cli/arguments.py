"""Argument types that several commands share."""

import argparse
from pathlib import Path

from sssd.errors import InvalidArgumentError
from sssd.replay import Tokenize


def budgets(text: str) -> list[int]:
    """Node budgets separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None
    if not all(0 <= value <= 1024 for value in values):
        raise argparse.ArgumentTypeError("budgets must be between 0 and 1024")
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
