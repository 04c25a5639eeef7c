"""Pictures of drafts, stores and cost curves, as SVG and HTML that need no network. Needs numpy only.

Notebooks show them by themselves: what stands last in a cell is drawn. Lines and texts have the colour of the
page's text, so that they can be read on light and on dark ones. Texts are escaped, whatever tokens say.
"""

from sssd._core import Datastore, DraftTree
from sssd.errors import SssdError
from sssd.hardware.curve import CostCurve
from sssd.pictures import charts
from sssd.pictures.svg import STYLE, escaped
from sssd.pictures.trees import draw_tree

__all__ = ["curve_html", "draw_curve", "draw_tree", "store_html", "tree_html"]


def tree_html(tree: DraftTree) -> str:
    """What a notebook shows of a draft tree. ``draw_tree`` knows what tokens mean, and what was accepted."""
    return f'<div style="overflow-x:auto">{draw_tree(tree)}</div>'


def store_html(store: Datastore) -> str:
    """What a notebook shows of a datastore: a line a file."""
    try:
        files = store.info.files
        size = store.vocab_size
    except SssdError as error:
        return f"<p>Datastore ({escaped(error)})</p>"
    names = ("file", "tokens", "documents", "segments", "bytes", "bytes a token", "tokenizer")
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for file in files:
        cells = (
            f"{file.tokens:,}",
            f"{file.documents:,}",
            f"{file.segments:,}",
            f"{file.file_bytes:,}",
            f"{file.file_bytes / max(file.tokens, 1):.2f}",
            file.fingerprint.hex()[:16] if file.fingerprint else "unknown",
        )
        lines.append(f"<tr><td>{escaped(file.path)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        f"<table><caption>Datastore of {store.info.tokens:,} tokens, {size:,} token ids</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def draw_curve(curve: CostCurve, *, context: float | None = None, styled: bool = True) -> str:
    """Draws what wider passes cost, in times of a pass over one token; a line a batch size.

    Args:
        curve: The curve.
        context: Length of the texts; the curve's shortest if left out.
        styled: Whether the picture carries its style.

    Returns:
        The picture, as SVG. ``sssd.hardware.plot.draw_curve`` draws it with matplotlib.
    """
    context = float(curve.contexts[0]) if context is None else context
    most = 256 if curve.packed else int(min(256, curve.tokens[-1]))
    widths = [2**power for power in range(most.bit_length())]
    shown = curve.batches[:: max(len(curve.batches) // 4, 1)]
    series = []
    for batch in shown:
        plain = curve.time(float(batch), 1, context)
        points = [(float(width), curve.time(float(batch), width, context) / plain) for width in widths]
        series.append((f"batch {batch:g}", points))
    title = f"Time of a pass at context {context:g}, in times of a pass over one token of each row"
    picture = charts.lines(title, ("tokens of each row", "times"), series)
    return picture.replace("</title>", f"</title><style>{STYLE}</style>", 1) if styled else picture


def curve_html(curve: CostCurve) -> str:
    """What a notebook shows of a cost curve."""
    measured = "measured" if curve.source == "measured" else f"{curve.source}, not measured"
    about = ", ".join(str(part) for part in (curve.model, curve.dtype, curve.device, measured) if part)
    return f'<div style="overflow-x:auto"><p>{escaped(about)}</p>{draw_curve(curve)}</div>'
