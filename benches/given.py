"""Drafts from outside as one more source, by replay: ours, the guest, both, and the rule of shipped hybrids.

Usage: given.py TRACE.jsonl ... [--topk smollm2-topk.jsonl.xz] [--json FILE] [--budgets 8,16] [--keep]

Guests, all made from the recording:
  q/TELLS  a chain of 8 tokens, each right with a confidence drawn around q, none after a wrong one; it tells
           its confidences as they are (honest), too large (bold: their fourth root), or not at all (silent)
  mtp      with recorded top-k: the runner-ups of the position before, two tokens deep, with probabilities
  racer    with recorded top-k, RACER's rule as its paper describes it (arXiv 2604.14885): the longest of the
           last 9 to 1 tokens that occurred before goes on as it did, to 10 tokens in all, and tokens are
           followed by the last top 8 that the target held probable after them
The hybrid drafts ours where the last four tokens have occurred before, else the guest's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sssd import Datastore, Drafter, DraftTree
from sssd.replay import Request, count_accepted, extend, read_trace, trace_name

DEPTH = 8
QUALITIES = (0.0, 0.3, 0.6, 0.8)
TELLS = ("honest", "bold", "silent")


@dataclass
class Guest:
    """A drafter of one request: ``propose`` gives what it drafts before ``position`` of the response."""

    request: Request
    propose: Callable[[int, int], DraftTree]
    has_probs: bool = True


def known_quality(request: Request, quality: float, tells: str) -> Guest:
    """A chain whose tokens are right with probability ``quality`` in the mean."""
    random = np.random.default_rng(len(request.prompt_ids) * 1_000 + len(request.response_ids))
    text = np.concatenate([request.prompt_ids, request.response_ids])
    response = request.response_ids

    def propose(position: int, nodes: int) -> DraftTree:
        depth = min(DEPTH, nodes)
        confidence = random.beta(4 * quality, 4 * (1 - quality), DEPTH) if quality else np.full(DEPTH, 0.5)
        right = random.random(DEPTH) < (confidence if quality else 0.0)
        wrong = text[random.integers(0, len(text), DEPTH)]
        truth = np.zeros(DEPTH, np.int64)
        rest = response[position : position + DEPTH]
        truth[: len(rest)] = rest
        missed = wrong + (wrong == truth)
        tokens = np.where(np.logical_and.accumulate(right), truth, missed)
        told = {"honest": confidence, "bold": confidence**0.25, "silent": None}[tells]
        probs = None if told is None else np.cumprod(told)[:depth].astype(np.float32).tolist()
        return DraftTree(tokens[:depth], np.arange(-1, depth - 1), probs)

    return Guest(request, propose, tells != "silent")


def multi_token_head(request: Request) -> Guest:
    """The runner-ups of the position before, twice."""
    ids, probs = request.topk_ids, request.topk_probs
    assert ids is not None
    assert probs is not None

    def propose(position: int, nodes: int) -> DraftTree:
        row = [
            (int(token), float(prob))
            for token, prob in zip(ids[position - 1], probs[position - 1], strict=True)
            if token != request.response_ids[position - 1]
        ]
        tokens, parents, paths = [], [], []
        for token, prob in row:
            tokens.append(token), parents.append(-1), paths.append(prob)
        for at, (_, above) in enumerate(row):
            for token, prob in row:
                if token != row[at][0]:
                    tokens.append(token), parents.append(at), paths.append(above * prob)
        order = sorted(range(len(tokens)), key=lambda node: -paths[node])[:nodes]
        place = {node: at for at, node in enumerate(order)}
        return DraftTree(
            [tokens[node] for node in order],
            [place.get(parents[node], -1) if parents[node] >= 0 else -1 for node in order],
            [paths[node] for node in order],
        )

    return Guest(request, propose)


def racer(request: Request) -> Guest:
    """Hits of the longest n-gram, then the last top 8 after each token, breadth first."""
    ids = request.topk_ids
    assert ids is not None
    text = [int(token) for token in request.prompt_ids]
    seen: dict[tuple[int, ...], int] = {}
    after: dict[int, list[int]] = {}
    read = [0, 0]

    def update(position: int) -> None:
        text.extend(
            int(token) for token in request.response_ids[len(text) - len(request.prompt_ids) : position]
        )
        for end in range(read[0], len(text)):
            for length in range(1, min(9, end) + 1):
                seen[tuple(text[end - length : end])] = end
        read[0] = len(text)
        for row in range(read[1], position):
            before = text[len(request.prompt_ids) + row - 1]
            after[before] = [int(token) for token in ids[row]]
        read[1] = position

    def propose(position: int, nodes: int) -> DraftTree:
        update(position)
        tokens: list[int] = []
        parents: list[int] = []
        children: dict[tuple[int, int], int] = {}

        def add(parent: int, token: int) -> int:
            if (parent, token) not in children and len(tokens) < nodes:
                children[parent, token] = len(tokens)
                tokens.append(token), parents.append(parent)
            return children.get((parent, token), -2)

        for length in range(min(9, len(text)), 0, -1):
            start = seen.get(tuple(text[-length:]))
            if start is not None:
                node = -1
                for token in text[start : start + 10 - length]:
                    node = add(node, token)
                    if node == -2:
                        break
                break
        queue = [(-1, text[-1], 8)]
        for parent, token, width in queue:
            for rank, next_token in enumerate(after.get(token, [])[:width]):
                node = add(parent, next_token)
                if node == -2:
                    break
                queue.append((node, next_token, max(width >> rank, 1)))
        return DraftTree(tokens, parents)

    return Guest(request, propose, has_probs=False)


@dataclass
class Counts:
    """Accepted and expected tokens of the four ways, and steps."""

    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    accepted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    expected: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def per_step(self, way: str) -> float:
        return self.accepted[way] / max(self.steps[way], 1)

    def calibration(self, way: str) -> float:
        return self.expected[way] / max(self.accepted[way], 1)


def run(
    way: str, guest: Guest | None, request: Request, nodes: int, drafter: Drafter, counts: Counts
) -> None:
    """Replays one request one way."""
    response = request.response_ids
    text = list(request.prompt_ids) + list(response)
    grams: set[tuple[int, ...]] = set()
    read = 3
    with drafter.begin(request.prompt_ids) as sequence:
        extend(sequence, request, 0, 1)
        position = 1
        while position < len(response):
            length = len(request.prompt_ids) + position
            ours = way == "ours"
            if way == "hybrid":
                for end in range(read + 1, length):
                    grams.add(tuple(text[end - 4 : end]))
                read = max(read, length - 1)
                ours = tuple(text[length - 4 : length]) in grams
            if ours or guest is None:
                tree = sequence.draft(nodes)
            elif way == "both":
                tree = sequence.draft(nodes, given=guest.propose(position, nodes))
            else:
                tree = guest.propose(position, nodes)
            found = count_accepted(tree, response[position:])
            counts.steps[way] += 1
            counts.accepted[way] += found
            counts.expected[way] += tree.expected_accepted
            end = min(position + found + 1, len(response))
            extend(sequence, request, position, end)
            position = end


def measure(
    name: str,
    guests: dict[str, Any],
    requests: list[Request],
    budgets: list[int],
    store: Datastore | None,
    keep: bool,
) -> list[dict[str, Any]]:
    """Rows of a workload: one for each guest and budget."""
    rows = []
    soft = 1 << 20 if requests[0].topk_ids is not None else 0

    def drafters() -> Iterator[Drafter]:
        """One for each request, or the same for all: what a request learned is kept by its end."""
        drafter = Drafter(datastore=store, live_bytes=0, soft_bytes=soft, threads=1)
        while True:
            yield drafter
            if not keep:
                drafter = Drafter(datastore=store, live_bytes=0, soft_bytes=soft, threads=1)

    for nodes in budgets:
        alone = Counts()
        for request, drafter in zip(requests, drafters(), strict=False):
            run("ours", None, request, nodes, drafter, alone)
        for label, make in guests.items():
            counts = Counts(alone.steps.copy(), alone.accepted.copy(), alone.expected.copy())
            counts.steps = defaultdict(int, counts.steps)
            counts.accepted, counts.expected = (
                defaultdict(int, counts.accepted),
                defaultdict(float, counts.expected),
            )
            for way in ("guest", "both", "hybrid"):
                for request, drafter in zip(requests, drafters(), strict=False):
                    run(way, make(request), request, nodes, drafter, counts)
            ours, guest, both, hybrid = (counts.per_step(way) for way in ("ours", "guest", "both", "hybrid"))
            row = {
                "trace": name,
                "budget": nodes,
                "guest": label,
                "accepted_ours": ours,
                "accepted_guest": guest,
            }
            row |= {"accepted_both": both, "accepted_hybrid": hybrid}
            row |= {"over_better": both / max(ours, guest, 1e-9), "over_hybrid": both / max(hybrid, 1e-9)}
            row |= {"over_ours": both / max(ours, 1e-9), "expected_over_accepted": counts.calibration("both")}
            rows.append(row)
            print(
                f"{name:16} {nodes:3} {label:12} ours {ours:.3f} guest {guest:.3f} both {both:.3f} hybrid"
                f" {hybrid:.3f} | over better {row['over_better']:.3f} hybrid {row['over_hybrid']:.3f}"
                f" expected {row['expected_over_accepted']:.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*")
    parser.add_argument("--topk", help="a trace with recorded top-k")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--budgets", default="8,16")
    parser.add_argument("--requests", type=int, default=40, help="requests of each trace")
    parser.add_argument("--tokens", type=int, default=4000, help="response tokens of each trace, about")
    parser.add_argument("--datastore")
    parser.add_argument("--keep", action="store_true", help="one drafter for all requests of a trace")
    arguments = parser.parse_args()
    budgets = [int(budget) for budget in arguments.budgets.split(",")]
    store = Datastore(arguments.datastore) if arguments.datastore else None

    def known(quality: float, tells: str) -> Callable[[Request], Guest]:
        return lambda request: known_quality(request, quality, tells)

    guests: dict[str, Any] = {
        f"{quality}/{tells}": known(quality, tells) for quality in QUALITIES for tells in TELLS
    }
    rows = []
    for path in arguments.traces:
        rows += measure(trace_name(path), guests, few(path, arguments), budgets, store, arguments.keep)
    if arguments.topk:
        with_topk = guests | {"mtp": multi_token_head, "racer": racer}
        rows += measure(
            trace_name(arguments.topk),
            with_topk,
            few(arguments.topk, arguments),
            budgets,
            store,
            arguments.keep,
        )
    better = [row for row in rows if row["accepted_guest"] > 0.05]
    useless = [row for row in rows if row["accepted_guest"] <= 0.05]
    summary = {
        "least_over_better": min((row["over_better"] for row in better), default=None),
        "mean_over_better": float(np.mean([row["over_better"] for row in better])) if better else None,
        "least_over_hybrid": min((row["over_hybrid"] for row in better), default=None),
        "least_over_ours_where_useless": min((row["over_ours"] for row in useless), default=None),
    }
    print(json.dumps(summary))
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        figures = {"command": f"python {' '.join(sys.argv)}", "commit": commit, "machine": machine}
        lines = ",\n ".join(json.dumps(rounded(row)) for row in rows)
        with open(arguments.json, "w") as file:
            file.write(json.dumps(figures | {"summary": rounded(summary)}, indent=1)[:-2])
            file.write(f',\n "rows": [\n {lines}\n ]\n}}\n')


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """The same with floats of four digits after the point."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def few(path: str, arguments: argparse.Namespace) -> list[Request]:
    """The first requests of a trace."""
    requests: list[Request] = []
    left = arguments.tokens
    for request in read_trace(path):
        if left <= 0 or len(requests) == arguments.requests:
            break
        requests.append(request)
        left -= len(request.response_ids)
    return requests


if __name__ == "__main__":
    main()
