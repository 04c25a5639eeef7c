"""Replays recorded requests: what a drafter would have had accepted, without a model.

The rule: the first response token comes from the prefill; at each step the drafter sees prompt and
generated tokens and drafts at most ``budget`` nodes; the longest root path that equals the recording is
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

from sssd._core import Drafter, DraftTree, Sequence
from sssd.errors import SssdError

Tokenize = Callable[[str], list[int]]


class TraceError(SssdError, ValueError):
    """A trace file is not JSON Lines of requests."""


@dataclass(frozen=True)
class Request:
    """One recorded request: token ids of prompt and response, int32 [n] each."""

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]


@dataclass
class Replay:
    """Counts and times of replayed requests at one budget."""

    budget: int
    requests: int = 0
    tokens: int = 0
    """Response tokens after the first of each request."""
    accepted: int = 0
    drafted: int = 0
    expected: float = 0.0
    append_ns: int = 0
    draft_ns: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Verify passes."""
        return len(self.draft_ns)

    def run(self, drafter: Drafter, request: Request) -> None:
        """Replays one request. A request with fewer than two response tokens takes no step."""
        with drafter.begin(request.prompt_ids) as sequence:
            self.follow(sequence, request)

    def follow(self, sequence: Sequence, request: Request) -> None:
        """Replays one request on a sequence that holds its prompt."""
        response = request.response_ids
        self.requests += 1
        self.tokens += max(len(response) - 1, 0)
        sequence.extend(response[:1])
        position = 1
        while position < len(response):
            start = perf_counter_ns()
            tree = sequence.draft(self.budget)
            self.draft_ns.append(perf_counter_ns() - start)
            accepted = count_accepted(tree, response[position:])
            self.accepted += accepted
            self.drafted += len(tree)
            self.expected += tree.expected_accepted
            appended = response[position : position + accepted + 1]
            start = perf_counter_ns()
            sequence.extend(appended)
            self.append_ns += perf_counter_ns() - start
            position += len(appended)

    def row(self, trace: str) -> dict[str, Any]:
        """The figures, as ``replay --json`` writes them."""
        steps = max(self.steps, 1)
        p50, p99 = np.percentile(self.draft_ns, [50, 99]) / 1e3 if self.draft_ns else (0.0, 0.0)
        return {
            "trace": trace,
            "budget": self.budget,
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
        }


def count_accepted(tree: DraftTree, recording: NDArray[np.int32]) -> int:
    """Length of the longest path from the root that equals the start of ``recording``."""
    if len(tree) == 0:
        return 0
    depths = tree.depths
    # a node's target is the recorded token after it; beyond the recording nothing is accepted
    targets = np.append(recording, np.full(depths.max() + 1, 0, recording.dtype))
    nodes, _ = tree.accept(targets[np.append(0, depths)])
    return min(len(nodes), len(recording))


def trace_name(path: Path) -> str:
    """The file's name without its endings (.jsonl, .gz, .xz)."""
    name = path.name
    while Path(name).suffix in {".gz", ".xz", ".jsonl", ".json"}:
        name = Path(name).stem
    return name


def read_trace(path: Path, tokenize: Tokenize | None = None) -> Iterator[Request]:
    """Requests of a JSON Lines file, plain, .gz or .xz.

    Args:
        path: each line holds ``prompt_ids`` and ``response_ids``, or the texts ``prompt`` and ``response``.
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
        return Request(_ids(record["prompt_ids"]), _ids(record["response_ids"]))
    if "prompt" in record and "response" in record:
        if tokenize is None:
            raise ValueError("holds texts; give a tokenizer with --tokenizer")
        return Request(_ids(tokenize(record["prompt"])), _ids(tokenize(record["response"])))
    raise ValueError("expected prompt_ids and response_ids, or prompt and response")


def _ids(values: Any) -> NDArray[np.int32]:
    ids = np.asarray(values)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError("token ids must be a list of integers")
    if len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError("token ids must be in 0..2^31")
    return ids.astype(np.int32)
