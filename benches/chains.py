"""Chains sized by the rule on machines that it does not know, against fixed lengths and one who knows all.

Usage: chains.py TRACE.jsonl ... [--json FILE] [--batches 1,8] [--per-node 0.003,0.03,0.3] [--noise 0.1]
       [--per-row 0.09] [--first flat] [--tokens 4000] [--datastore FILE] [--options NAME=VALUE ...]

A pass over n nodes of b requests takes 1 + PER_ROW (b - 1) + PER_NODE n, by default as much for a row as for
a node; 0.03 and 0.09 are SmolLM2-135M in vLLM on two cores (benches/results/vllm-turns.jsonl), 0.3 is
llama.cpp. Times scatter by NOISE (of their logarithm), and one in a hundred takes three times as long. The
rule begins with a curve on which tokens cost nothing (`flat`), or 0.3 each (`steep`), or the machine's own
(`true`). What is drafted at each place of a response, of 16 nodes, is recorded once, with what the request
has told so far: all choose from the same chains. Requests are served as `python -m sssd simulate` does it.

`fixed` are chains of 1 to 16 nodes, `cut` the same without nodes of a probability below 0.1, as suffix
decoding does it by default; the best of each is chosen for each trace afterwards. `knows` is told the
machine's costs, and the rate at which its tokens come, before it begins.
"""

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np

from sssd import Drafter, DraftTree
from sssd.hardware import CostCurve, SizingRule
from sssd.hardware.simulate import Adaptive, Autoregressive, simulate
from sssd.replay import Request, accepted_path, read_trace, trace_name

LENGTHS = (1, 2, 4, 8, 16)
LONGEST, LEAST_PROB = max(LENGTHS), 0.0005
"""Of the recorded chains."""
CUT = 0.1
HANGS, HANG = 0.01, 3.0
FIRST = ("flat", "steep", "true")
MOST = 1 << 16

Chain = tuple[DraftTree, int]
"""Drafted at a place of a response, and how many of its nodes came true."""


def record(request: Request, end_token_id: int, datastore: str | None) -> list[Chain]:
    """The chains at each place of a response; nothing is known of other requests."""
    chains, response = [], request.response_ids
    drafter = Drafter(end_token_ids=[end_token_id], live_bytes=0, datastore=datastore, threads=1)
    with drafter.begin(request.prompt_ids, request.prediction_ids) as sequence:
        for position in range(len(response)):
            chain = sequence.draft(LONGEST, min_prob=LEAST_PROB, shape="chain")
            chains.append((chain, len(accepted_path(chain, response[position:]))))
            sequence.extend(response[position : position + 1])
    return chains


def linear(per_row: float, per_node: float) -> CostCurve:
    """1 + per_row (b - 1) + per_node n."""
    batches, tokens = (1, 1024), (1, MOST)
    seconds = [
        [[1 + (per_row - per_node) * (rows - 1) + per_node * (count - 1)] for count in tokens]
        for rows in batches
    ]
    return CostCurve(batches, tokens, [0], seconds, packed=True)


class Machine:
    """Takes the time of each step, which scatters."""

    def __init__(self, noise: float) -> None:
        self.noise, self.seconds, self._chance = noise, 0.0, random.Random(0)

    def take(self, seconds: float) -> float:
        self.seconds += seconds
        if not self.noise:
            return seconds
        hangs = self._chance.random() < HANGS
        return seconds * math.exp(self._chance.gauss(0.0, self.noise)) * (HANG if hangs else 1.0)


class Static(Autoregressive):
    """What `take` says of each chain's path probabilities, whatever comes of it."""

    name = "static"

    def __init__(self, chains: dict[int, list[Chain]], take) -> None:
        self.chains, self.take = chains, take

    def begin(self, request: Request) -> list[Chain]:
        return self.chains[id(request)]

    def draft(self, rows, context: float):
        found = [row.state[row.position] for row in rows]
        counts = self.take([tree for tree, _ in found])
        accepted = [min(count, right) for (_, right), count in zip(found, counts, strict=True)]
        return counts, accepted, len(rows), sum(counts)


def fixed(length: int, least: float):
    return lambda trees: [min(length, int(np.count_nonzero(tree.probs >= least))) for tree in trees]


class Ruled(Adaptive):
    """The rule, on a machine."""

    def __init__(self, chains: dict[int, list[Chain]], curve: CostCurve, noise: float, options: dict) -> None:
        super().__init__(lambda request: Recorded(chains[id(request)]), curve, "chain")
        self.rule = SizingRule(curve, max_nodes=LONGEST, options=options)
        self.machine = Machine(noise)

    @staticmethod
    def _accept(row, sequence: "Recorded", tree: DraftTree | None) -> int:
        return sequence.accept(tree)

    def observe(self, batch, size, context, seconds, tokens, drafting) -> None:
        super().observe(batch, size, context, self.machine.take(seconds), tokens, drafting)


