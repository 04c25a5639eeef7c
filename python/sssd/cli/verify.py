"""``python -m sssd verify``: compares datastores with their checksums."""

import argparse
from pathlib import Path
from time import perf_counter

from rich.console import Console

from sssd.datastore import Datastore
from sssd.errors import DatastoreError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="datastore file or corpus")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line per file; returns 1 if any is damaged."""
    console = Console()
    damaged = 0
    for path in arguments.files:
        started = perf_counter()
        try:
            with Datastore.open(path) as store:
                store.verify()
                size = store.info.file_bytes
        except DatastoreError as error:
            console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
            damaged = 1
        else:
            rate = size / 1e6 / (perf_counter() - started)
            console.print(
                f"{path}: intact ({size:,} bytes, {rate:,.0f} MB/s)", highlight=False, soft_wrap=True
            )
    return damaged
