"""What probabilities promise and what is accepted: their sums over dev workloads, in every mode of drafting.

Usage: calibration.py STREAMS [--store FILE] [--mini FILE] [--topk TRACE --sampled TRACE] [--topk-store FILE]
                      [--modes NAMES] [--budgets 16,64] [--json FILE]

STREAMS holds dev.*.jsonl (`make table` makes them), STORE is a datastore of these tokens with tables for
ranking, MINI the mini store (`python -m sssd build --mini`). TOPK and SAMPLED are recordings with the
target's probabilities, of greedy and of sampled texts, and TOPK_STORE a datastore of their tokens with tables
(`record_generations.py` makes the sampled texts and the tokens of the store). Modes whose files are not given
are left out. Rows of other modes that FILE holds already stay there.

A row is within its bounds if the sum of probabilities is 0.92 to 1.10 of what was accepted, 0.90 to 1.12 with
more than 32 nodes; where fewer than 0.2 tokens a step are accepted that says little, and there are no bounds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from given import Guest, known_quality, rounded

from sssd import Datastore, Drafter, DraftTree
from sssd.replay import Replay, Request, Sampling, read_trace, trace_name

FEW_NODES = 32
BOUNDS = {True: (0.92, 1.10), False: (0.90, 1.12)}
LEAST_ACCEPTED = 0.2
# of the workloads outside their bounds, in a table's cell
MOST_NAMED = 2
SOFT_BYTES = 1 << 20
# of Llama 3 and of SmolLM2
END_TOKENS = {"streams": 128009, "topk": 2, "sampled": 2}


@dataclass(frozen=True)
class Mode:
    """How requests are replayed."""

    name: str
    traces: str = "streams"
    """Which traces: ``streams``, ``topk`` or ``sampled``."""
    store: str = ""
    """Which datastore: none, ``store``, ``mini`` or ``topk_store``."""
    ranking: bool = False
    shared: bool = False
    """Whether requests of a trace learn from those before them."""
    feedback: bool = True
    sampling: Sampling | None = None
    guest: tuple[float, str] | None = None
    """A draft from outside: how often it is right, and what it tells of that."""

    def drafter(self, end: int, store: Datastore | None) -> Drafter:
        sizes: dict[str, Any] = {} if self.shared else {"live_bytes": 0, "soft_bytes": SOFT_BYTES}
        return Drafter(end_token_ids=[end], datastore=store, ranking=self.ranking, threads=1, **sizes)


MODES = [
    Mode("alone"),
    Mode("live", shared=True),
    Mode("mini", store="mini"),
    Mode("mini, live", store="mini", shared=True),
    Mode("store", store="store"),
    Mode("store, live", store="store", shared=True),
    Mode("ranking", store="store", ranking=True),
    Mode("ranking, live", store="store", ranking=True, shared=True),
    Mode("guest right 3 in 10", guest=(0.3, "honest")),
    Mode("guest right 6 in 10", guest=(0.6, "honest")),
    Mode("guest right 8 in 10", guest=(0.8, "honest")),
    Mode("guest right 8 in 10, silent", guest=(0.8, "silent")),
    Mode("guest right 6 in 10, bold, ranking", store="store", ranking=True, guest=(0.6, "bold")),
    *(
        Mode(f"{name}{', ' if name else ''}{beside}", traces, store, ranking, shared, feedback, sampling)
        for name, traces, sampling in (
            ("", "topk", None),
            ("greedy, temperature 1", "topk", Sampling()),
            ("greedy, temperature 1, top-p 0.95", "topk", Sampling(top_p=0.95)),
            ("sampled", "sampled", None),
        )
        for beside, store, ranking, shared, feedback in (
            ("soft", "", False, False, True),
            ("soft, live", "", False, True, True),
            ("soft, store", "topk_store", False, False, True),
            ("soft, ranking", "topk_store", True, False, True),
            ("no soft, store", "topk_store", False, False, False),
            ("no soft, ranking", "topk_store", True, False, False),
            ("no soft", "", False, False, False),
        )
    ),
]


class Guided:
    """A sequence whose drafts are given another drafter's."""

    def __init__(self, sequence: Any, guest: Guest):
        self.sequence, self.guest = sequence, guest

    def draft(self, nodes: int) -> DraftTree:
        position = len(self.sequence) - len(self.guest.request.prompt_ids)
        tree: DraftTree = self.sequence.draft(nodes, given=self.guest.propose(position, nodes))
        return tree

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sequence, name)


def replayed(mode: Mode, requests: list[Request], nodes: int, store: Datastore | None) -> Replay:
    """All requests of a trace."""
    end = END_TOKENS[mode.traces]
    replay = Replay(nodes, mode.sampling, mode.feedback)
    shared = mode.drafter(end, store) if mode.shared else None
    for request in requests:
        with (shared or mode.drafter(end, store)).begin(request.prompt_ids) as sequence:
            guest = known_quality(request, *mode.guest) if mode.guest else None
            replay.follow(Guided(sequence, guest) if guest else sequence, request)  # type: ignore[arg-type]
    return replay


