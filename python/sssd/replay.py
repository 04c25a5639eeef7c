"""Replays recorded requests: what a drafter would have had accepted, without a model.

The rule: the first response token comes from the prefill; at each step the drafter sees prompt and
generated tokens and drafts at most ``max_nodes`` nodes; the longest root path that equals the recording is
accepted; then the accepted tokens and one more are appended (fewer at the end).

A recording with the target's most probable tokens can also be replayed as if the target sampled
(:class:`Sampling`): what the target says is then drawn from them anew.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import SOURCES, DraftBatch, Drafter, DraftTree, PassBlock, Sequence
from sssd.errors import CorpusError
from sssd.reading.inputs import Input, find_inputs, format_of
from sssd.reading.options import ReadOptions, ReadReport
from sssd.reading.reader import read
from sssd.reading.records import Content, Exchange, Records, is_ids, kind
from sssd.reading.tokenizer import LoadedTokenizer

Tokenize = Callable[[str], list[int]]

TraceError = CorpusError
"""A trace does not hold requests in a form that is known."""


@dataclass(frozen=True)
class Request:
    """One recorded request: token ids of prompt and response, int32 [n] each.

    ``topk_ids`` int32 and ``topk_probs`` float32, both [n, k], are the target's most probable tokens at each
    position of the response, where they were recorded; ``prediction_ids`` int32 [m] is a predicted output.
    """

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    topk_ids: NDArray[np.int32] | None = None
    topk_probs: NDArray[np.float32] | None = None
    prediction_ids: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Sampling:
    """A target that samples: at each position of a recording it draws from its recorded top-k.

    The text stays the recorded one, for only after it are the target's distributions known. A step's draws
    are compared with the draft up to the first that differs from the recording; the drafter learns from
    them, and the recorded token then takes that draw's place: tokens per step are a lower bound. Expected
    tokens and the reliability are those of the children of nodes that were reached, given their parents: what
    would follow a draw that was not recorded is not known, and a sum over all nodes that follow the recording
    would be one over those that the target holds most probable.
    """

    temperature: float = 1.0
    """Of the softmax, above 0."""
    top_p: float = 1.0
    """Share of the probability that is drawn from, most probable tokens first."""
    seed: int = 0

    def draws(self, request: Request) -> NDArray[np.int32]:
        """A token for each position of the response, int32 [n]; the same for the same request.

        Raises:
            TraceError: the request holds no distributions, or one without a positive probability.
        """
        if request.topk_ids is None or request.topk_probs is None:
            raise TraceError("sampling needs recordings with 'topk_ids' and 'topk_probs'")
        order = np.argsort(-request.topk_probs, axis=1, kind="stable")
        ids = np.take_along_axis(request.topk_ids, order, 1)
        probs = np.take_along_axis(request.topk_probs.astype(np.float64), order, 1)
        if not ((probs[:, -1:] >= 0) & (probs[:, :1] > 0) & np.isfinite(probs)).all():
            raise TraceError("sampling needs a positive probability at each position")
        probs = (probs / probs[:, :1]) ** (1 / self.temperature)
        probs /= probs.sum(1, keepdims=True)
        # the first token is always among them, as in top-p (Holtzman et al., 2020)
        probs[:, 1:][np.cumsum(probs, 1)[:, :-1] >= self.top_p] = 0
        edges = np.cumsum(probs / probs.sum(1, keepdims=True), axis=1)
        random = np.random.default_rng([self.seed, len(ids), *request.response_ids[:8].tolist()])
        places = (random.random((len(ids), 1)) >= edges).sum(1).clip(max=ids.shape[1] - 1)
        drawn: NDArray[np.int32] = np.take_along_axis(ids, places[:, None], 1)[:, 0]
        return drawn


RELIABILITY_BINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Edges of the bins of node probabilities in the reliability table."""


