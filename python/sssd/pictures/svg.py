"""What every picture is made of: escaped text, colours of sources, scales."""

import html
import unicodedata
from collections.abc import Iterable, Sequence

from sssd._core import SOURCES

PALETTE = ("#0a84c6", "#3fa7a0", "#d9822b", "#8e6bc9", "#c2459a", "#4b9b3a", "#a88417", "#6b7fa3")
"""One for each source, in the order of ``SOURCES``, as legible on white as on black."""
UNKNOWN = "#8a8a8a"
"""For nodes of trees that no drafter made."""
CHARACTER = 7.3
"""Width in pixels of a character of the font."""

STYLE = (
    ".sssd{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:inherit;max-width:none}"
    ".sssd text{fill:currentColor}.sssd .dim{opacity:.65;font-size:10px}"
    ".sssd .axis{stroke:currentColor;stroke-opacity:.22}.sssd .edge{fill:none;stroke:var(--c)}"
    ".sssd .mark{fill:var(--c)}.sssd .line{fill:none;stroke:var(--c);stroke-width:2}"
    ".sssd .box{fill:var(--c);fill-opacity:.13;stroke:var(--c)}"
    ".sssd .in .box{fill-opacity:.45;stroke-width:2.5}.sssd .in text:not(.dim){font-weight:bold}"
    ".sssd .in .edge{stroke-opacity:1}"
    ".sssd .root .box,.sssd .bonus .box{--c:currentColor;fill-opacity:.06}"
    ".sssd .bonus .box{stroke-dasharray:4 3}"
) + "".join(f".sssd .s{source}{{--c:{color}}}" for source, color in enumerate((*PALETTE, UNKNOWN)))


def source_class(source: int) -> str:
    """The style of a source; -1 stands for none."""
    return f"s{source % len(PALETTE) if source >= 0 else len(PALETTE)}"


def source_name(source: int) -> str:
    """The name of a source; -1 stands for none."""
    return SOURCES[source] if 0 <= source < len(SOURCES) else "no source"


def plain(text: str) -> str:
    """A text in which nothing acts.

    What does not print (newlines, marks of direction, half characters) is shown as Python's escapes.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def escaped(text: object) -> str:
    """A text as markup that shows it, in elements and in attributes."""
    return html.escape(plain(str(text)))


def short(text: str, most: int) -> str:
    """A text of at most ``most`` columns."""
    if columns(text) <= most:
        return text
    kept, used = "", 1
    for c in text:
        used += columns(c)
        if used > most:
            break
        kept += c
    return f"{kept}…"


def columns(text: str) -> int:
    """Columns of a text in a font of one width: wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def picture(width: float, height: float, title: str, parts: Iterable[str], *, styled: bool = True) -> str:
    """An SVG picture with a title for those who do not see it. Without ``styled`` the page has ``STYLE``."""
    style = f"<style>{STYLE}</style>" if styled else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sssd" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"<title>{escaped(title)}</title>{style}{''.join(parts)}</svg>"
    )


def legend(sources: Sequence[int], x: float, y: float) -> tuple[str, float]:
    """Names of sources beside their colours, and where it ends."""
    parts = []
    for source in sources:
        name = source_name(source)
        parts.append(
            f'<g class="{source_class(source)}"><rect class="mark" x="{x:.0f}" y="{y - 9:.0f}" '
            f'width="10" height="10" '
            f'rx="2"/><text x="{x + 14:.0f}" y="{y:.0f}">{name}</text></g>'
        )
        x += 14 + CHARACTER * (len(name) + 2)
    return "".join(parts), x