def row(mode: Mode, trace: str, replay: Replay) -> dict[str, Any]:
    """The figures, and whether they are within their bounds; None where there are none."""
    found = replay.row(trace)
    accepted, expected = found["accepted_per_step"], found["expected_accepted_per_step"]
    ratio = expected / accepted if accepted else None
    low, high = BOUNDS[replay.max_nodes <= FEW_NODES]
    within = None if accepted < LEAST_ACCEPTED else bool(low <= ratio <= high)
    kept = {"mode": mode.name, "trace": trace, "budget": replay.max_nodes, "steps": replay.steps}
    bins = replay.bins[:, 1] - replay.bins[:, 2]
    return kept | {
        "accepted_per_step": accepted,
        "sum_over_accepted": ratio,
        "bins": float(np.abs(bins).sum() / max(replay.bins[:, 1].sum(), 1)),
        "within": within,
    }


def measure(
    modes: list[Mode], streams: dict[str, dict[str, list[Request]]], stores: dict[str, Path], nodes: list[int]
) -> Iterator[dict[str, Any]]:
    """Rows of all modes whose files are there."""
    opened: dict[str, Datastore] = {}
    for mode in modes:
        traces = streams.get(mode.traces, {})
        if not traces or (mode.store and mode.store not in stores):
            print(f"{mode.name}: left out, its files are not given", flush=True)
            continue
        if mode.store and mode.store not in opened:
            opened[mode.store] = Datastore.open(stores[mode.store])
        for trace, requests in traces.items():
            for budget in nodes:
                yield row(mode, trace, replayed(mode, requests, budget, opened.get(mode.store)))


def table(rows: list[dict[str, Any]]) -> str:
    """Of each mode means, the least and the largest sums over accepted, and what is furthest outside."""
    budgets = sorted({row["budget"] for row in rows})
    heads = [f"accepted, {nodes} nodes | sum / accepted, {nodes} nodes" for nodes in budgets]
    lines = [f"| mode | {' | '.join(heads)} | outside |", f"| --- | {'--- | --- | ' * len(heads)}--- |"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells, outside = [], []
        for nodes in budgets:
            own = [row for row in rows if row["mode"] == mode and row["budget"] == nodes]
            bound = [row["sum_over_accepted"] for row in own if row["within"] is not None]
            ends = dict.fromkeys(f"{end:.2f}" for end in (min(bound), max(bound))) if bound else ["-"]
            cells += [f"{np.mean([row['accepted_per_step'] for row in own]):.3f}", " to ".join(ends)]
            beyond = [row for row in own if row["within"] is False]
            beyond.sort(key=lambda row: -abs(row["sum_over_accepted"] - 1))
            for row in beyond[:MOST_NAMED]:
                outside.append(f"{row['trace']} {row['sum_over_accepted']:.3f} at {nodes}")
            if more := beyond[MOST_NAMED:]:
                outside.append(f"{len(more)} more at {nodes}")
        lines.append(f"| {mode} | {' | '.join(cells)} | {', '.join(outside)} |")
    return "\n".join(lines)


def write(path: Path, rows: list[dict[str, Any]], key: str, order: list[str]) -> None:
    """The figures with how they came about, in this order of ``key``; rows of other keys stay."""
    new = {row[key] for row in rows}
    if path.exists():
        rows = [row for row in json.loads(path.read_text())["rows"] if row[key] not in new] + rows
    rows = sorted(rows, key=lambda row: order.index(row[key]))
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip()
    about = {
        "command": f"python {' '.join(sys.argv)}",
        "commit": commit,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    lines = ",\n  ".join(json.dumps(rounded(row)) for row in rows)
    path.write_text(json.dumps(about, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streams", type=Path, nargs="?")
    for name in ("store", "mini", "topk", "sampled", "topk-store", "json"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--modes", help="names, with semicolons between them; all of them by default")
    parser.add_argument("--budgets", default="16,64")
    parser.add_argument("--tokens", type=int, default=1 << 30, help="response tokens of each trace, about")
    return parser.parse_args()


def first(path: Path, tokens: int) -> list[Request]:
    """A trace's requests up to so many response tokens."""
    found: list[Request] = []
    for request in read_trace(path):
        if tokens <= 0:
            break
        found.append(request)
        tokens -= len(request.response_ids)
    return found


def main() -> None:
    given = arguments()
    names = given.modes.split("; ") if given.modes else [mode.name for mode in MODES]
    paths = {"streams": sorted(given.streams.glob("dev.*.jsonl")) if given.streams else []}
    paths |= {name: [path] for name in ("topk", "sampled") if (path := getattr(given, name))}
    streams = {
        kind: {trace_name(path).removeprefix("dev."): first(path, given.tokens) for path in found}
        for kind, found in paths.items()
    }
    stores = {name: path for name in ("store", "mini", "topk_store") if (path := getattr(given, name))}
    budgets = [int(nodes) for nodes in given.budgets.split(",")]
    rows = []
    for found in measure([mode for mode in MODES if mode.name in names], streams, stores, budgets):
        rows.append(found)
        mark = {None: "few", True: "", False: "OUTSIDE"}[found["within"]]
        print(
            f"{found['mode']:36} {found['trace']:16} {found['budget']:3} accepted"
            f" {found['accepted_per_step']:.3f} sum {found['sum_over_accepted'] or 0:.3f} {mark}",
            flush=True,
        )
    print(table(rows))
    if given.json:
        write(given.json, rows, "mode", [mode.name for mode in MODES])


if __name__ == "__main__":
    main()
