"""Charts that a page can carry: estimates with intervals, reliability, shares, ranges, lines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sssd.pictures.svg import CHARACTER, columns, escaped, picture, plain, short, source_class, source_name

WIDTH = 640.0
_ROW = 18.0
_TOP, _BOTTOM = 30.0, 34.0

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval: what a line of :func:`intervals` shows, in the units of the axis."""

    name: str
    value: float
    low: float
    high: float


def intervals(
    title: str, axis: str, groups: Sequence[tuple[str, Sequence[Estimate]]], *, log: bool = False
) -> str:
    """Draws figures with their intervals, group by group; the members of groups have the same names.

    Args:
        title: What is shown.
        axis: What the horizontal axis shows.
        groups: Name and figures of each group.
        log: Whether the axis is logarithmic, for figures above 0.

    Returns:
        The chart, as SVG without a style of its own.
    """
    left = CHARACTER * min(max([8, *(columns(name) for name, _ in groups)]), 24) + 18
    values = [edge for _, members in groups for member in members for edge in (member.low, member.high)]
    scale, ticks = _scale(values or [0.0, 1.0], left, WIDTH - 14, log)
    names = list(dict.fromkeys(member.name for _, members in groups for member in members))
    y, parts = _TOP + 14, [_keys(names, left)]
    for name, members in groups:
        parts.append(
            f'<text x="6" y="{y + 8 + _ROW * (len(members) - 1) / 2:.0f}">{escaped(short(name, 24))}</text>'
        )
        for member in members:
            a, b, c = (scale(value) for value in (member.low, member.value, member.high))
            said = f"{plain(name)}, {member.name}: {member.value:.3g} ({member.low:.3g} to {member.high:.3g})"
            parts.append(
                f'<g class="{_class(names.index(member.name))}"><title>{escaped(said)}</title>'
                f'<path class="line" d="M{a:.1f} {y + 4:.0f}H{c:.1f}"/>'
                f'<circle class="mark" cx="{b:.1f}" cy="{y + 4:.0f}" r="4"/></g>'
            )
            y += _ROW
        y += 6
    parts.insert(0, _grid(ticks, scale, _TOP + 8, y, axis))
    return picture(WIDTH, y + _BOTTOM, title, parts, styled=False)


def reliability(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float, int]]]]) -> str:
    """Draws what came true against what was said: on the diagonal both are equal.

    Args:
        title: What is shown.
        series: For each name the points: mean probability, share that came true, nodes.
    """
    side, left = 330.0, 52.0
    bottom = _TOP + side
    most = max((count for _, points in series for *_, count in points), default=1)
    parts = [_keys([name for name, _ in series], left)]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = left + tick * (side - 20), bottom - tick * (side - 20)
        parts.append(
            f'<path class="axis" d="M{left} {y:.0f}H{left + side - 20}M{x:.0f} {bottom}V{_TOP + 20}"/>'
            f'<text class="dim" x="{x - 6:.0f}" y="{bottom + 14}">{tick:g}</text>'
            f'<text class="dim" x="{left - 24}" y="{y + 3:.0f}">{tick:g}</text>'
        )
    parts.append(
        f'<path class="axis" style="stroke-opacity:.8" d="M{left} {bottom}L{left + side - 20} {_TOP + 20}"/>'
    )
    for i, (name, points) in enumerate(series):
        places = [(left + said * (side - 20), bottom - came * (side - 20)) for said, came, _ in points]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
        dots = "".join(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{2 + 5 * math.sqrt(count / most):.1f}">'
            f"<title>{escaped(name)}: said {said:.3f}, came true {came:.3f}, {count} nodes</title></circle>"
            for (x, y), (said, came, count) in zip(places, points, strict=True)
        )
        parts.append(f'<g class="{_class(i)}"><path class="line" d="{line}"/>{dots}</g>')
    parts.append(
        f'<text class="dim" x="{left}" y="{bottom + 30}">probability of a node; up: share accepted; '
        f"area: nodes</text>"
    )
    return picture(left + side + 20, bottom + _BOTTOM, title, parts, styled=False)


