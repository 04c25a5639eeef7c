"""What several commands show: tables on stdout, progress on stderr."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sssd.errors import OutputError

if TYPE_CHECKING:
    from sssd.reading.options import ReadReport


def show(table: Any) -> None:
    """Prints a table as wide as its content: a narrow terminal wraps its lines, but no number is cut."""
    console = Console()
    # without a limit it tells how wide it would like to be
    wanted = Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum
    console.width = max(console.width, wanted)
    console.print(table, soft_wrap=True)


def check_writable(*paths: Path | None) -> None:
    """Sees ahead of long work that its result can be written; paths that are None are left out.

    Raises:
        OutputError: a file's folder is not there or cannot be written to, or the file is a folder.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OutputError(f"{path} cannot be written: permission denied")


def notes(report: "ReadReport") -> None:
    """Says on stderr what reading left out, skipped or changed."""
    console = Console(stderr=True)
    for line in report.notes():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def status(console: Console, text: str) -> Any:
    """A spinner beside a text that goes when it is done; the text alone where nothing can spin."""
    if not console.is_terminal:
        console.print(text)
    return console.status(text)


@contextmanager
def build_progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr for each step of a build. To be called with the step, what is done, and the total."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as progress:
        tasks = {name: progress.add_task(name, visible=False) for name in ("reading", "indexing")}

        def show(name: str, done: int, total: int | None) -> None:
            progress.update(tasks[name], completed=done, total=total, visible=True)

        yield show


def progress_bar(*, quiet: bool = False) -> Progress:
    """A bar on stderr that goes when it is done; none if ``quiet``, or where it would not go away."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
