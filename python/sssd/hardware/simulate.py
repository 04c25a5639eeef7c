"""Replays recorded requests under a cost curve, with continuous batching and different rules for the draft
size.

The replay rule is that of :mod:`sssd.replay`: every request on its own, the longest path that equals the
recording is accepted. The batch is always full: where a request ends the next one takes its place, and after
the last one the first comes again, until as many tokens are out as the trace has, and as many per place as a
request has on average. Prefill takes no time, under any rule. A step takes T(batch, width, context) for the
tokens that it verifies, plus the time of drafting; every rule is charged for the nodes that its trees have,
not for an unused budget.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal, Protocol

import numpy as np

from sssd._core import Drafter, DraftTree, Pace, SizingRule
from sssd._core import Sequence as DraftSequence
from sssd.hardware.curve import CostCurve
from sssd.replay import Request, count_accepted, extend

Shape = Literal["tree", "chain"]
"""What verifiers take; some only chains."""
FIXED_BUDGETS = (4, 8, 16, 32, 64)
FIXED_RULES = tuple(f"fixed-{budget}" for budget in FIXED_BUDGETS)
RULES = (*FIXED_RULES, "paper", "sssd", "perfect")
"""Names of the rules, in the order of the results. ``sssd`` is :class:`sssd.hardware.SizingRule`."""


class Rule(Protocol):
    """Decides how much is drafted and verified."""

    name: str

    def begin(self, request: Request) -> Any:
        """State of a request."""

    def draft(self, rows: Sequence["_Row"], context: float) -> tuple[list[int], list[int], int, int]:
        """Verified and accepted nodes of each row, and how many rows and nodes were drafted for that."""

    def observe(
        self, batch: int, size: int, context: float, seconds: float, tokens: int, drafting: float
    ) -> None:
        """Is told how the step went."""


@dataclass
class _Row:
    request: Request
    state: Any
    position: int = 1
    """Response tokens so far; the first comes from the prefill."""

    @property
    def left(self) -> int:
        return len(self.request.response_ids) - self.position


@dataclass
class Outcome:
    """What a simulation gave."""

    seconds: float = 0.0
    tokens: int = 0
    """Response tokens after the first of each request."""
    passes: int = 0
    steps: int = 0
    """Passes summed over the requests in each."""
    verified: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Mean acceptance length."""
        return self.tokens / max(self.steps, 1)


