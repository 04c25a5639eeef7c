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
    for batch in curve.batches[:: max(len(curve.batches) // 4, 1)]:
        for context in shown[:: max(len(shown) // 2, 1)]:
            times = [curve.time(batch, width, context) for width in widths]
            label = f"batch {batch:g}, context {context:g} ({times[0] * 1e3:.1f} ms)"
            axes.plot(widths, np.array(times) / times[0], label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of each row", ylabel="time / time of one token", title=_title(curve))
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    _write(figure, path)


def draw_simulation(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws the mean speed-up of each rule by batch size, from the rows of ``simulate --json``."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    batches = sorted({row["batch"] for row in rows})
    rules = [rule for rule in dict.fromkeys(row["rule"] for row in rows) if rule != "perfect"]
    for rule in rules:
        means = [
            mean(row["speedup"] for row in rows if row["rule"] == rule and row["batch"] == batch)
            for batch in batches
        ]
        style = {"sssd": "o-k", "paper": "s-C3"}.get(rule, ".--")
        axes.plot([str(batch) for batch in batches], means, style, label=rule)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="batch", ylabel="speed-up over autoregressive decoding", title=title)
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    _write(figure, path)


def draw_live(rows: Sequence[dict[str, Any]], path: Path | str, title: str = "") -> None:
    """Draws speed by workload, from the rows of ``benches/live.py --json``."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    names = [row["workload"] for row in rows]
    places = np.arange(len(names))
    axes.barh(places - 0.2, [row["speedup"] for row in rows], 0.4, label="sssd.hf.generate / model.generate")
    axes.barh(
        places + 0.2, [row["drafting"] for row in rows], 0.4, label="with drafts / without, same passes"
    )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(places, names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second, ratio", title=title)
    axes.legend(fontsize="x-small")
    _write(figure, path)


def _title(curve: CostCurve) -> str:
    kind = "" if curve.source == "measured" else f" ({curve.source})"
    return f"{curve.model} {curve.dtype}, {curve.device}{kind}"


def _write(figure: Any, path: Path | str) -> None:
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