@dataclass
class Replay:
    """Counts and times of replayed requests at one ``max_nodes``."""

    max_nodes: int
    sampling: Sampling | None = None
    feedback: bool = True
    """Whether recorded probabilities are handed to the drafter."""
    requests: int = 0
    tokens: int = 0
    """Response tokens after the first of each request."""
    accepted: int = 0
    drafted: int = 0
    expected: float = 0.0
    append_ns: int = 0
    draft_ns: list[int] = field(default_factory=list)
    sources: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(SOURCES), 3)))
    """Per source: nodes drafted, nodes accepted, sum of their probabilities."""
    bins: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(RELIABILITY_BINS) - 1, 3)))
    """The same per bin of node probability."""
    outcomes: list[tuple[int, int]] = field(default_factory=list)
    """Of each request, the tokens after the first and the steps that they took."""

    @property
    def steps(self) -> int:
        """Verify passes."""
        return len(self.draft_ns)

    def run(self, drafter: Drafter, request: Request, watch: "Watch | None" = None) -> None:
        """Replays one request. A request with fewer than two response tokens takes no step."""
        with drafter.begin(request.prompt_ids, request.prediction_ids) as sequence:
            self.follow(sequence, request, watch)

    def follow(self, sequence: Sequence, request: Request, watch: "Watch | None" = None) -> None:
        """Replays one request on a sequence that holds its prompt; ``watch`` sees each step."""
        response = request.response_ids
        said = response if self.sampling is None else self.sampling.draws(request)
        before = self.steps
        self.requests += 1
        self.tokens += max(len(response) - 1, 0)
        extend(sequence, request, 0, 1, response, self.feedback)
        position = 1
        while position < len(response):
            start = perf_counter_ns()
            tree = sequence.draft(self.max_nodes)
            self.draft_ns.append(perf_counter_ns() - start)
            known = recorded(response[position:], said[position:]) if self.sampling else len(said) - position
            path = accepted_path(tree, said[position : position + known])
            self._count(tree, path, None if self.sampling is None else response[position:])
            if watch:
                watch(position, tree, path)
            end = position + min(len(path) + 1, known)
            start = perf_counter_ns()
            extend(sequence, request, position, end, said, self.feedback)
            if said[end - 1] != response[end - 1]:
                sequence.truncate(len(sequence) - 1)
                sequence.prefill(response[end - 1 : end])
            self.append_ns += perf_counter_ns() - start
            position = end
        self.outcomes.append((max(len(response) - 1, 0), self.steps - before))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the tokens per step of other requests of the kind lie, as :func:`bootstrap` has it."""
        return bootstrap(self.outcomes)

    def _count(self, tree: DraftTree, path: NDArray[np.int64], recording: NDArray[np.int32] | None) -> None:
        self.accepted += len(path)
        self.drafted += len(tree)
        probs, counted = tree.probs, np.ones(len(tree), bool)
        if recording is not None:
            counted = reached(tree, path, recording)
            probs = (probs / np.append(probs, 1)[tree.parents])[counted]
        self.expected += tree.expected_accepted if recording is None else float(probs.sum())
        bins = np.searchsorted(RELIABILITY_BINS[1:-1], probs, side="right")
        accepted = np.zeros(len(tree))
        accepted[path] = 1
        for counts, rows in ((self.sources, tree.sources[counted]), (self.bins, bins)):
            for column, weights in enumerate((None, accepted[counted], probs)):
                counts[:, column] += np.bincount(rows, weights, minlength=len(counts))

    def row(self, trace: str) -> dict[str, Any]:
        """The figures, as ``replay --json`` writes them."""
        steps = max(self.steps, 1)
        p50, p99 = np.percentile(self.draft_ns, [50, 99]) / 1e3 if self.draft_ns else (0.0, 0.0)
        return {
            "trace": trace,
            "budget": self.max_nodes,
            "requests": self.requests,
            "tokens": self.tokens,
            "steps": self.steps,
            "tokens_per_step": self.tokens / steps,
            "tokens_per_step_interval": self.interval,
            "accepted_per_step": self.accepted / steps,
            "drafted_per_step": self.drafted / steps,
            "expected_accepted_per_step": self.expected / steps,
            "draft_us_p50": float(p50),
            "draft_us_p99": float(p99),
            "append_us_per_token": self.append_ns / max(self.tokens, 1) / 1e3,
            "sources": {
                name: _counts(counts) for name, counts in zip(SOURCES, self.sources, strict=True) if counts[0]
            },
            "reliability": [
                {"from": low, "to": high, **_counts(counts)}
                for low, high, counts in zip(RELIABILITY_BINS, RELIABILITY_BINS[1:], self.bins, strict=False)
            ],
        }


Watch = Callable[[int, DraftTree, NDArray[np.int64]], None]
"""Called at each step of a request with the place in the response, the draft and its accepted nodes."""

_RESAMPLES = 1000


def bootstrap(outcomes: list[tuple[int, int]], level: float = 0.95) -> tuple[float, float] | None:
    """Interval of tokens per step, by the percentile bootstrap over requests (Efron, 1979).

    Requests are drawn anew as wholes, for the steps of one are not independent. The same outcomes give the
    same interval.

    Args:
        outcomes: Tokens and steps of each request.
        level: Share of the resampled figures that lie within.

    Returns:
        Its ends; None for fewer than two requests with steps, which say nothing about others.
    """
    counts = np.array([outcome for outcome in outcomes if outcome[1]], np.float64).reshape(-1, 2)
    number = len(counts)
    if number < 2:
        return None
    random = np.random.default_rng(0)
    rates = []
    for _ in range(_RESAMPLES // 100):
        tokens, steps = (random.multinomial(number, np.full(number, 1 / number), 100) @ counts).T
        rates.append(tokens / steps)
    low, high = np.quantile(np.concatenate(rates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _counts(counts: NDArray[np.float64]) -> dict[str, float]:
    return {"drafted": int(counts[0]), "accepted": int(counts[1]), "predicted": float(counts[2])}


def extend(
    sequence: Sequence,
    request: Request,
    start: int,
    end: int,
    said: NDArray[np.int32] | None = None,
    feedback: bool = True,
) -> None:
    """Appends the response, or what was said, from ``start`` to ``end``, with the target's probabilities."""
    tokens = (request.response_ids if said is None else said)[start:end]
    if not feedback or request.topk_ids is None or request.topk_probs is None:
        sequence.extend(tokens)
    else:
        sequence.extend(tokens, request.topk_ids[start:end], request.topk_probs[start:end])