def simulate(requests: Sequence[Request], rule: Rule, curve: CostCurve, batch: int) -> Outcome:
    """Serves the requests, in order and again, ``batch`` at a time."""
    outcome = Outcome()
    served = [request for request in requests if len(request.response_ids) > 1]
    total = sum(len(request.response_ids) - 1 for request in served)
    waiting = cycle(served)
    rows: list[_Row] = []
    times: dict[tuple[int, int, int], float] = {}
    while served and outcome.tokens < max(total, batch * total // len(served)):
        rows += [_Row(request, rule.begin(request)) for request in islice(waiting, batch - len(rows))]
        count = len(rows)
        context = sum(len(row.request.prompt_ids) + row.position for row in rows) / count
        verified, accepted, drafted_rows, drafted_nodes = rule.draft(rows, context)
        size = _size(curve, verified)
        # times of contexts within a percent are those of their middle
        key = count, size, round(64 * np.log2(context + 64))
        if key not in times:
            times[key] = float(curve.times(count, [size], 2 ** (key[2] / 64) - 64)[0])
        drafting = curve.draft.seconds(drafted_rows, drafted_nodes)
        tokens = 0
        for row, many in zip(rows, accepted, strict=True):
            made = min(many + 1, row.left)
            row.position += made
            tokens += made
        outcome.seconds += times[key] + drafting
        outcome.tokens += tokens
        outcome.passes += 1
        outcome.steps += count
        outcome.verified += sum(verified)
        rule.observe(count, size, context, times[key], tokens, drafting)
        rows = [row for row in rows if row.left]
    return outcome


def _size(curve: CostCurve, counts: Sequence[int]) -> int:
    """The size of the pass that holds so many nodes per row."""
    if curve.packed:
        return sum(counts)
    width = max(counts) + 1
    return next((ready for ready in curve.ready if ready >= width), width) - 1


class Autoregressive:
    """No drafts."""

    name = "autoregressive"

    def begin(self, request: Request) -> Any:
        """Nothing to remember."""

    def draft(self, rows: Sequence[_Row], context: float) -> tuple[list[int], list[int], int, int]:
        """Nothing."""
        return [0] * len(rows), [0] * len(rows), 0, 0

    def observe(self, *step: Any) -> None:
        """Learns nothing."""


@dataclass
class Fixed(Autoregressive):
    """The same budget for every request. Its drafts do not depend on the batch, so they are made once.

    Attributes:
        budget: Nodes of each request.
        begin_sequence: Opens a drafting sequence for a request's prompt.
        shape: Of the drafts, as for ``Sequence.draft``.
    """

    budget: int
    begin_sequence: Callable[[Request], DraftSequence]
    shape: Shape = "tree"
    _steps: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"fixed-{self.budget}"

    def begin(self, request: Request) -> Any:
        """Nodes and accepted nodes by position."""
        if id(request) not in self._steps:
            self._steps[id(request)] = dict(self._replay(request))
        return self._steps[id(request)]

    def _replay(self, request: Request) -> Iterator[tuple[int, tuple[int, int]]]:
        with self.begin_sequence(request) as sequence:
            response = request.response_ids
            position = 1
            while position < len(response):
                tree = sequence.draft(self.budget, shape=self.shape)
                accepted = count_accepted(tree, response[position:])
                yield position, (len(tree), accepted)
                extend(sequence, request, position, position + accepted + 1)
                position += accepted + 1

    def draft(self, rows: Sequence[_Row], context: float) -> tuple[list[int], list[int], int, int]:
        """The recorded drafts at the present positions."""
        nodes, accepted = zip(*(row.state[row.position] for row in rows), strict=True)
        return list(nodes), list(accepted), len(rows), sum(nodes)


class _Live(Autoregressive):
    """A rule whose drafts depend on the batch, and so are made anew."""

    def __init__(self, begin_sequence: Callable[[Request], DraftSequence]) -> None:
        self._begin_sequence = begin_sequence

    def begin(self, request: Request) -> Any:
        return self._begin_sequence(request)

    @staticmethod
    def _accept(row: _Row, sequence: DraftSequence, tree: DraftTree | None) -> int:
        rest = row.request.response_ids[row.position :]
        accepted = 0 if tree is None else count_accepted(tree, rest)
        extend(sequence, row.request, row.position, row.position + accepted + 1)
        if accepted + 1 >= len(rest):
            sequence.close()
        return accepted


class Paper(_Live):
    """The rule of SSSD (arXiv 2411.05894): one budget for all, from batch size and roofline ratio.

    As in the authors' serving code: the ratio and the budget are rounded down to numbers from a list, and
    small batches have caps. The budget counts the root.
    """

    name = "paper"
    _RATIOS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 384)
    _BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)

    def __init__(self, begin_sequence: Callable[[Request], DraftSequence], ratio: float) -> None:
        super().__init__(begin_sequence)
        self._ratio = max((known for known in self._RATIOS if known <= ratio), default=0)

    def nodes(self, batch: int) -> int:
        """Nodes of each request in a batch of this size."""
        cap = 32 if batch == 1 else (64 if batch <= 3 else 96 if batch <= 6 else 512) // batch
        budget = min(self._ratio // batch, cap)
        return max((known for known in self._BUDGETS if known <= budget), default=1) - 1

    def draft(self, rows: Sequence[_Row], context: float) -> tuple[list[int], list[int], int, int]:
        """As many nodes for each as the table says."""
        budget = self.nodes(len(rows))
        trees = [row.state.draft(budget) if budget else None for row in rows]
        accepted = [self._accept(row, row.state, tree) for row, tree in zip(rows, trees, strict=True)]
        counts = [0 if tree is None else len(tree) for tree in trees]
        return counts, accepted, len(rows) if budget else 0, sum(counts)


class Adaptive(_Live):
    """The rule of this package, :class:`sssd.hardware.SizingRule`."""

    name = "sssd"

    def __init__(
        self,
        begin_sequence: Callable[[Request], DraftSequence],
        curve: CostCurve,
        shape: Shape = "tree",
    ) -> None:
        super().__init__(begin_sequence)
        self.rule, self.shape = SizingRule(curve), shape

    def begin(self, request: Request) -> tuple[DraftSequence, Pace]:
        """A sequence and the rule's state of it."""
        return super().begin(request), self.rule.pace()

    def draft(self, rows: Sequence[_Row], context: float) -> tuple[list[int], list[int], int, int]:
        """Drafts where it may pay, and verifies what does.

        As ``Drafter.step`` does it; but every sequence has a drafter of its own.
        """
        paces = [row.state[1] for row in rows]
        limits = self.rule.limits(paces)
        # the last token of a response needs no draft
        trees = [
            row.state[0].draft(limit, min_prob=self.rule.min_prob, shape=self.shape)
            if limit and row.left > 1
            else None
            for row, limit in zip(rows, limits, strict=True)
        ]
        counts = self.rule.allocate(trees, context, paces)
        accepted = []
        for row, tree, count in zip(rows, trees, counts, strict=True):
            row.state[0].cut_draft(count)
            accepted.append(self._accept(row, row.state[0], None if tree is None else tree.first(count)))
        made = [len(tree) for tree in trees if tree is not None]
        return counts, accepted, len(made), sum(made)

    def observe(
        self, batch: int, size: int, context: float, seconds: float, tokens: int, drafting: float
    ) -> None:
        """The rule corrects itself as it would in practice."""
        self.rule.observe(
            batch=batch, size=size, context=context, seconds=seconds, tokens=tokens, draft_seconds=drafting
        )


class Perfect(Autoregressive):
    """Drafts that are always right and take no time, as many as pay: the bound of every rule."""

    name = "perfect"

    def __init__(self, curve: CostCurve, most: int = 256) -> None:
        self._curve, self._most = curve, most
        self._best: dict[tuple[int, int], int] = {}

    def draft(self, rows: Sequence[_Row], context: float) -> tuple[list[int], list[int], int, int]:
        """The number of tokens for each request at which tokens per second are most."""
        key = len(rows), round(8 * np.log2(context + 64))
        if key not in self._best:
            widths = np.array(self._curve.widths(self._most + 1))
            sizes = (widths - 1) * (len(rows) if self._curve.packed else 1)
            self._best[key] = (
                int(widths[np.argmax(widths / self._curve.times(len(rows), sizes, context))]) - 1
            )
        counts = [min(self._best[key], row.left - 1) for row in rows]
        return counts, counts, 0, 0


def simulate_rules(
    trace: str,
    requests: Sequence[Request],
    curve: CostCurve,
    batches: Sequence[int],
    begin_sequence: Callable[[Request], DraftSequence],
    progress: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows ``{"trace", "batch", "rule", "speedup", "tokens_per_step"}`` of every rule at every batch size.

    Args:
        trace: Name for the rows.
        requests: Recorded requests.
        curve: T(batch, width, context).
        batches: Requests served at a time.
        begin_sequence: Opens a drafting sequence for a request's prompt.
        progress: Called after each simulation.
    """
    fixed = [Fixed(budget, begin_sequence) for budget in FIXED_BUDGETS]
    result = []
    for batch in batches:
        plain = simulate(requests, Autoregressive(), curve, batch)
        rules: list[Rule] = [
            *fixed,
            Paper(begin_sequence, curve.knee),
            Adaptive(begin_sequence, curve),
            Perfect(curve),
        ]
        for rule in rules:
            outcome = simulate(requests, rule, curve, batch)
            progress()
            result.append(
                {
                    "trace": trace,
                    "batch": batch,
                    "rule": rule.name,
                    "speedup": outcome.rate / plain.rate if plain.seconds else 1.0,
                    "tokens_per_step": outcome.tokens_per_step,
                    "verified_per_step": outcome.verified / max(outcome.steps, 1),
                }
            )
    return result


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How this package's rule does on each trace and batch size, from the rows of :func:`simulate_rules`.

    Returns:
        Rows ``{"trace", "batch", "over_paper", "over_best_fixed", "best_fixed"}``: ratios of its speed-up to
        that of the paper's rule and to that of the best fixed budget, which is chosen in hindsight.
    """
    speedups: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        speedups.setdefault((row["trace"], row["batch"]), {})[row["rule"]] = row["speedup"]
    result = []
    for (trace, batch), by_rule in speedups.items():
        best = max(FIXED_RULES, key=by_rule.__getitem__)
        result.append(
            {
                "trace": trace,
                "batch": batch,
                "over_paper": by_rule["sssd"] / by_rule["paper"],
                "over_best_fixed": by_rule["sssd"] / by_rule[best],
                "best_fixed": best,
            }
        )
    return result


def sequences(**options: Any) -> Callable[[Request], DraftSequence]:
    """Opens every request, first token included, with a drafter of its own: nothing is shared.

    Args:
        **options: As for ``sssd.Drafter``.
    """

    def begin(request: Request) -> DraftSequence:
        sequence = Drafter(**options).begin(request.prompt_ids, request.prediction_ids)
        extend(sequence, request, 0, 1)
        return sequence

    return begin
