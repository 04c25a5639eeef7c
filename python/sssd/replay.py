"""Replays recorded requests: what a drafter would have had accepted, without a model.

The rule: the first response token comes from the prefill; at each step the drafter sees prompt and
generated tokens and drafts at most ``max_nodes`` nodes; the longest root path that equals the recording is
accepted; then the accepted tokens and one more are appended (fewer at the end).
"""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import SOURCES, DraftBatch, Drafter, DraftTree, PassBlock, Sequence
from sssd.errors import SssdError

Tokenize = Callable[[str], list[int]]


class TraceError(SssdError, ValueError):
    """A trace file is not JSON Lines of requests."""


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


RELIABILITY_BINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Edges of the bins of node probabilities in the reliability table."""


@dataclass
class Replay:
    """Counts and times of replayed requests at one ``max_nodes``."""

    max_nodes: int
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

    @property
    def steps(self) -> int:
        """Verify passes."""
        return len(self.draft_ns)

    def run(self, drafter: Drafter, request: Request) -> None:
        """Replays one request. A request with fewer than two response tokens takes no step."""
        with drafter.begin(request.prompt_ids, request.prediction_ids) as sequence:
            self.follow(sequence, request)

    def follow(self, sequence: Sequence, request: Request) -> None:
        """Replays one request on a sequence that holds its prompt."""
        response = request.response_ids
        self.requests += 1
        self.tokens += max(len(response) - 1, 0)
        extend(sequence, request, 0, 1)
        position = 1
        while position < len(response):
            start = perf_counter_ns()
            tree = sequence.draft(self.max_nodes)
            self.draft_ns.append(perf_counter_ns() - start)
            path = accepted_path(tree, response[position:])
            self._count(tree, path)
            end = min(position + len(path) + 1, len(response))
            start = perf_counter_ns()
            extend(sequence, request, position, end)
            self.append_ns += perf_counter_ns() - start
            position = end

    def _count(self, tree: DraftTree, path: NDArray[np.int64]) -> None:
        self.accepted += len(path)
        self.drafted += len(tree)
        self.expected += tree.expected_accepted
        probs = tree.probs
        bins = np.searchsorted(RELIABILITY_BINS[1:-1], probs, side="right")
        accepted = np.zeros(len(tree))
        accepted[path] = 1
        for counts, rows in ((self.sources, tree.sources), (self.bins, bins)):
            for column, weights in enumerate((None, accepted, probs)):
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


def _counts(counts: NDArray[np.float64]) -> dict[str, float]:
    return {"drafted": int(counts[0]), "accepted": int(counts[1]), "predicted": float(counts[2])}


def extend(sequence: Sequence, request: Request, start: int, end: int) -> None:
    """Appends the response from ``start`` to ``end``, with the target's probabilities if recorded."""
    if request.topk_ids is None or request.topk_probs is None:
        sequence.extend(request.response_ids[start:end])
    else:
        sequence.extend(
            request.response_ids[start:end], request.topk_ids[start:end], request.topk_probs[start:end]
        )


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


def trace_name(path: Path) -> str:
    """The file's name without its endings (.jsonl, .gz, .xz)."""
    name = path.name
    while Path(name).suffix in {".gz", ".xz", ".jsonl", ".json"}:
        name = Path(name).stem
    return name


def read_trace(path: Path, tokenize: Tokenize | None = None) -> Iterator[Request]:
    """Requests of a JSON Lines file, plain, .gz or .xz.

    Args:
        path: each line holds ``prompt_ids`` and ``response_ids``, or the texts ``prompt`` and
            ``response``; with ids also ``topk_ids`` and ``topk_probs`` (per response token) and
            ``prediction_ids``, where they were recorded.
        tokenize: turns a text into token ids; needed for texts.

    Raises:
        TraceError: a line is not such an object; names file and line.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield _request(json.loads(line), tokenize)
                    except (ValueError, TypeError, KeyError, OverflowError) as error:
                        raise TraceError(f"{path}, line {number}: {error}") from error
        except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise TraceError(f"{path} cannot be read: {error}") from error


def _request(record: Any, tokenize: Tokenize | None) -> Request:
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    if "prompt_ids" in record and "response_ids" in record:
        prediction = record.get("prediction_ids")
        return Request(
            _ids(record["prompt_ids"]),
            _ids(record["response_ids"]),
            *_distributions(record),
            None if prediction is None else _ids(prediction),
        )
    if "prompt" in record and "response" in record:
        if tokenize is None:
            raise ValueError("holds texts; give a tokenizer with --tokenizer")
        return Request(_ids(tokenize(record["prompt"])), _ids(tokenize(record["response"])))
    raise ValueError("expected prompt_ids and response_ids, or prompt and response")


def _distributions(record: dict[str, Any]) -> tuple[Any, Any]:
    if record.get("topk_ids") is None or record.get("topk_probs") is None:
        return None, None
    ids, probs = np.asarray(record["topk_ids"]), np.asarray(record["topk_probs"], np.float32)
    rows = len(record["response_ids"])
    if ids.ndim != 2 or ids.shape != probs.shape or len(ids) != rows:
        raise ValueError(f"topk_ids and topk_probs must both have shape [{rows}, k]")
    return _ids(ids.reshape(-1)).reshape(ids.shape), probs


def _ids(values: Any) -> NDArray[np.int32]:
    ids = np.asarray(values)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError("token ids must be a list of integers")
    if len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError("token ids must be in 0..2^31")
    return ids.astype(np.int32)
