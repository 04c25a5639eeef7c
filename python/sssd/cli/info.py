"""``python -m sssd info``: what the header of a datastore says."""

import argparse
from pathlib import Path

from rich.table import Table

from sssd import Datastore
from sssd.cli.output import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="datastore file or corpus")


def run(arguments: argparse.Namespace) -> None:
    """Prints one column per file."""
    table = Table()
    table.add_column("file")
    with Datastore.open(arguments.files) as store:
        files = store.info.files
        for file in files:
            table.add_column(str(file.path), justify="right")
        table.add_row("format version", *(str(file.version) for file in files))
        table.add_row("uuid", *(file.uuid for file in files))
        table.add_row("vocabulary", *(f"{store.vocab_size:,}" for _ in files))
        table.add_row(
            "tokenizer", *(file.fingerprint.hex()[:16] if file.fingerprint else "unknown" for file in files)
        )
        table.add_row("tokens", *(f"{file.tokens:,}" for file in files))
        table.add_row("documents", *(f"{file.documents:,}" for file in files))
        table.add_row("deduplicated", *("yes" if file.deduplicated else "no" for file in files))
        table.add_row("tables for ranking", *("yes" if file.ranking_tokens else "no" for file in files))
        table.add_row("segments", *(f"{file.segments:,}" for file in files))
        table.add_row("bytes", *(f"{file.file_bytes:,}" for file in files))
        table.add_row("bytes per token", *(f"{file.file_bytes / max(file.tokens, 1):.2f}" for file in files))
    show(table)
