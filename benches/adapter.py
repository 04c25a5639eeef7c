"""What an adapter costs in an engine's step: whole rows by request id, chains by the rule, lists of tokens.

Usage: adapter.py [--json FILE] [--context 800] [--steps 400] [--batches 1,8,32] [--fixed]

Each request holds `context` tokens of text that quotes itself and gets one to three tokens a step. Two ways
take turns on the same rows, each with a drafter of its own on one thread: `adapter` is `Requests.step` with
rows of the engine's array, and lists made of its chains; `step` is `Drafter.step` with the new tokens alone,
and nothing done with what it gives. With `--fixed` there is no rule, and every chain is as long as it can be,
up to 8. Times are in microseconds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from time import perf_counter_ns
from typing import Any

import numpy as np

from sssd import DraftBatch, Drafter, Requests, _core
from sssd.hardware import CostCurve, SizingRule

K = 8
TURN, COLD = 25, 5


def quoting(rng: np.random.Generator, count: int) -> np.ndarray:
    base = rng.integers(3, 49_000, 150)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < count:
        start = rng.integers(0, 100)
        parts += [base[start : start + rng.integers(5, 40)], rng.integers(3, 49_000, 1)]
    return np.concatenate(parts)[:count].astype(np.int32)


def rule() -> SizingRule:
    """Passes over n tokens take 10 ms and 0.2 ms for each."""
    return SizingRule(
        CostCurve([1, 64], [1, 1024], [0], [[[0.0102], [0.2148]]] * 2, packed=True), max_nodes=K
    )


class Adapter:
    """The engine's rows by id."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, fixed: bool) -> None:
        self.requests, self.rows = Requests(Drafter(threads=1)), rows
        self.rule = None if fixed else rule()
        self.ids = [f"request-{i}" for i in range(len(rows))]
        self.out = DraftBatch(len(rows), len(rows) * K)
        self.times: list[int] = []

    def step(self, lengths: np.ndarray, new: list[np.ndarray]) -> list[list[int]]:
        start = perf_counter_ns()
        rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]
        options = {"rows": rows, "shape": "chain", "rule": self.rule, "out": self.out}
        batch = self.requests.step(self.ids, max_nodes=K, **options)
        chains, ends = batch.token_ids.tolist(), batch.offsets.tolist()
        lists = [chains[start:end] for start, end in pairwise(ends)]
        self.times.append(perf_counter_ns() - start)
        observe(self.rule, batch, len(rows))
        return lists


class Step:
    """The core's own call."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, fixed: bool) -> None:
        drafter = self.drafter = Drafter(threads=1)
        self.sequences = [drafter.begin(row[:length]) for row, length in zip(rows, lengths, strict=True)]
        self.out, self.rule = DraftBatch(len(rows), len(rows) * K), None if fixed else rule()
        self.times: list[int] = []

    def step(self, lengths: np.ndarray, new: list[np.ndarray]) -> list[list[int]]:
        flat, offsets = np.concatenate(new), np.append(0, np.cumsum([len(tokens) for tokens in new]))
        start = perf_counter_ns()
        options = {"shape": "chain", "rule": self.rule, "out": self.out}
        batch = self.drafter.step(self.sequences, flat, offsets, K, **options)
        self.times.append(perf_counter_ns() - start)
        observe(self.rule, batch, len(new))
        return [tree.token_ids.tolist() for tree in batch]


def observe(rule: SizingRule | None, batch: DraftBatch, count: int) -> None:
    if rule is None:
        return
    size = int(batch.offsets[-1])
    seconds = 0.01 + 0.0002 * (count + size)
    rule.observe(batch=count, size=size, context=batch.context, seconds=seconds, tokens=2.0 * count)


def measure(batch: int, context: int, steps: int, fixed: bool) -> dict[str, float]:
    rng = np.random.default_rng(batch)
    rows = np.stack([quoting(rng, context + 3 * steps + 3) for _ in range(batch)])
    lengths = np.full(batch, context)
    ways = Adapter(rows, lengths, fixed), Step(rows, lengths, fixed)
    ways[0].requests.step(ways[0].ids, rows=[row[:context] for row in rows], max_nodes=0)
    for turn in range(0, steps, TURN):
        plans = []
        for step in range(turn, min(turn + TURN, steps)):
            before, lengths = lengths, lengths + 1 + step % 3
            plans.append((lengths, [row[a:b] for row, a, b in zip(rows, before, lengths, strict=True)]))
        results = [[way.step(*plan) for plan in plans] for way in ways]
        if results[0] != results[1]:
            raise SystemExit("the ways disagree")
    figures: dict[str, float] = {"batch": batch}
    for name, way in zip(("adapter", "step"), ways, strict=True):
        times = np.array(way.times[: steps // TURN * TURN]).reshape(-1, TURN)[1:, COLD:] / 1e3
        figures |= {
            f"{name}_us_p50": float(np.median(times)),
            f"{name}_us_p10": float(np.percentile(times, 10)),
        }
    return figures


def main() -> None:
    if _core.build_profile != "release":
        raise SystemExit("this is a debug build; run `maturin develop --release`")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--context", type=int, default=800)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--fixed", action="store_true", help="no rule")
    arguments = parser.parse_args()
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        rows.append(measure(batch, arguments.context, arguments.steps, arguments.fixed))
        print(" ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        figures: dict[str, Any] = {
            "command": f"python {' '.join(sys.argv)}",
            "commit": commit,
            "machine": machine,
            "rows": rows,
        }
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
