"""The ranking stage once more, slowly and plainly: step 5 of ``docs/predictor.md``, for ``reference.py``.

Tables come from the datastore's file as ``docs/format.md`` has them, the network from the bytes that ship. In
double precision; of the Rust code it has the features, the bounds, and the logarithm that both approximate.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, frexp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from reference import Candidate, Expansion, Request

NETWORK = Path(__file__).parents[1] / "rust/sssd-core/src/ranking/network.bin"

DIMENSIONS, CONTEXT, TOPIC, TOPIC_STEP = 128, 8, 100, 16
WORTH_RANKING, WORTH_SCORING, NORMALISED = 0.05, 0.002, 8
STEPS = 32_767
LEAST_LEFT, LEAST_RANKED, FURTHEST = 0.003, 1e-6, 30.0
HEADER, HIDDEN, LEAK = 20, 24, 0.1

REQUEST, STORE = 0, 2
PROBS, CLASSES = 0, 7
PROB, OCCURS, AGO, FREQUENCY, NONE_OF_THEM, REPEATS, SCORE = range(14, 21)
PEAKS, WEIGHTS, LUCK = 21, 28, 35
DEPTH, PATH, AGE, REQUEST_VOTES, STORE_VOTES, TOTAL = range(42, 48)
FEATURES = 48


def ln(value: float) -> float:
    """The natural logarithm, off by at most 0.008: exact at powers of two, a parabola between them."""
    mantissa, exponent = frexp(value)
    mantissa = 2 * mantissa - 1
    return (exponent - 1 + mantissa * (1.3465 - 0.3465 * mantissa)) * log(2)


def log_prob(prob: float) -> float:
    return ln(prob + 0.002) * 0.5 + 1.0


def bounded(value: float) -> float:
    return min(max(value, -2.0), 2.0)


class Tables:
    """The log-bilinear model of a datastore's text."""

    def __init__(self, path: Path):
        file = path.read_bytes()
        size = int(np.frombuffer(file, "<u4", 1, 12)[0])
        start, end = np.frombuffer(file, "<u8", 2, 144).tolist()
        section = file[start:end]
        vectors = (CONTEXT + 1) * DIMENSIONS
        self.weights = np.frombuffer(section, "<f4", vectors).astype(float).reshape(-1, DIMENSIONS)
        parameters = np.frombuffer(section, "<f4", 5 * size, 4 * vectors).astype(float).reshape(size, 5)
        rows = np.frombuffer(section[-3 * size * DIMENSIONS :], "i1").reshape(3, size, DIMENSIONS)
        self.inputs, self.topics, self.outputs = (rows[at] * parameters[:, at, None] for at in range(3))
        self.biases, self.shares = parameters[:, 3].tolist(), parameters[:, 4].tolist()

    def topic(self, text: list[int]) -> Any:
        """The mean of the last tokens' rows, as it was at the last multiple of 16 tokens."""
        last = text[: len(text) - len(text) % TOPIC_STEP][-TOPIC:]
        return self.topics[last].mean(0) if last else np.zeros(DIMENSIONS)

    def context(self, text: list[int], topic: Any) -> Any:
        """The vector of the text that a token is to follow, in whole steps."""
        last = text[::-1][:CONTEXT]
        exact = self.weights[CONTEXT] * topic + (self.weights[: len(last)] * self.inputs[last]).sum(0)
        step = max(np.abs(exact).max(), 1e-30) / STEPS
        return np.rint(exact / step) * step

    def score(self, context: Any, token: int) -> float:
        return float(self.outputs[token] @ context) + self.biases[token]


class Network:
    """One hidden layer; its output is added to the logarithm of a candidate's probability."""

    def __init__(self, packed: bytes):
        weights = np.frombuffer(packed, "<f4", offset=HEADER).astype(float).reshape(FEATURES + 2, HIDDEN)
        self.features, self.bias, self.output = weights[:FEATURES], weights[FEATURES], weights[FEATURES + 1]

    def odds(self, base: float, seen: dict[int, float]) -> float:
        hidden = self.bias + sum(value * self.features[at] for at, value in seen.items())
        said = float(np.maximum(hidden, LEAK * hidden) @ self.output)
        return exp(min(max(base + said, -FURTHEST), FURTHEST))


