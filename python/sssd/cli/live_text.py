"""Text on a terminal as it comes: accepted tokens are green, or «marked» where there are no colours."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sssd.cli.decoding import Show

_CONTROLS = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
_CONTROLS |= dict.fromkeys(range(128, 160), "?")
"""What a model may say to a terminal, harmless."""
_SECONDS = 0.1
"""Between two pictures of a text that comes."""


def is_coloured(console: Console) -> bool:
    """Whether accepted text can be told by its colour."""
    return console.color_system is not None and not console.no_color


def quotes(console: Console) -> tuple[str, str]:
    """What stands around accepted text where there are no colours."""
    try:
        "«»".encode(console.encoding)
    except UnicodeEncodeError:
        return "<<", ">>"
    return "«", "»"


class Marks:
    """Tells accepted text from the rest, piece by piece.

    Args:
        console: By colour where it has colours, or else by marks.
    """

    def __init__(self, console: Console) -> None:
        self._coloured, self._quotes = is_coloured(console), quotes(console)
        self._open = False

    def piece(self, text: str, accepted: bool) -> tuple[str, str]:
        """A piece as it is shown, and its style."""
        text = text.translate(_CONTROLS)
        if self._coloured:
            return text, "green" if accepted else ""
        quote = self._quotes[not accepted] if accepted != self._open else ""
        self._open = accepted
        return quote + text, ""

    def end(self) -> str:
        """What closes the text."""
        closing, self._open = self._quotes[1] if self._open else "", False
        return closing


def mark_name(console: Console) -> str:
    """How accepted text is shown, in a word."""
    return "green" if is_coloured(console) else "marked".join(quotes(console))


class Printer:
    """Prints pieces of a text one after the other.

    Args:
        console: Where to.
        marks: Whether accepted text is told from the rest.
    """

    def __init__(self, console: Console, *, marks: bool = True) -> None:
        self._console = console
        self._marks = Marks(console) if marks else None

    def __call__(self, text: str, accepted: bool) -> None:
        """Prints a piece."""
        style = ""
        if self._marks:
            text, style = self._marks.piece(text, accepted)
        self._console.out(text, style=style, highlight=False, end="")
        self._console.file.flush()

    def end(self) -> None:
        """Ends the text, and its line."""
        self._console.out(self._marks.end() if self._marks else "", highlight=False)


class SideBySide:
    """Two texts in two columns as they come, each with its tokens a second. A context.

    Args:
        console: A terminal.
        names: Of the two.
    """

    def __init__(self, console: Console, names: tuple[str, str]) -> None:
        self._names = names
        self._texts = Text(), Text()
        self._marks = tuple(Marks(console) for _ in names)
        self._counts, self._started, self._rates = [0, 0], [0.0, 0.0], ["", ""]
        self._shown = self._last = 0.0
        self._live = Live(self, console=console, auto_refresh=False)

    def __enter__(self) -> "SideBySide":
        self._live.__enter__()
        self._last = time.perf_counter()
        return self

    def __exit__(self, *problem: Any) -> None:
        for text, marks in zip(self._texts, self._marks, strict=True):
            text.append(marks.end())
        self._live.__exit__(*problem)

    def show(self, side: int) -> Show:
        """What takes the text of the first or the second."""

        def show(text: str, accepted: bool) -> None:
            now = time.perf_counter()
            # the second begins when the first has ended
            self._started[side] = self._started[side] or self._last
            self._last = now
            self._counts[side] += 1
            self._texts[side].append(*self._marks[side].piece(text, accepted))
            self._rates[side] = f"{self._counts[side] / max(now - self._started[side], 1e-9):.1f} tokens/s"
            if now - self._shown > _SECONDS:
                self._shown = now
                self._live.refresh()

        return show

    def settle(self, rates: tuple[str, str]) -> None:
        """Puts final figures beside the names."""
        self._rates = list(rates)

    def __rich__(self) -> Table:
        """Both columns."""
        grid = Table(box=None, padding=(0, 1), expand=True, show_edge=False)
        for name, rate in zip(self._names, self._rates, strict=True):
            grid.add_column(f"{name}  {rate}", ratio=1, header_style="bold")
        grid.add_row(*self._texts)
        return grid
