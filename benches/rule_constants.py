"""What each constant of the rule for the size of drafts is worth, in tokens per second.

Usage: rule_constants.py OUT.md TRACE.jsonl ... [--tokens 4000] [--longest 200] [--only NAME,...]

Each constant of sssd.hardware.SizingRule is halved, doubled, and made to do nothing where that can be said.
Requests are served as `python -m sssd simulate` does it, at batches of 1, 4, 16 and 64, without a
datastore: on a machine that keeps to its curve; on one that does not (passes with drafts take half as long
again, times scatter, some passes hang, and every so often the whole machine is half as fast for a while);
and on that one with drafts that never come true. What is drafted at each place of a response is recorded
once, with what the request has told so far, so that all variants choose from the same drafts. A figure is
the mean change over traces and batches, with its standard error.
"""

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from sssd import Drafter, DraftTree
from sssd.hardware import CostCurve, SizingRule
from sssd.hardware.simulate import Adaptive, simulate
from sssd.replay import Request, accepted_path, read_trace

CURVE = "h100-llama-3-8b-roofline"
BATCHES = (1, 4, 16, 64)
MOST_NODES, LEAST_PROB = 512, 0.0002
"""Of the recorded drafts."""
NEVER = 1e9
OFF = {
    "spare_nodes": 0,
    "longest_wait": 1,
    "min_prob_memory": 1.0,
    "least_min_prob": 0.0,
    "window": 1,
    "trust": 0.0,
    "forget_every": NEVER,
    "strangest": NEVER,
    "furthest": NEVER,
    "news": 0.0,
    "plain_every": NEVER,
    "plain_at_once": 0,
    "first_move": NEVER,
    "change": NEVER,
    "changes_apart": 0,
    "debt": NEVER,
}
SLOWER_WITH_DRAFTS, SCATTER, HANGS, HANG, SLOW_FOR = 1.5, 0.1, 0.01, 4.0, 300
SLOWER = 2.0
MACHINES = ("as the curve says", "unlike the curve", "unlike it, all drafts wrong")
LARGEST_MARGIN = 1.0


class Remembered:
    """A curve that is asked the same again and again."""

    def __init__(self, curve: CostCurve) -> None:
        self._curve, self._times = curve, {}

    def __getattr__(self, name: str):
        return getattr(self._curve, name)

    def times(self, batch: int, sizes, context: float) -> np.ndarray:
        key = batch, tuple(sizes), context
        if key not in self._times:
            self._times[key] = self._curve.times(batch, sizes, context)
        return self._times[key]


def middle(context: float) -> float:
    """The context that `simulate` takes for all within a percent."""
    return 2 ** (round(64 * np.log2(context + 64)) / 64) - 64


class Recorded:
    """A sequence that drafts what it did before."""

    def __init__(self, drafts: list[tuple[DraftTree, np.ndarray]], wrong: bool) -> None:
        self._drafts, self._wrong = drafts, wrong
        self.position = 1

    def draft(self, max_nodes: int, min_prob: float) -> DraftTree:
        tree, _ = self._drafts[self.position]
        likely = int(np.count_nonzero(tree.probs >= min_prob))
        return tree.first(min(max_nodes, likely))

    def accept(self, tree: DraftTree | None) -> int:
        """Goes on as the response did; returns how many nodes were right."""
        _, path = self._drafts[self.position]
        accepted = 0 if tree is None or self._wrong else int(np.searchsorted(path, len(tree)))
        self.position += accepted + 1
        return accepted

    def cut_draft(self, nodes: int) -> None:
        """Learns nothing."""

    def close(self) -> None:
        """Nothing is held."""


