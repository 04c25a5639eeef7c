"""Pictures of cost curves and simulations. Needs matplotlib: ``pip install 'sssd[plot]'``."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

try:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError as error:
    raise ImportError(f"drawing needs matplotlib: pip install 'sssd[plot]' ({error})") from error

import numpy as np

from sssd.hardware.curve import CostCurve
from sssd.hardware.simulate import compare


def draw_curve(curve: CostCurve, path: Path | str, *, contexts: Sequence[float] = (), most: int = 64) -> None:
    """Draws the time of a pass by its width, in times of a step without drafts; a line for each batch and
    context.

    Args:
        curve: The curve.
        path: The PNG file to write.
        contexts: Context lengths; the curve's own if left out.
        most: Tokens of each row up to which to draw.
    """
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
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
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens of each row", ylabel="time / time of one token", title=_title(curve))
    axes.legend(fontsize="x-small", title="(time of one token)", title_fontsize="x-small")
    axes.grid(alpha=0.3)
    _write(figure, path)


def draw_simulation(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws the mean speed-up of each rule by batch size, from the rows of ``simulate --json``.

    Beside it, this package's rule on each workload against the paper's and the best fixed budget.
    """
    figure, (means, shares) = pyplot.subplots(
        1, 2, figsize=(11.0, 4.8), layout="constrained", width_ratios=(5, 6)
    )
    batches = sorted({row["batch"] for row in rows})
    rules = [rule for rule in dict.fromkeys(row["rule"] for row in rows) if rule != "perfect"]
    for rule in rules:
        speedups = [
            mean(row["speedup"] for row in rows if row["rule"] == rule and row["batch"] == batch)
            for batch in batches
        ]
        style = {"sssd": "o-k", "paper": "s-C3"}.get(rule, ".--")
        means.plot([str(batch) for batch in batches], speedups, style, label=rule)
    means.axhline(1.0, color="grey", linewidth=0.8)
    means.set(xlabel="batch", ylabel="speed-up over autoregressive decoding (mean)", title=title)
    means.legend(fontsize="x-small")
    means.grid(alpha=0.3)
    compared = compare(rows)
    traces = sorted({row["trace"] for row in compared})
    for i, batch in enumerate(batches):
        places = [traces.index(row["trace"]) for row in compared if row["batch"] == batch]
        for name, marker, label in (
            ("over_paper", "s", "paper's rule"),
            ("over_best_fixed", ".", "best fixed"),
        ):
            ratios = [row[name] for row in compared if row["batch"] == batch]
            heights = np.array(places) + 0.18 * (i - (len(batches) - 1) / 2)
            shares.plot(ratios, heights, marker, color=f"C{i}", markersize=5, label=f"{label}, batch {batch}")
    shares.axvline(1.0, color="grey", linewidth=0.8)
    shares.set_xscale("log")
    ticks = [0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0]
    shares.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    shares.minorticks_off()
    shares.set_yticks(range(len(traces)), traces, fontsize="small")
    shares.invert_yaxis()
    shares.set(xlabel="sssd's rule over", title="each workload; best fixed budget chosen in hindsight")
    shares.legend(fontsize="x-small")
    shares.grid(alpha=0.3)
    _write(figure, path)


def draw_live(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws speed by workload, from the rows of ``benches/live.py --json``."""
    figure, axes = pyplot.subplots(figsize=(6.4, 1.2 + 0.4 * len(rows)), layout="constrained")
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


def _write(figure: Any, path: Path | str) -> None:
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