@dataclass
class Node:
    """What is ranked: a node of the draft and its candidates, after they were refined."""

    request: "Request"
    path: tuple[int, ...]
    above: float
    expansion: "Expansion"
    successors: list[tuple[int, float]]

    @property
    def text(self) -> list[int]:
        return [*self.request.tokens[self.request.predicted :], *self.path]

    def features(self, total: float) -> dict[int, float]:
        """Those that all candidates share."""
        out, request = self.expansion, self.request
        seen = {LUCK + source: luck * 2 - 0.5 for source, luck in enumerate(request.luck)}
        for source in out.gates:
            peak = max((candidate.probs[source] for candidate in out.candidates.values()), default=0.0)
            seen |= {PEAKS + source: log_prob(peak), WEIGHTS + source: out.weights[source] * 2}
        return seen | {
            DEPTH: ln(1 + len(self.path)) * 0.5,
            PATH: ln(max(self.above, 1e-4)) * 0.2,
            AGE: ln(1 + request.output) * 0.2,
            REQUEST_VOTES: ln(1 + out.votes.get(REQUEST, 0.0)) * 0.5,
            STORE_VOTES: ln(1 + out.votes.get(STORE, 0.0)) * 0.3,
            TOTAL: min(total, 1.0),
        }

    def features_of(self, token: int, candidate: "Candidate", prob: float, score: float) -> dict[int, float]:
        tokens, base = self.request.tokens, ln(max(prob, 1e-4))
        seen = {PROBS + source: log_prob(candidate.probs[source]) for source in self.expansion.gates}
        seen |= {CLASSES + source: 0.2 + klass * 0.1 for source, klass in candidate.classes.items()}
        seen |= {PROB: base * 0.25 + 0.5, SCORE: bounded(score * 0.4)}
        if token in tokens:
            seen |= {OCCURS: 1.0, AGO: ln(tokens[::-1].index(token) + 1) * 0.15}
        if token == [*tokens, *self.path][-1]:
            seen[REPEATS] = 1.0
        return seen

    def features_of_none(self, left: float) -> dict[int, float]:
        """Those of all tokens that are no candidates."""
        seen = {NONE_OF_THEM: 1.0, PROB: ln(left) * 0.25 + 0.5}
        for source in self.expansion.gates:
            given = sum(candidate.probs[source] for candidate in self.expansion.candidates.values())
            seen[PROBS + source] = log_prob(max(1 - given, 0.0))
        return seen


class Ranking:
    """What candidates are ranked with, of one request."""

    def __init__(self, datastore: Path):
        self.tables, self.network = Tables(datastore), Network(NETWORK.read_bytes())

    def start(self, text: list[int]) -> None:
        """Begins a draft."""
        self.topic = self.tables.topic(text)

    def scores(self, node: Node, tokens: Iterable[int]) -> dict[int, float]:
        """Log-bilinear scores, relative to the mean of the most frequent successors."""
        context = self.tables.context(node.text, self.topic)
        listed = node.successors[:NORMALISED]
        mass = sum(share for _, share in listed)
        said = sum(share * exp(min(self.tables.score(context, token), FURTHEST)) for token, share in listed)
        norm = ln(said / mass) if mass else 0.0
        return {token: self.tables.score(context, token) - norm for token in tokens}

    def rank(self, node: Node) -> None:
        """Gives candidates the probabilities that the network says, corrected by the request."""
        candidates, speaks = node.expansion.candidates, set(node.expansion.gates)
        total = sum(candidate.uncorrected for candidate in candidates.values())
        probs = {token: candidate.uncorrected / max(total, 1.0) for token, candidate in candidates.items()}
        scored = [
            token
            for token, prob in probs.items()
            if candidates[token].is_refined and node.above * prob >= WORTH_SCORING
        ]
        if node.above < WORTH_RANKING or not scored:
            return
        common, left = node.features(total), max(1 - sum(probs.values()), LEAST_LEFT)
        odds = {}
        for token, score in self.scores(node, scored).items():
            seen = node.features_of(token, candidates[token], probs[token], score)
            seen[FREQUENCY] = bounded(self.tables.shares[token] * 0.1 + 0.8)
            odds[token] = self.network.odds(ln(max(probs[token], 1e-4)), common | seen)
        none = self.network.odds(ln(left), common | node.features_of_none(left))
        others = sum(prob for token, prob in probs.items() if token not in odds)
        whole = none + others + sum(odds.values())
        for token, candidate in candidates.items():
            candidate.path = odds.get(token, probs[token]) / whole
            if candidate.is_refined:
                candidate.refined = min(max(candidate.path, LEAST_RANKED), 1 - LEAST_RANKED)
                candidate.path = node.request.correct(candidate.kind(speaks), candidate.refined)
        total = sum(candidate.path for candidate in candidates.values())
        for candidate in candidates.values():
            candidate.path *= node.above / max(total, 1.0)
