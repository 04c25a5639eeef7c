"""Pictures of cost curves, replays and simulations, in the format that a name ends with (.png, .svg, ...).

Needs matplotlib: ``pip install 'sssd[plot]'``; its backend is left as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"drawing needs matplotlib: pip install 'sssd[plot]' ({error})") from error

import numpy as np

from sssd.errors import OutputError
from sssd.hardware.curve import CostCurve
from sssd.hardware.simulate import compare


def draw_curve(curve: CostCurve, path: Path | str, *, contexts: Sequence[float] = (), most: int = 64) -> None:
    """Draws the time of a pass by its width, in times of a step without drafts; a line for each batch and
    context.

    Args:
        curve: The curve.
        path: The file to write.
        contexts: Context lengths; the curve's own if left out.
        most: Tokens of each row up to which to draw.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    most = most if curve.packed else int(min(most, curve.tokens[-1]))
    widths = np.unique(np.geomspace(1, most, 48).astype(int))
    shown = list(contexts or curve.contexts)
    shown = shown[:: max(len(shown) // 2, 1)]
    measured = [int(width) for width in curve.tokens if width <= most] if not curve.packed else []
    for i, batch in enumerate(curve.batches[:: max(len(curve.batches) // 4, 1)]):
        for context, dashes in zip(shown, ("-", "--", ":"), strict=False):
            plain = curve.time(batch, 1, context)
            label = f"batch {batch:g}, context {context:g} ({plain * 1e3:.1f} ms)"
            times = [curve.time(batch, width, context) / plain for width in widths]
            axes.plot(widths, times, dashes, color=f"C{i}", label=label)
            times = [curve.time(batch, width, context) / plain for width in measured]
            axes.plot(measured, times, ".", color=f"C{i}")
    ticks = [2**power for power in range(most.bit_length())]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    # times of wide passes at large batches would flatten all others
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="tokens of each row", ylabel="time / time of one token", title=_title(curve))
    axes.legend(fontsize="x-small", title="(time of one token)", title_fontsize="x-small")
    axes.grid(alpha=0.3)
    _write(figure, path)


def draw_replay(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws tokens per step by trace and budget as a heat map, from the rows of ``replay --json``."""
    traces, budgets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("trace", "budget"))
    values = {(row["trace"], row["budget"]): row["tokens_per_step"] for row in rows}
    figure = _sheet(1, len(traces), len(budgets))
    _heat(
        figure.subplots(),
        [[values[trace, budget] for budget in budgets] for trace in traces],
        traces,
        [str(budget) for budget in budgets],
        ("nodes", title or "tokens per step"),
    )
    _write(figure, path)


def draw_simulation(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws speed-ups by workload and batch size as heat maps, from the rows of ``simulate --json``.

    Three maps: this rule over decoding without drafts, over the paper's rule, and over the best fixed
    budget (chosen in hindsight).
    """
    batches = sorted({row["batch"] for row in rows})
    compared = compare(rows)
    traces = list(dict.fromkeys(row["trace"] for row in compared))
    speedups = {(row["trace"], row["batch"]): row["speedup"] for row in rows if row["rule"] == "sssd"}
    ratios = {(row["trace"], row["batch"]): row for row in compared}
    figure = _sheet(3, len(traces), len(batches))
    figure.suptitle(title, fontsize="medium")
    pictures = (
        ("over no drafts", speedups),
        ("over the paper's rule", {key: row["over_paper"] for key, row in ratios.items()}),
        ("over the best fixed budget", {key: row["over_best_fixed"] for key, row in ratios.items()}),
    )
    for i, (axes, (name, values)) in enumerate(zip(figure.subplots(1, 3), pictures, strict=True)):
        _heat(
            axes,
            [[values[trace, batch] for batch in batches] for trace in traces],
            traces if i == 0 else [""] * len(traces),
            [str(batch) for batch in batches],
            ("batch", name),
        )
    _write(figure, path)


def _sheet(maps: int, rows: int, columns: int) -> Figure:
    size = (2.2 + maps * max(0.62 * columns, 2.4), 1.7 + 0.3 * max(rows, 3))
    return Figure(figsize=size, layout="constrained")


def _heat(
    axes: Axes, values: list[list[float]], rows: list[str], columns: list[str], names: tuple[str, str]
) -> None:
    """A map of ratios with its numbers: white at 1, blue above, red below, on a logarithmic scale."""
    logs = np.log2(np.maximum(np.array(values, float), 1e-3))
    most = max(float(np.abs(logs).max(initial=0)), 0.2)
    axes.imshow(logs, cmap="RdBu", vmin=-1.5 * most, vmax=1.5 * most, aspect="auto")
    for place, value in np.ndenumerate(np.array(values)):
        axes.text(place[1], place[0], f"{value:.2f}", ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows, fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(names[0])
    axes.set_title(names[1], fontsize="medium")


def draw_live(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws speed by workload, from the rows of ``benches/live.py --json``."""
    figure = Figure(figsize=(6.4, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['workload']} ({row['prompts']})" for row in rows]
    places = np.arange(len(names))
    axes.barh(places - 0.2, [row["speedup"] for row in rows], 0.4, label="sssd.hf.generate / model.generate")
    axes.barh(
        places + 0.2, [row["drafting"] for row in rows], 0.4, label="with drafts / without, same passes"
    )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(places, names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second, ratio")
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="x-small")
    _write(figure, path)


def _title(curve: CostCurve) -> str:
    kind = "" if curve.source == "measured" else f" ({curve.source})"
    return f"{Path(curve.model).name} {curve.dtype}, {curve.device}{kind}"


def check_format(path: Path | str) -> str:
    """The format that the name of a picture ends with.

    Raises:
        OutputError: it is none that matplotlib writes.
    """
    known = Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix[1:].lower()
    if suffix not in known:
        raise OutputError(f"{path}: a picture's name ends with its format: {', '.join(sorted(known))}")
    return suffix


def _write(figure: Figure, path: Path | str) -> None:
    figure.savefig(path, format=check_format(path), dpi=150)