class Recorded:
    """A sequence that drafts what it did before."""

    def __init__(self, chains: list[Chain]) -> None:
        self._chains, self._position = chains, 1

    def draft(self, max_nodes: int, min_prob: float, shape: str) -> DraftTree:
        tree, _ = self._chains[self._position]
        return tree.first(min(max_nodes, int(np.count_nonzero(tree.probs >= min_prob))))

    def accept(self, tree: DraftTree | None) -> int:
        accepted = 0 if tree is None else min(len(tree), self._chains[self._position][1])
        self._position += accepted + 1
        return accepted

    def cut_draft(self, nodes: int) -> None:
        """Learns nothing."""

    def close(self) -> None:
        """Nothing is held."""


def knows(requests, chains, curve: CostCurve, batch: int, plain: float) -> float:
    """The speed of one who knows costs and rate."""
    best = rate = 1.0
    for _ in range(4):
        costs = curve.costs(batch, 0, LONGEST + 1)
        price = rate * batch / float(costs.seconds[0])
        rule = Static(chains, lambda trees, costs=costs, price=price: costs.allocate(trees, price))
        rate = simulate(requests, rule, curve, batch).rate / plain
        if rate <= best:
            break
        best = rate
    return best


def measure(requests, chains, arguments, batch: int, per_node: float) -> dict[str, float]:
    """Tokens per second over those of plain decoding."""
    per_row = per_node if arguments.per_row is None else arguments.per_row
    true = linear(per_row, per_node)
    first = {"true": true, "flat": linear(0.0, 0.0), "steep": linear(0.3, 0.3)}[arguments.first]
    plain = simulate(requests, Autoregressive(), true, batch).rate
    row: dict[str, float] = {"batch": batch, "per_node": per_node}
    for name, least in (("fixed", 0.0), ("cut", CUT)):
        found = {
            length: simulate(requests, Static(chains, fixed(length, least)), true, batch).rate / plain
            for length in LENGTHS
        } | {0: 1.0}
        row[f"{name}_best"] = max(found, key=found.__getitem__)
        row[name] = found[row[f"{name}_best"]]
        row[f"{name}_longest"] = found[LONGEST]
    row["knows"] = knows(requests, chains, true, batch, plain)
    rule = Ruled(chains, first, arguments.noise, dict(arguments.options))
    outcome = simulate(requests, rule, true, batch)
    row["rule"] = outcome.rate / plain
    row["nodes_per_step"] = outcome.verified / max(outcome.steps, 1)
    row["tokens_per_step"] = outcome.tokens_per_step
    return row


def option(text: str) -> tuple[str, float]:
    name, value = text.split("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--per-node", default="0.003,0.03,0.3")
    parser.add_argument("--per-row", type=float)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--first", choices=FIRST, default="flat")
    parser.add_argument("--tokens", type=int, default=4000, help="of responses, of each trace")
    parser.add_argument("--longest", type=int, default=1000, help="of which so many of each are served")
    parser.add_argument("--end-token-id", type=int, default=128009)
    parser.add_argument("--datastore")
    parser.add_argument("--options", type=option, nargs="+", default=[])
    arguments = parser.parse_args()
    rows = []
    for path in arguments.traces:
        requests: list[Request] = []
        for request in read_trace(path):
            if sum(len(other.response_ids) for other in requests) < arguments.tokens:
                requests.append(replace(request, response_ids=request.response_ids[: arguments.longest]))
        chains = {
            id(request): record(request, arguments.end_token_id, arguments.datastore) for request in requests
        }
        for batch in map(int, arguments.batches.split(",")):
            for per_node in map(float, arguments.per_node.split(",")):
                row = measure(requests, chains, arguments, batch, per_node)
                rows.append({"trace": trace_name(path), **row})
                print(
                    " ".join(
                        f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
                    )
                )
    over = [
        (row["rule"] / row["fixed"], row["rule"], row["rule"] / row["knows"], row["rule"] / row["cut"])
        for row in rows
    ]
    for name, values in zip(
        ("best fixed", "plain", "knows", "best cut"), zip(*over, strict=True), strict=True
    ):
        print(f"rule over {name}: least {min(values):.4f} mean {sum(values) / len(values):.4f}")
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        figures = {"command": f"python {' '.join(sys.argv)}", "commit": commit, "machine": machine}
        with open(arguments.json, "w") as file:
            json.dump({**figures, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
