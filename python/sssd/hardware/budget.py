"""The rule: how much to draft, and how much of it to verify, at each step. See ``docs/hardware.md``."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from sssd._core import DraftTree, PassCosts
from sssd.errors import InvalidArgumentError
from sssd.hardware.curve import CostCurve, check_context, context_key, context_of

_MOST_NODES, _MOST_KEPT = 256, 256
_LEAST_NODES = 4
_LONGEST_WAIT = 8
_RATE_MEMORY = 0.02
"""Weight of the newest step in the decoding rate: a memory of about fifty steps."""
_PRICE_MEMORY, _MARGIN, _LEAST_PROB = 0.02, 0.7, 0.0005
_WINDOW = 9
"""Newest times of a width that count; their median does (of two the lower), so that a hiccup does not."""
_TRUST = 2.0
"""Times of a width at which they count as much as those of all others."""
_FORGET_EVERY = 256
"""Steps after which the oldest measurement of every width is forgotten."""
_STRANGEST = math.log(1e6)
"""How far a time may be from the curve at all."""
_FURTHEST = math.log(16.0)
"""How far a width's time may move from the curve, relative to all widths."""
_NEWS = 0.02
"""Change of a correction that is worth building the tables anew."""
_PLAIN_EVERY = 2048
"""Steps after which one without drafts is due, to know its time."""
_PLAIN_AT_ONCE = 2
"""Steps without drafts that tell how fast the machine is now; the faster one does."""
_FIRST_MOVE = 0.25
"""How far the first time of a width may move its correction, as it may be a hiccup; n times n^2 as far."""
_RECENT, _CHANGE = 5, 0.15
"""Newest times, of all widths, whose median tells that the machine's speed has changed, and by how much."""
_SETTLED = 3
"""Times of a width after which it can tell that."""
_CHANGES_APART = 40
"""Steps between two such findings, times the speed-up: a busy machine must not cost what drafts bring."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 512
_DEBT = 2.0
"""Tokens per request that drafting may lose against plain decoding before it pauses."""


@dataclass
class RowBudget:
    """What is remembered of one request. Made anew with each request; changed by :class:`Budget` only.

    Attributes:
        limit: Nodes worth drafting: twice what was verified lately.
        wait: Steps until the next draft.
        pause: Steps to wait after the next draft that is not worth its own time.
    """

    limit: int = 64
    wait: int = 0
    pause: int = 1


class Budget:
    """Sizes the drafts of a batch by a cost curve, and corrects the curve by the times of steps.

    At each step::

        limits = budget.limits(rows, context)  # nodes to draft for each request, down to budget.min_prob
        counts = budget.allocate(trees, context, rows)  # nodes of each tree to verify, its first ones
        sequence.cut_draft(count)  # for each sequence
        budget.observe(...)  # what came of it

    Nodes of all trees compete, the most probable first. What maximises tokens per second over many steps is
    to maximise, in each, *expected tokens - rate * seconds*, with the rate at which tokens come at large. The
    rate is learned, and at least that of decoding without drafts.

    When times show that the whole machine has become slower or faster, those before are forgotten
    and some steps without drafts are asked for, as only times of the same period can be compared.

    Three things keep speculation from costing more than it brings: the rate never falls below plain
    decoding's; measured times count only relative to one another and within bounds, kept monotone in the
    width; and when tokens that drafts brought, minus those that plain decoding would have made in the extra
    time, sink below a bound, drafting pauses, longer every time.

    One budget serves any number of requests, batches and threads.

    Args:
        curve: T(batch, width, context).
        max_nodes: Most nodes to verify of one request.

    Raises:
        InvalidArgumentError: ``max_nodes`` is not an integer in 0..1023.
    """

    def __init__(self, curve: CostCurve, *, max_nodes: int | None = None) -> None:
        if max_nodes is None:
            max_nodes = min(_MOST_NODES, curve.ready[-1] - 1 if curve.ready else _MOST_NODES)
        if not isinstance(max_nodes, int) or isinstance(max_nodes, bool) or not 0 <= max_nodes < 1024:
            raise InvalidArgumentError(f"max_nodes must be an integer in 0..1023, not {max_nodes!r}")
        self.curve, self.max_nodes = curve, max_nodes
        self.speedup = 1.0
        """Tokens per second at large, over those of plain decoding."""
        self.min_prob = 0.002
        """Least probability of a node worth drafting: somewhat below the least that was verified lately."""
        self._clock = _Clock()
        self._plain_due, self._since_plain = _PLAIN_AT_ONCE, 0
        self._since_change = math.inf
        self._known: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self._costs: dict[tuple[int, int], PassCosts] = {}
        self._account = 0.0
        self._pause, self._paused = _SHORTEST_PAUSE, 0
        self._lock = Lock()

    def row(self) -> RowBudget:
        """The state of a new request."""
        return RowBudget(limit=min(64, self.max_nodes))

    def limits(self, rows: Sequence[RowBudget], context: float) -> list[int]:
        """The number of nodes to draft for each request; 0 where drafting would not pay.

        Args:
            rows: The requests of the step.
            context: Their mean length, tokens.
        """
        check_context(context)
        with self._lock:
            return self._limits(rows)

    def _limits(self, rows: Sequence[RowBudget]) -> list[int]:
        if self._paused > 0:
            self._paused -= 1
            return [0] * len(rows)
        if self._plain_due:
            # without the time of a plain step nobody knows what drafts cost
            return [0] * len(rows)
        limits = []
        for row in rows:
            if row.wait > 0:
                row.wait -= 1
                limits.append(0)
            else:
                limits.append(min(row.limit, self.max_nodes))
        return limits

    def allocate(
        self, trees: Sequence[DraftTree | None], context: float, rows: Sequence[RowBudget] | None = None
    ) -> list[int]:
        """The number of nodes to verify of each tree: its first ones, which are its best.

        Args:
            trees: Draft of each request of the step, None for none.
            context: Mean length of the requests, tokens.
            rows: Their states, which learn from it.
        """
        check_context(context)
        batch = len(trees)
        if not batch:
            return []
        with self._lock:
            costs, rate = self._pass_costs(batch, context), self._rate(batch, context)
            counts = costs.allocate(trees, rate)
            self._learn_price(trees, counts)
            if rows is not None:
                self._remember(rows, trees, counts, rate, context)
        return counts

    def costs(self, batch: int, context: float) -> tuple[PassCosts, float]:
        """What the next pass may cost and what a second is worth: ``cost=`` and ``rate=`` of drafting calls.

        Args:
            batch: Requests of the step.
            context: Their mean length, tokens.
        """
        check_context(context)
        with self._lock:
            return self._pass_costs(batch, context), self._rate(batch, context)

    def _learn_price(self, trees: Sequence[DraftTree | None], counts: list[int]) -> None:
        pairs = [(tree, count) for tree, count in zip(trees, counts, strict=True) if tree is not None]
        least = min((float(tree.probs[count - 1]) for tree, count in pairs if count), default=self.min_prob)
        cut = any(count < len(tree) for tree, count in pairs)
        target = _MARGIN * (least if cut else min(least, self.min_prob))
        # down at once, up slowly: the next step's drafts may be poorer than this one's
        rise = 1.0 if target < self.min_prob else _PRICE_MEMORY
        self.min_prob = min(max(self.min_prob + rise * (target - self.min_prob), _LEAST_PROB), 0.5)

    def _remember(
        self,
        rows: Sequence[RowBudget],
        trees: Sequence[DraftTree | None],
        counts: list[int],
        rate: float,
        context: float,
    ) -> None:
        draft = self.curve.draft
        total = sum(counts)
        size = total if self.curve.packed else max(counts)
        extra = self._extra(len(counts), size, context) if total else 0.0
        for row, tree, count in zip(rows, trees, counts, strict=True):
            if tree is None:
                continue
            if count == len(tree) == row.limit:
                row.limit = min(2 * row.limit, self.max_nodes)
            else:
                row.limit = max(count + count // 4 + _LEAST_NODES, row.limit * 3 // 4)
            gain = tree.first(count).expected_accepted - (rate * extra * count / total if total else 0.0)
            spent = (draft.request + draft.node * len(tree)) / min(draft.threads, len(rows))
            if gain > rate * spent:
                row.pause = 1
            else:
                row.wait, row.pause = row.pause, min(2 * row.pause, _LONGEST_WAIT)

    def _extra(self, batch: int, size: int, context: float) -> float:
        """Seconds of a pass of this size beyond one without drafts."""
        sizes, seconds = self._seconds(batch, context)
        return seconds[min(bisect_left(sizes, size), len(sizes) - 1)] - seconds[0]

    def observe(
        self,
        *,
        batch: int,
        size: int,
        context: float,
        seconds: float,
        tokens: int,
        draft_seconds: float = 0.0,
    ) -> None:
        """Learns from a step.

        Args:
            batch: Requests of the step.
            size: Nodes that the pass had room for: of each row, or of all where rows are packed.
            context: Mean length of the requests, tokens.
            seconds: Time of the verify pass. Values that are no time are ignored.
            tokens: Tokens that the step produced, at least one per request.
            draft_seconds: Time of drafting.
        """
        check_context(context)
        if not (math.isfinite(seconds) and seconds > 0) or batch < 1 or tokens < batch:
            return
        with self._lock:
            self._observe(batch, size, context, seconds, tokens, draft_seconds)

    def _observe(
        self, batch: int, size: int, context: float, seconds: float, tokens: int, draft_seconds: float
    ) -> None:
        expected = float(self.curve.times(batch, [size], context)[0])
        changed = self._clock.tick(
            -(-size // batch) if self.curve.packed else size,
            min(max(math.log(seconds) - math.log(expected), -_STRANGEST), _STRANGEST),
        )
        self._watch(plain=size == 0)
        if changed:
            self._costs.clear()
            self._known.clear()
        # the medians speak for the pass, not its own time: a busy machine is not the draft's fault
        plain = self._seconds(batch, context)[1][0]
        drafted = min(draft_seconds, plain) if draft_seconds > 0 else 0.0
        spent = plain + self._extra(batch, size, context) + drafted
        self.speedup += _RATE_MEMORY * (min(tokens / batch * plain / spent, 1e3) - self.speedup)
        if size or drafted:
            # of a step without nodes only the drafting was in vain
            gained = (tokens - batch) / batch - ((spent - plain) if size else drafted) / plain
            self._account = min(self._account + gained, _DEBT)
            if self._account == _DEBT:
                self._pause = _SHORTEST_PAUSE
            elif self._account < -_DEBT:
                self._paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
                self._account = 0.0

    def _watch(self, plain: bool) -> None:
        """Asks for steps without drafts where their time is not known, or no longer."""
        self._since_plain = 0 if plain else self._since_plain + 1
        self._since_change += 1
        if plain and self._plain_due:
            self._plain_due -= 1
        if self._since_plain >= _PLAIN_EVERY:
            self._plain_due = 1
        if self._since_change >= _CHANGES_APART * max(self.speedup, 1.0) and self._clock.has_changed:
            # drafts and plain steps slow down together when others use the machine, so only times of the same
            # period can be compared
            self._clock.forget()
            self._plain_due, self._since_change = _PLAIN_AT_ONCE, 0

    def _rate(self, batch: int, context: float) -> float:
        return batch * max(self.speedup, 1.0) / self._seconds(batch, context)[1][0]

    def _key(self, batch: int, context: float) -> tuple[int, int]:
        return batch, context_key(context)

    def _seconds(self, batch: int, context: float) -> tuple[list[int], list[float]]:
        """Sizes to choose from and the corrected seconds of each, for contexts within a few percent."""
        key = self._key(batch, context)
        if key not in self._known:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
                self._costs.clear()
            sizes = self.curve.sizes(batch, self.max_nodes + 1)
            times = self.curve.times(batch, sizes, context_of(key[1]))
            widths = [-(-size // batch) for size in sizes] if self.curve.packed else sizes
            self._known[key] = sizes, self._clock.correct(widths, times).tolist()
        return self._known[key]

    def _pass_costs(self, batch: int, context: float) -> PassCosts:
        key = self._key(batch, context)
        if key not in self._costs:
            sizes, seconds = self._seconds(batch, context)
            self._costs[key] = PassCosts(sizes, seconds, packed=self.curve.packed)
        return self._costs[key]


class _Clock:
    """How much longer passes take than the curve says, by width (in powers of two)."""

    def __init__(self) -> None:
        self._logs: dict[int, deque[float]] = {}
        self._corrections = np.zeros(1)
        self._newest: deque[tuple[int, float, float]] = deque(maxlen=_RECENT)
        """Bit length of the width, log of the time over the curve's, and what of it was not expected."""
        self._ticks = 0
        self.has_changed = False
        """Whether times of any widths have differed from those before, several in turn and all alike."""

    def tick(self, width: int, log_ratio: float) -> bool:
        """Takes a measurement in; returns whether corrections have changed."""
        bucket = width.bit_length()
        logs = self._logs.setdefault(bucket, deque(maxlen=_WINDOW))
        if len(logs) >= _SETTLED:
            self._newest.append((bucket, log_ratio, log_ratio - median_low(logs)))
            if len(self._newest) == _RECENT:
                self.has_changed |= abs(median_low(surprise for _, _, surprise in self._newest)) > _CHANGE
        logs.append(log_ratio)
        self._ticks += 1
        if self._ticks % _FORGET_EVERY == 0:
            # a width that once was slow gets another chance
            for known, times in list(self._logs.items()):
                times.popleft()
                if not times:
                    del self._logs[known]
        corrections = self._measured()
        if (
            len(corrections) == len(self._corrections)
            and np.abs(corrections - self._corrections).max() < _NEWS
        ):
            return False
        self._corrections = corrections
        return True

    def forget(self) -> None:
        """Forgets all times but the newest."""
        self._logs.clear()
        for bucket, log, _ in self._newest:
            self._logs.setdefault(bucket, deque(maxlen=_WINDOW)).append(log)
        self._newest.clear()
        self.has_changed = False

    def _measured(self) -> NDArray[np.float64]:
        """Log corrections of widths 0, 1, 2 to 3, 4 to 7, ...: medians, drawn towards the plain step's."""
        if not self._logs:
            return self._corrections
        medians = {bucket: median_low(logs) for bucket, logs in sorted(self._logs.items())}
        plain = medians.get(0, median_low(medians.values()))
        known = {0: plain}
        for bucket, log in medians.items():
            if bucket:
                count = len(self._logs[bucket])
                furthest = min(_FIRST_MOVE * count**2, _FURTHEST)
                known[bucket] = plain + min(
                    max(count * (log - plain) / (count + _TRUST), -furthest), furthest
                )
        buckets = sorted(known)
        return np.interp(np.arange(buckets[-1] + 1), buckets, [known[bucket] for bucket in buckets])

    def correct(self, widths: Sequence[int], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """The corrected times, not falling with the width."""
        last = len(self._corrections) - 1
        logs = self._corrections[[min(width.bit_length(), last) for width in widths]]
        times = seconds * np.exp(logs)
        above, below = np.maximum.accumulate(times), np.minimum.accumulate(times[::-1])[::-1]
        return np.asarray((above + below) / 2)
