"""One engine step (extend and draft) for a batch: one call on one thread, on two, single calls, and chains.

Usage: serving.py [TOKENS.npy] [--json FILE] [--batch 64] [--context 4096] [--nodes 16]

Each sequence holds `context` tokens and is extended by two tokens a step, as if one had been accepted;
nothing is learned from others and there is no datastore. The ways take turns, some steps at a time, each on
its own drafter with the same sequences, so that a busy machine is busy for all of them; the first steps of a
turn find cold caches and do not count. Times are medians over the other steps.

Tokens come from a .npy array of ids (a stretch for each sequence), or are made up: passages of
Zipf-distributed ids, a third of them repeated with a few changes, as in text that quotes itself.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from time import perf_counter_ns

import numpy as np

from sssd import DraftBatch, Drafter, _core

TOKENS = 2
PASSAGE = 64
TURN = 25
COLD = 5


def made_up(rng: np.random.Generator, count: int) -> np.ndarray:
    passages: list[np.ndarray] = []
    while len(passages) * PASSAGE < count:
        if passages and rng.random() < 1 / 3:
            passage = passages[rng.integers(len(passages))].copy()
            passage[rng.integers(PASSAGE, size=3)] = rng.zipf(1.2, 3) % 50_000
        else:
            passage = rng.zipf(1.2, PASSAGE) % 50_000
        passages.append(passage)
    return np.concatenate(passages)[:count].astype(np.int32)


class Way:
    """A way to take a step for all sequences."""

    def __init__(
        self, rows: np.ndarray, context: int, nodes: int, threads: int, single: bool, chains: bool = False
    ) -> None:
        self.drafter = Drafter(threads=threads)
        self.sequences = [self.drafter.begin(row[:context]) for row in rows]
        self.nodes, self.single, self.chains = nodes, single, chains
        self.arrays = np.zeros((len(rows), nodes), np.int32), np.zeros(len(rows), np.int32)
        self.out = DraftBatch(len(rows), len(rows) * nodes)
        self.offsets = np.arange(len(rows) + 1) * TOKENS
        self.times: list[int] = []

    def step(self, tokens: np.ndarray) -> list[int]:
        """Takes a step and returns the sizes of the trees."""
        flat = tokens.ravel()
        start = perf_counter_ns()
        if self.single:
            trees = []
            for sequence, row in zip(self.sequences, tokens, strict=True):
                sequence.extend(row)
                trees.append(sequence.draft(self.nodes))
            self.times.append(perf_counter_ns() - start)
            return [len(tree) for tree in trees]
        if self.chains:
            options = {"shape": "chain", "out": self.out}
            batch = self.drafter.step(self.sequences, flat, self.offsets, self.nodes, **options)
            batch.chains(self.nodes, out=self.arrays[0], lengths=self.arrays[1])
        else:
            self.drafter.step(self.sequences, flat, self.offsets, self.nodes, out=self.out)
        self.times.append(perf_counter_ns() - start)
        return np.diff(self.out.offsets).tolist()

    def ms(self, percentile: float = 50) -> float:
        turns = np.array(self.times[: len(self.times) // TURN * TURN]).reshape(-1, TURN)
        return float(np.percentile(turns[1:, COLD:], percentile)) / 1e6


def main() -> None:
    if _core.build_profile != "release":
        raise SystemExit("this is a debug build; run `maturin develop --release`")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="?", help=".npy array of token ids")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    length = arguments.context + arguments.steps * TOKENS
    if arguments.tokens:
        tokens = np.array(np.load(arguments.tokens, mmap_mode="r")[: arguments.batch * length])
        rows = np.resize(tokens, (arguments.batch, length))
    else:
        rng = np.random.default_rng(0)
        rows = np.stack([made_up(rng, length) for _ in range(arguments.batch)])
    parts = {"one_thread": (1, False), "two_threads": (2, False), "single_calls": (1, True)}
    ways = {
        name: Way(rows, arguments.context, arguments.nodes, threads, single)
        for name, (threads, single) in parts.items()
    }
    chains = Way(rows, arguments.context, arguments.nodes, 1, False, chains=True)
    nodes: list[float] = []
    for turn in range(arguments.context, length, TOKENS * TURN):
        starts = range(turn, min(turn + TOKENS * TURN, length), TOKENS)
        sizes = [[way.step(rows[:, at : at + TOKENS]) for at in starts] for way in ways.values()]
        if any(size != sizes[0] for size in sizes):
            raise SystemExit("the ways disagree")
        nodes += np.mean(sizes[0], axis=1).tolist()
        for at in starts:
            chains.step(rows[:, at : at + TOKENS])
    figures = {
        "command": f"python {' '.join(sys.argv)}",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "batch": arguments.batch,
        "context": arguments.context,
        "nodes": arguments.nodes,
        "nodes_drafted": float(np.mean(nodes)),
        **{f"step_ms_{name}": way.ms() for name, way in (ways | {"chains": chains}).items()},
        **{f"step_ms_{name}_p10": way.ms(10) for name, way in ways.items()},
        **{f"step_ms_{name}_p99": way.ms(99) for name, way in ways.items()},
    }
    figures["speedup_two_threads"] = figures["step_ms_one_thread"] / figures["step_ms_two_threads"]
    figures["speedup_batch"] = figures["step_ms_single_calls"] / figures["step_ms_one_thread"]
    figures["chains_us_beyond_step"] = 1e3 * (figures["step_ms_chains"] - figures["step_ms_one_thread"])
    for name, value in figures.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