def recorded(recording: NDArray[np.int32], said: NDArray[np.int32]) -> int:
    """How many tokens of ``said`` come after the recording alone: up to the first that differs, included."""
    differs = np.flatnonzero(recording != said)
    return int(differs[0]) + 1 if len(differs) else len(said)


def reached(tree: DraftTree, path: NDArray[np.int64], recording: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which nodes have the root, or an accepted node of the recording, for a parent, bool [nodes]."""
    same = tree.token_ids[path] == recording[: len(path)]
    return np.isin(tree.parents, [-1, *path[same].tolist()]) & (tree.depths <= len(recording))


def accepted_path(tree: DraftTree, recording: NDArray[np.int32]) -> NDArray[np.int64]:
    """Nodes of the longest path from the root that equals the start of ``recording``, int64 [accepted]."""
    if len(tree) == 0:
        return np.zeros(0, np.int64)
    block = PassBlock()
    block.fill(DraftBatch.from_trees([tree]), [0], [0], packed=True)
    # an entry's target is the recorded token after it; beyond the recording nothing is accepted
    targets = np.append(recording, np.zeros(int(block.depths.max()) + 1, recording.dtype))
    kept, _, _ = block.accept(targets[block.depths])
    return kept[1 : 1 + len(recording)] - 1


def count_accepted(tree: DraftTree, recording: NDArray[np.int32]) -> int:
    """Length of the longest path from the root that equals the start of ``recording``."""
    return len(accepted_path(tree, recording))


def trace_name(path: str | PurePath) -> str:
    """The file's name without the endings that tell format and compression (.jsonl, .gz, .parquet)."""
    name = PurePath(path).name
    while format_of(name) != (None, None) and (stem := PurePath(name).stem) != name:
        name = stem
    return name


def read_trace(
    source: str | PurePath | Input,
    tokenize: Tokenize | LoadedTokenizer | None = None,
    *,
    options: ReadOptions | None = None,
    report: ReadReport | None = None,
) -> Iterator[Request]:
    """Requests of a file in any form that ``build`` takes (``docs/reading.md``), but token arrays.

    Args:
        source: a file, or an input that was found. Each record holds ``prompt_ids`` and ``response_ids``;
            or texts or messages (``prompt`` and ``response``, ``prompt`` and ``completion``, and the like);
            or a chat, of which every message of the model is a request. With ids also ``topk_ids`` and
            ``topk_probs`` (per response token) and ``prediction_ids``, where they were recorded.
        tokenize: turns a text into token ids; needed for texts. One from ``load_tokenizer`` knows the
            model's chat template too; without it, chats are written in plain text.
        options: how it is read.
        report: counts what is read, skipped and changed.

    Raises:
        TraceError: a record is no request; names file, line and field.
        OSError: the file cannot be read.
    """
    options, report = options or ReadOptions(), report or ReadReport()
    inputs = [source] if isinstance(source, Input) else find_inputs([source], options, report)
    records = Records(options, report, tokenize.template if isinstance(tokenize, LoadedTokenizer) else None)
    encode = tokenize.encode if isinstance(tokenize, LoadedTokenizer) else tokenize

    def take(record: Any, place: str) -> list[Request]:
        return [_request(exchange, place, encode) for exchange in records.exchanges(record, place)]

    for input in inputs:
        for _, _, request in read(input, options, report, take, wanted=records.wanted):
            assert isinstance(request, Request)  # token arrays are refused
            yield request


def _request(exchange: Exchange, place: str, encode: Tokenize | None) -> Request:
    fields = exchange.fields or {}
    prediction = fields.get("prediction_ids")
    if prediction is not None and not is_ids(prediction):
        raise TraceError(
            f"{place}: field 'prediction_ids' must be a list of token ids, not {kind(prediction)}"
        )
    return Request(
        _ids(exchange.prompt, place, encode),
        _ids(exchange.response, place, encode),
        *_distributions(fields, place, len(exchange.response)),
        None if prediction is None else np.asarray(prediction, np.int32),
    )


def _ids(content: Content, place: str, encode: Tokenize | None) -> NDArray[np.int32]:
    if isinstance(content, str):
        if encode is None:
            raise TraceError(f"{place}: holds texts; give a tokenizer with --tokenizer")
        return np.asarray(encode(content), np.int32)
    return content.astype(np.int32)


def _distributions(fields: Mapping[str, Any], place: str, rows: int) -> tuple[Any, Any]:
    if fields.get("topk_ids") is None or fields.get("topk_probs") is None:
        return None, None
    try:
        ids, probs = np.asarray(fields["topk_ids"]), np.asarray(fields["topk_probs"], np.float32)
    except (ValueError, TypeError, OverflowError):
        ids = probs = np.zeros(0, np.int64)
    if ids.ndim != 2 or ids.shape != probs.shape or len(ids) != rows:
        raise TraceError(f"{place}: topk_ids and topk_probs must both have shape [{rows}, k]")
    if not is_ids(ids.reshape(-1)):
        raise TraceError(f"{place}: field 'topk_ids' must be token ids, not {kind(ids.reshape(-1))}")
    return ids.astype(np.int32), probs
