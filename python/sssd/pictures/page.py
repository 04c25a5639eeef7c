"""``python -m sssd report``: what a replay gave, as one page that needs no network."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from sssd._core import SOURCES
from sssd.pictures import charts
from sssd.pictures.charts import Estimate
from sssd.pictures.steps import Steps
from sssd.pictures.svg import STYLE, escaped

Row = Mapping[str, Any]


def page(title: str, about: str, rows: Sequence[Row], shown: Sequence[Steps]) -> str:
    """Writes the page.

    Args:
        title: Its heading.
        about: What was replayed, and how.
        rows: What ``Replay.row`` gave for each trace at each budget.
        shown: Requests to step through.

    Returns:
        HTML with everything that it needs. Its policy lets no script run but its own, and nothing be fetched.
    """
    style, script = (
        (resources.files("sssd.pictures") / f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}\n{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escaped(title)}</h1>\n<p class="dim">{escaped(about)}</p>\n'
        f"{_figures(rows)}{_viewer(shown)}"
        f"{f'<script>{script}</script>' if shown else ''}\n</body>\n</html>\n"
    )


def _figures(rows: Sequence[Row]) -> str:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    traces = list(dict.fromkeys(row["trace"] for row in rows))

    def groups(estimate: Any) -> list[tuple[str, list[Estimate]]]:
        return [(name, [estimate(row) for row in rows if row["trace"] == name]) for name in traces]

    accepted = charts.intervals("Tokens per step by trace and budget", "tokens per step", groups(_accepted))
    times = charts.intervals("Draft times by trace and budget", "microseconds", groups(_time), log=True)
    reliability = charts.reliability(
        "Reliability of node probabilities",
        [(f"{budget} nodes", _reliability(rows, budget)) for budget in budgets],
    )
    sources = charts.shares(
        "Accepted nodes by source", [(f"{budget} nodes", _sources(rows, budget)) for budget in budgets]
    )
    return (
        "<h2>Tokens per step</h2>\n<p>Tokens that a verify pass gives: those accepted and one of the "
        "target's own. 1 is "
        "decoding without drafts. Lines: where 95 % of figures lie when requests are drawn anew "
        "(bootstrap); a dot "
        "alone: fewer than two requests.</p>\n"
        f'<figure id="acceptance">{accepted}</figure>\n{_table(rows)}'
        '<div class="pair"><div><h2>Do probabilities come true?</h2><p>Above the diagonal nodes are '
        "accepted more often than was "
        f'said, below less.</p><figure id="reliability">{reliability}</figure></div>\n'
        "<div><h2>Draft times</h2><p>Of a single draft on this machine: line from the median to the "
        "99th percentile.</p>"
        f'<figure id="times">{times}</figure></div></div>\n'
        "<h2>Where accepted tokens came from</h2><p>A node counts for the source that contributed "
        "most to it.</p>"
        f'<figure id="sources">{sources}</figure>\n'
    )


def _accepted(row: Row) -> Estimate:
    value = row["tokens_per_step"]
    low, high = row["tokens_per_step_interval"] or (value, value)
    return Estimate(f"{row['budget']} nodes", value, low, high)


def _time(row: Row) -> Estimate:
    low, high = row["draft_us_p50"], row["draft_us_p99"]
    return Estimate(f"{row['budget']} nodes", low, low, high)


def _reliability(rows: Sequence[Row], budget: int) -> list[tuple[float, float, int]]:
    """Mean probability, share accepted, nodes of each bin, over all traces."""
    points = []
    for bins in zip(*(row["reliability"] for row in rows if row["budget"] == budget), strict=True):
        drafted, accepted, said = (
            sum(part[key] for part in bins) for key in ("drafted", "accepted", "predicted")
        )
        if drafted:
            points.append((said / drafted, accepted / drafted, drafted))
    return points


def _sources(rows: Sequence[Row], budget: int) -> list[tuple[int, int]]:
    found = [row["sources"] for row in rows if row["budget"] == budget]
    counts = [sum(part[name]["accepted"] for part in found if name in part) for name in SOURCES]
    return [(source, count) for source, count in enumerate(counts) if count]


def _table(rows: Sequence[Row]) -> str:
    names = (
        "trace",
        "nodes",
        "requests",
        "tokens",
        "tokens/step",
        "95 %",
        "expected",
        "drafted",
        "p50 µs",
        "p99 µs",
    )
    lines = []
    for row in rows:
        interval = row["tokens_per_step_interval"]
        cells = (
            escaped(row["trace"]),
            row["budget"],
            f"{row['requests']:,}",
            f"{row['tokens']:,}",
            f"{row['tokens_per_step']:.3f}",
            f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "–",
            f"{row['expected_accepted_per_step'] + 1:.3f}",
            f"{row['drafted_per_step']:.1f}",
            f"{row['draft_us_p50']:.1f}",
            f"{row['draft_us_p99']:.1f}",
        )
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<details><summary>The figures</summary><div class="wide"><table><caption>expected: one more '
        "than the sum of "
        f"probabilities</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>\n"
    )


def _viewer(shown: Sequence[Steps]) -> str:
    if not shown:
        return ""
    options = "".join(f'<option value="r{i}">{escaped(steps.name)}</option>' for i, steps in enumerate(shown))
    data = "".join(
        f'<script type="application/octet-stream" id="r{i}">{steps.packed()}</script>\n'
        for i, steps in enumerate(shown)
    )
    return (
        '<h2 id="steps">Step by step</h2>\n<p>Each step drafts a tree; the target verifies it in one '
        "pass, and its own tokens lead "
        "from the root along the accepted path (filled) to one more (dashed). Width: probability. "
        "Arrow keys and clicks on the "
        'text lead through the request.</p>\n<section id="viewer" tabindex="0" aria-label="Steps of '
        'a request">'
        f'<div class="controls"><label for="request">request</label><select '
        f'id="request">{options}</select></div>'
        '<div class="controls"><button id="back" aria-label="the step before">◀</button>'
        '<input type="range" id="step" min="0" value="0" aria-label="step">'
        '<button id="on" aria-label="the next step">▶</button><output id="place"></output></div>'
        '<div id="text" class="sssd"></div><p id="why" aria-live="polite"></p><div id="tree"></div>'
        f"<noscript>The steps need JavaScript; the figures do not.</noscript></section>\n{data}"
    )
