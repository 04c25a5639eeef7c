"""What several commands show: tables on stdout, progress on stderr."""

import sys
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def show(table: Any) -> None:
    """Prints a table as wide as its content: a narrow terminal wraps its lines, but no number is cut."""
    console = Console()
    # without a limit it tells how wide it would like to be
    wanted = Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum
    console.width = max(console.width, wanted)
    console.print(table, soft_wrap=True)


def status(console: Console, text: str) -> Any:
    """A spinner beside a text that goes when it is done; the text alone where nothing can spin."""
    if not console.is_terminal:
        console.print(text)
    return console.status(text)


def progress_bar() -> Progress:
    """A bar on stderr that goes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