def record(request: Request, end_token_id: int) -> list[tuple[DraftTree, np.ndarray]]:
    """Drafts at each place of the response, and their nodes that came true."""
    drafts = []
    response = request.response_ids
    drafter = Drafter(end_token_ids=[end_token_id], live_bytes=0, soft_bytes=0)
    with drafter.begin(request.prompt_ids) as sequence:
        for position in range(len(response)):
            tree = sequence.draft(MOST_NODES, min_prob=LEAST_PROB)
            drafts.append((tree, accepted_path(tree, response[position:])))
            sequence.extend(response[position : position + 1])
    return drafts


class Machine(Adaptive):
    """The rule on a machine; ``seconds`` is what it really took."""

    def __init__(self, drafts: dict, curve: Remembered, machine: str, **options: float) -> None:
        wrong = machine == MACHINES[2]
        super().__init__(lambda request: Recorded(drafts[id(request)], wrong), curve)
        self.rule = SizingRule(curve, options=options)
        self.faithful, self.seconds = machine == MACHINES[0], 0.0
        self._steps, self._chance = 0, random.Random(0)

    def draft(self, rows, context: float):
        return super().draft(rows, middle(context))

    @staticmethod
    def _accept(row, sequence: Recorded, tree: DraftTree | None) -> int:
        return sequence.accept(tree)

    def observe(
        self, batch: int, size: int, context: float, seconds: float, tokens: int, drafting: float
    ) -> None:
        if not self.faithful:
            scatter, hangs = self._chance.gauss(0.0, SCATTER), self._chance.random() < HANGS
            seconds *= math.exp(scatter) * (HANG if hangs else 1.0) * (SLOWER_WITH_DRAFTS if size else 1.0)
            if self._steps // SLOW_FOR % 2:
                seconds *= SLOWER
        self._steps += 1
        self.seconds += seconds + drafting
        super().observe(batch, size, middle(context), seconds, tokens, drafting)


def rates(traces, drafts: dict, curve: Remembered, machine: str, **options: float) -> np.ndarray:
    """The log of tokens per second, by trace and batch."""
    logs = []
    for requests in traces:
        for batch in BATCHES:
            rule = Machine(drafts, curve, machine, **options)
            outcome = simulate(requests, rule, curve, batch)
            logs.append(math.log(outcome.tokens / rule.seconds))
    return np.array(logs)


def values(name: str, value: float) -> dict[str, float]:
    """The values to try, by what they are."""
    half, double = value / 2, value * 2
    if name == "min_prob_margin":
        double = LARGEST_MARGIN
    found = {"half": half, "double": double}
    return {**found, "off": OFF[name]} if name in OFF else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4000, help="of responses, of each trace")
    parser.add_argument("--longest", type=int, default=200, help="of which so many of each are served")
    parser.add_argument("--only", default="", help="names of constants, with commas")
    parser.add_argument("--end-token-id", type=int, default=128009)
    arguments = parser.parse_args()
    curve = Remembered(CostCurve.load(CURVE))
    traces = []
    for path in arguments.traces:
        traces.append([])
        for request in read_trace(path):
            if sum(len(other.response_ids) for other in traces[-1]) < arguments.tokens:
                response = request.response_ids[: arguments.longest]
                traces[-1].append(replace(request, response_ids=response))
    drafts = {
        id(request): record(request, arguments.end_token_id) for requests in traces for request in requests
    }
    constants = {name: value for name, (value, _) in SizingRule.options().items()}
    standard = {machine: rates(traces, drafts, curve, machine) for machine in MACHINES}
    rows = []
    for name in arguments.only.split(",") if arguments.only else constants:
        value = constants[name]
        for kind, other in values(name, value).items():
            cells = []
            for machine in MACHINES:
                change = 100 * (rates(traces, drafts, curve, machine, **{name: other}) - standard[machine])
                error = change.std() / math.sqrt(len(change))
                cells.append(f"{change.mean():+.2f} ± {error:.2f}")
            rows.append(f"| `{name}` | {value:.4g} | {kind}: {other:.4g} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    header = [
        f"| constant | default | tried | {', % | '.join(MACHINES)}, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    arguments.out.write_text("\n".join([*header, *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