def shares(title: str, rows: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> str:
    """Draws how a whole divides among sources, a bar a row.

    Args:
        title: What is shown.
        rows: Name of each row, and (source, count) of its parts.
    """
    left, parts, y = 96.0, [], 10.0
    for name, counts in rows:
        total = sum(count for _, count in counts)
        x = left
        parts.append(f'<text x="6" y="{y + 15:.0f}">{escaped(name)}</text>')
        for source, count in counts:
            wide = (WIDTH - 14 - left) * count / total if total else 0.0
            label = source_name(source)
            fits = wide > CHARACTER * len(label) + 8
            said = f"{plain(name)}: {label} {count} of {total} ({100 * count / max(total, 1):.1f} %)"
            inside = f'<text x="{x + 5:.1f}" y="{y + 15:.0f}">{label}</text>' if fits else ""
            parts.append(
                f'<g class="{source_class(source)}"><title>{escaped(said)}</title>'
                f'<rect class="box" style="fill-opacity:.4" x="{x:.1f}" y="{y:.0f}" '
                f'width="{wide:.1f}" height="22"/>'
                f"{inside}</g>"
            )
            x += wide
        y += 28
    return picture(WIDTH, y + 4, title, parts, styled=False)


def lines(
    title: str, axes: tuple[str, str], series: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> str:
    """Draws lines of y over x, both above 0, on logarithmic axes.

    Args:
        title: What is shown.
        axes: What the horizontal and the vertical axis show.
        series: Name and points of each line.
    """
    left, height = 56.0, 240.0
    bottom = _TOP + height
    points = [point for _, line in series for point in line]
    across, x_ticks = _scale([x for x, _ in points] or [1.0, 10.0], left, WIDTH - 20, True, 2)
    up, y_ticks = _scale([y for _, y in points] or [1.0, 10.0], bottom, _TOP + 14, True, 2)
    parts = [_keys([name for name, _ in series], left), _grid(x_ticks, across, _TOP + 8, bottom, axes[0])]
    for tick in y_ticks:
        parts.append(
            f'<path class="axis" d="M{left} {up(tick):.1f}H{WIDTH - 20}"/>'
            f'<text class="dim" x="{left - 40}" y="{up(tick) + 3:.0f}">{_number(tick)}</text>'
        )
    for i, (name, line) in enumerate(series):
        path = "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line)
        parts.append(
            f'<g class="{_class(i)}"><title>{escaped(name)}</title><path class="line" d="{path}"/></g>'
        )
    parts.append(f'<text class="dim" x="6" y="{_TOP + 2}">{escaped(axes[1])}</text>')
    return picture(WIDTH, bottom + _BOTTOM, title, parts, styled=False)


def _scale(
    values: Sequence[float], start: float, end: float, log: bool, base: int = 10
) -> tuple[Scale, list[float]]:
    """From values to pixels, and where to put ticks."""
    if log:
        low, high = (max(value, 1e-12) for value in (min(values), max(values)))
        first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
        last = max(last, first + 1)
        ticks = [float(base) ** power for power in range(first, last + 1, max((last - first) // 8, 1))]
        span = math.log(base) * (last - first)
        return (
            lambda value: (
                start + (end - start) * (math.log(max(value, 1e-12)) - first * math.log(base)) / span
            ),
            ticks,
        )
    low, high = min(0.0, *values), max(values)
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    step = next((step * part for part in (0.1, 0.2, 0.5, 1) if (high - low) / (step * part) <= 8), step)
    first, last = math.floor(low / step), max(math.ceil(high / step - 1e-9), 1)
    span = step * (last - first)
    return (
        lambda value: start + (end - start) * (value - first * step) / span,
        [i * step for i in range(first, last + 1)],
    )


def _grid(ticks: Sequence[float], scale: Scale, top: float, bottom: float, axis: str) -> str:
    marks = "".join(
        f'<path class="axis" d="M{scale(tick):.1f} {top:.0f}V{bottom:.0f}"/>'
        f'<text class="dim" text-anchor="middle" x="{scale(tick):.1f}" '
        f'y="{bottom + 14:.0f}">{_number(tick)}</text>'
        for tick in ticks
    )
    return f'{marks}<text class="dim" x="6" y="{bottom + 30:.0f}">{escaped(axis)}</text>'


def _keys(names: Sequence[str], x: float) -> str:
    parts = []
    for i, name in enumerate(names):
        parts.append(
            f'<g class="{_class(i)}"><circle class="mark" cx="{x + 5:.0f}" cy="16" r="4"/>'
            f'<text x="{x + 13:.0f}" y="20">{escaped(name)}</text></g>'
        )
        x += 13 + CHARACTER * (columns(name) + 2)
    return "".join(parts)


def _class(series: int) -> str:
    return source_class(series)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
