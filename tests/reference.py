"""The predictor once more, slowly and plainly: what ``docs/predictor.md`` says, in the same order.

``Request`` is one request: its tokens, what it has learned, and ``expand``, the probabilities after a node. A
node is the tuple of tokens that leads to it from the root, which is the last token of the request. Nothing is
shared with the Rust code but the datastore's look-ups, which have an oracle of their own
(``datastore/test_oracle.py``).
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
from reference_ranking import Node, Ranking

REQUEST, LOWER, STORE, LIVE, ALIGNED, FEEDBACK, SUCCESSORS = range(7)
SAMPLED, BLENDED = (REQUEST, LOWER, STORE, LIVE, ALIGNED), (REQUEST, LOWER, STORE, LIVE, ALIGNED, FEEDBACK)
# in these a longer match is a shorter one too; the others sample each length anew
NESTED = (REQUEST, LOWER, LIVE)

ORDERS = (1, 2, 3, 4, 6, 10)
LIVE_ORDERS = (2, 4, 8)
FEEDBACK_ORDERS = (1, 2, 3, 5)
LONGEST = 32
SAMPLES, SHORTER_SAMPLES, LOWER_SAMPLES = 64, 16, 8
WHOLE, NEWEST = 10_240, {1: 2048, 2: 4096}
WORTH_LOWER, WORTH_OFFERING, LEAST_REFINED = 0.04, 0.0006, 0.003
WORTH_VOICES = 0.04
COPY = 7
NONE = -1

CLASSES, COUNTS, DISTINCTS, PEAKS, STEPS, AGES, KINDS = 12, 8, 5, 8, 17, 9, 12
HALF = 8.5
TEXTS, OTHERS = 9 * 6 * 2 * 2, 3 * 4 * 7 * 4 * 4
GROUPS = (0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5)


def class_of(length: int) -> int:
    """Match lengths 1 to 6 alone, then ever wider."""
    return sum(length > last for last in (1, 2, 3, 4, 5, 6, 8, 11, 15, 23, 31))


def step_of(value: float, last_of_each: tuple[int, ...]) -> int:
    return sum(value > last for last in last_of_each)


def scale(p: float) -> float:
    """A step for each halving of a probability, above one half of its complement; linear within one."""
    mantissa, exponent = math.frexp(min(p, 1 - p))
    steps = (exponent - 1 + 2 * mantissa - 1 if mantissa else -127) + 1
    return min(max(HALF + steps if p < 0.5 else HALF - steps, 0.0), STEPS - 1.001)


class Weights:
    """The learned tables: rates are pairs of value (in units of 2^-16) and count."""

    def __init__(self, packed: bytes):
        escapes, refinements = len(BLENDED) * CLASSES * COUNTS * DISTINCTS, (TEXTS + OTHERS) * STEPS
        gates, ages = 7 * CLASSES * PEAKS, AGES * KINDS
        packed = packed[-4 * (escapes + refinements + gates + ages) :]
        rates = np.frombuffer(packed, "<u2", 2 * (escapes + refinements)).astype(int).reshape(-1, 2)
        floats = np.frombuffer(packed, "<f4", offset=rates.size * 2).astype(float)
        self.escapes = rates[:escapes].reshape(len(BLENDED), CLASSES, COUNTS, DISTINCTS, 2)
        self.refinements = rates[escapes:].reshape(-1, STEPS, 2)
        self.gates = floats[:gates].reshape(7, CLASSES, PEAKS)
        self.ages = floats[gates:].reshape(AGES, KINDS)

    def tables(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("escapes", "refinements", "gates", "ages")}

    @staticmethod
    def update(rate: Any, outcome: bool, memory: int) -> None:
        value, count = int(rate[0]), min(int(rate[1]) + 1, memory)
        rate[:] = value + int(((65535 if outcome else 0) - value) / count), count


def escape_cell(source: int, klass: int, count: float, distinct: int) -> tuple[int, ...]:
    return source, klass, step_of(int(count), (1, 2, 3, 5, 9, 19, 49)), step_of(distinct, (1, 2, 4, 9))


def feedback_cell(klass: int, writes: int, peak: float) -> tuple[int, ...]:
    count = min((writes + 1).bit_length() - 1, COUNTS - 1)
    return FEEDBACK, klass, count, min(int(peak * (DISTINCTS - 0.01)), DISTINCTS - 1)


def gate_cell(source: int, klass: int, peak: float) -> tuple[int, ...]:
    return source, klass, min(int(peak * PEAKS), PEAKS - 1)


@dataclass
class Candidate:
    """A token that may follow a node."""

    probs: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    classes: dict[int, int] = field(default_factory=dict)
    samples: list["Sample"] = field(default_factory=list)
    occurrence: int = 0
    """Of the token in the request, if no context speaks for it: 0 never, 1 long ago, 2 recent, 3 just now."""
    mixed: float = 0.0
    refined: float = 0.0
    path: float = 0.0

    @property
    def is_refined(self) -> bool:
        return self.mixed >= LEAST_REFINED

    @property
    def uncorrected(self) -> float:
        """The probability before this request's correction."""
        return self.refined if self.is_refined else self.mixed

    def look(self, source: int, table: tuple[int, ...]) -> int:
        return table[min(self.classes.get(source, NONE) + 1, len(table) - 1)]

    def row(self, speaks: set[int]) -> int:
        """The row of refinements for this support."""
        request = self.look(REQUEST, GROUPS)
        live = self.look(LIVE, (0, 1, 1, 1, 2))
        aligned = self.look(ALIGNED, (0, 1, 1, 1, 1, 2, 2, 2, 3))
        feedback = self.look(FEEDBACK, (1, 2, 3, 4, 5, 6)) if FEEDBACK in speaks else 0
        if live or aligned or feedback:
            group = 2 + (request > 3) if request else int(self.occurrence > 0)
            store = self.look(STORE, (1, 2, 2, 3)) if STORE in speaks else 0
            return TEXTS + (((live * 4 + aligned) * 7 + feedback) * 4 + group) * 4 + store
        group = request or (0, 6, 7, 8)[self.occurrence]
        store = max(self.look(STORE, GROUPS), 1) if STORE in speaks else 0
        return ((group * 6 + store) * 2 + (LOWER in self.classes)) * 2 + (SUCCESSORS in self.classes)

    def kind(self, speaks: set[int]) -> int:
        """The kind of evidence, for what is special about this request."""
        others = {STORE, LIVE, FEEDBACK}
        return (
            self.look(REQUEST, (0, 1, 2, 2, 2, 3)) * 3
            + bool(others & speaks)
            + bool(others & set(self.classes))
        )


@dataclass
class Sample:
    """An earlier occurrence of a node's context: what followed it, and how many tokens agreed."""

    source: int
    rest: list[int]
    length: int
    weight: float = 1.0
    domain: int = 0

    def after(self) -> "Sample":
        length = self.length + 1
        if self.source == ALIGNED:  # found again: a copy as of 4 tokens, a prediction as of 9
            length = 4 if self.length <= 4 else 9 if self.length <= 8 else length
        return Sample(self.source, self.rest[1:], min(length, LONGEST), self.weight, self.domain)


@dataclass
class Expansion:
    """What may follow a node, and why."""

    candidates: dict[int, Candidate]
    contexts: dict[int, list[tuple[int, tuple[int, ...]]]]
    """Of each source, longest first: class and cell of the escape."""
    said: dict[int, tuple[float, int]]
    votes: dict[int, float]
    """Of each source that has samples, the weight of those with the longest context."""
    gates: dict[int, tuple[int, ...]]
    weights: dict[int, float]
    voices: list[tuple[int, float, int, int]] = field(default_factory=list)
    """Of a datastore with several domains: token, what the sample counts, class, domain."""
    told_apart: bool = False


class Knowledge:
    """What requests know of one another: finished documents and the target's distributions."""

    def __init__(self) -> None:
        self.documents: list[list[int]] = []
        self.feedback: dict[tuple[int, ...], tuple[list[tuple[int, float]], int]] = {}

    def insert(self, context: list[int], best: list[tuple[int, float]]) -> None:
        kept = [
            (token, max(int(np.float32(prob) * np.float32(65535) + 0.5), 1) / 65535) for token, prob in best
        ]
        for order in FEEDBACK_ORDERS:
            if len(context) >= order:
                key = tuple(context[-order:])
                self.feedback[key] = kept, min(self.feedback.get(key, (kept, 0))[1] + 1, 255)

    def find(self, context: list[int]) -> list[Any]:
        return [
            self.feedback.get(tuple(context[-n:])) if len(context) >= n else None for n in FEEDBACK_ORDERS
        ]


def best(ids: Any, probs: Any) -> list[tuple[int, float]]:
    """The 8 most probable tokens of a distribution; what is said of a token first counts."""
    held: dict[int, float] = {}
    for token, prob in zip(ids, np.float32(probs).tolist(), strict=True):
        if prob > 0:
            held.setdefault(int(token), prob)
    return sorted(held.items(), key=lambda entry: -entry[1])[:8]


class Bias:
    """A bias on the log-odds that follows outcomes by Newton steps from a prior at 0."""

    def __init__(self, prior: float):
        self.prior, self.value, self.centred, self.information = prior, 0.0, 0.0, 0.0
        self.gradient = self.pending = 0.0

    def learn(self) -> None:
        if self.pending > 0:
            self.information = max(self.information * 0.998, self.prior) + self.pending
            self.value = min(max(self.value + self.gradient / self.information, -2.5), 2.5)
            self.centred = self.value - 0.5 * (self.information - self.prior) / self.information**2
            self.gradient = self.pending = 0.0


class Domains:
    """How much an occurrence counts in each domain of a datastore, of which each has a store of its own."""

    def __init__(self, stores: list[Any], small: dict[int, dict[int, list[int]]]):
        self.stores, self.small = stores, small
        self.evidence, self.weights = [0.0] * len(stores), [1.0] * len(stores)

    def start(self) -> None:
        odds = [max(2 + evidence, 0.0) for evidence in self.evidence]
        self.weights = [max(exp(own - max(odds)), 0.01) for own in odds]

    def samples(self, text: list[int]):
        """Of each domain by itself: as many as its occurrences count, 16 at least, evenly spread."""
        for length in range(min(8, len(text)), 0, -1):
            found = [
                store.continuations(text[-length:], limit=1000, max_tokens=100)
                if store.count(text[-length:])
                else []
                for store in self.stores
            ]
            total = sum(len(own) * weight for own, weight in zip(found, self.weights, strict=True))
            assert sum(map(len, found)) <= 256, "more are known by a part of them"
            if total == 0:
                continue
            for domain, (own, weight) in enumerate(zip(found, self.weights, strict=True)):
                wanted = max(len(own) * weight * min(SAMPLES / total, 1), 16 * weight)
                wanted = min(len(own), math.floor(wanted + 0.5))
                due = len(own) // 2
                for rest in own:
                    due += wanted
                    if due >= len(own):
                        due -= len(own)
                        yield Sample(STORE, rest.tolist(), length, weight * len(own) / wanted, domain)
            if total >= 2 * SAMPLES or length == 2:
                return

    def successors(self, token: int) -> list[tuple[int, float]]:
        """Those of the domain that counts most, if it is small and has most of what counts of the token."""
        best = self.weights.index(max(self.weights))
        sizes = [store.count([]) for store in self.stores]
        others = sum(size * weight for size, weight in zip(sizes, self.weights, strict=True)) - sizes[best]
        others /= max(sum(sizes) - sizes[best], 1)
        followed = self.small.get(best, {}).get(token, [])
        part = len(followed) / max(sum(store.count([token]) for store in self.stores), 1)
        if part * (1 + others) <= others:
            return []
        counts = Counter(followed)
        order = sorted(counts, key=lambda other: (-counts[other], other))[:32]
        return [(other, counts[other] / len(followed)) for other in order]

    def learn(self, voices: list[tuple[int, float, int, int]], truth: int) -> None:
        """Each domain alone and all together are experts that predict the token that came."""

        def blended(own: set[int]) -> float:
            prob, rest = 0.1, 1.0
            for klass in range(CLASSES - 1, -1, -1):
                held = [(t, w / self.weights[d]) for t, w, k, d in voices if k == klass and d in own]
                count = sum(weight for _, weight in held)
                prob += rest * sum(weight for token, weight in held if token == truth) / (count + 1)
                rest /= count + 1
            return prob

        if voices:
            together = blended(set(range(len(self.stores))))
            for domain, before in enumerate(self.evidence):
                evidence = 0.98 * before + math.log(blended({domain}) / together)
                self.evidence[domain] = min(max(evidence, -8.0), 8.0)


class Request:
    def __init__(
        self,
        weights: bytes,
        prompt: list[int],
        prediction: list[int],
        knowledge: Knowledge,
        store: Any = None,
        end_tokens: tuple[int, ...] = (),
        ranking: Ranking | None = None,
    ):
        self.weights, self.knowledge, self.store, self.end_tokens = (
            Weights(weights),
            knowledge,
            store,
            end_tokens,
        )
        self.tokens, self.predicted = [*prediction, *prompt], len(prediction)
        self.output = 0
        self.recent: list[tuple[int, float]] = []
        self.next, self.run, self.astray = (0 if prediction else None), 0, 0
        self.knots = [Bias(1.0) for _ in range(8)]
        self.kinds = [Bias(6.0) for _ in range(KINDS)]
        self.ranking, self.luck = ranking, [0.3] * 7
        self.followed: tuple[int, ...] | None = None
        self.domains: Domains | None = None

    # looking up

    def chain(self, length: int, context: list[int], before: int):
        """Positions below ``before``, newest first, that end the last ``length`` tokens of ``context``."""
        wanted = context[-length:] if len(context) >= length else None
        for position in range(before - 1, max(length - 1, self.earliest(length)) - 1, -1):
            if self.tokens[position - length + 1 : position + 1] == wanted:
                yield position

    def earliest(self, length: int) -> int:
        """Where contexts of ``length`` tokens begin to be looked for: nearby, in a long text."""
        size = len(self.tokens)
        return size - NEWEST.get(length, size) if size > WHOLE else 0

    @staticmethod
    def agree(text: list[int], position: int, context: list[int]) -> int:
        """How many tokens up to ``position`` are those at the end of ``context``."""
        length = 0
        while length < min(position + 1, len(context)) and text[position - length] == context[-1 - length]:
            length += 1
        return length

    def request_samples(self):
        last, context = len(self.tokens) - 1, self.tokens[-LONGEST:]
        found, steps, longer = 0, 4 * SAMPLES, LONGEST + 1
        for order in reversed(ORDERS):
            most = min(SAMPLES, found + SHORTER_SAMPLES) if found else SAMPLES
            for position in self.chain(order, self.tokens, last):
                if found >= most or steps == 0:
                    break
                steps -= 1
                length = self.agree(self.tokens, position, context)
                if length < longer:
                    found += 1
                    yield Sample(REQUEST, self.tokens[position + 1 :], length)
            longer = order

    def aligned_samples(self):
        """Where the text goes on that the output follows."""
        predicted = self.next is not None and self.next < self.predicted
        end = self.predicted if predicted else len(self.tokens)
        if self.next is None or self.next >= end:
            return
        if self.astray == 0:
            if self.predicted:
                yield Sample(ALIGNED, self.tokens[self.next : end], self.run + 9)
            return
        ahead, last = self.tokens[self.next : min(self.next + 16, end)], self.tokens[-1]
        left_out = self.next + ahead.index(last) + 1 if last in ahead else end
        for length, position in ((1, self.next + self.astray), (2, self.next), (3, left_out)):
            if position < end:
                yield Sample(ALIGNED, self.tokens[position:end], length + (4 if self.predicted else 0))

    def store_samples(self):
        if self.domains:
            yield from self.domains.samples(self.tokens[self.predicted :])
            return
        text = self.tokens[self.predicted :]
        for length in range(min(8, len(text)), 0, -1):
            total = self.store.count(text[-length:])
            if total == 0:
                continue
            found = self.store.continuations(text[-length:], limit=SAMPLES, max_tokens=100)
            for rest in found:
                yield Sample(STORE, rest.tolist(), length, total / len(found))
            if total >= 2 * SAMPLES or length == 2:
                return

    def live_samples(self):
        context = self.tokens[self.predicted :][-LONGEST:]
        found, longer = 0, LONGEST + 1
        for order in reversed(LIVE_ORDERS):
            for document in reversed(self.knowledge.documents):
                for position in range(len(document) - 2, -1, -1):
                    length = self.agree(document, position, context)
                    if order <= length < longer and found < SAMPLES:
                        found += 1
                        yield Sample(LIVE, document[position + 1 :], length)
            longer = order

    def lower_samples(self, node: tuple[int, ...]):
        """Occurrences of a node's last two tokens (at depth 1, of its one) after another than on its path."""
        length = min(2, len(node))
        path = [self.tokens[-1], *node]
        found = 0
        for step, position in enumerate(self.chain(length, path, len(self.tokens))):
            if found == LOWER_SAMPLES or step == 2 * LOWER_SAMPLES:
                return
            if self.agree(self.tokens, position, path[-length - 1 :]) == length:
                found += 1
                yield Sample(LOWER, self.tokens[position + 1 :], length)

    # predicting

    def draft(self) -> None:
        """Forgets what was expanded for the draft before."""
        self.age = min(max(self.output, 1).bit_length() - 1, AGES - 1)
        biases = self.weights.ages[self.age]
        self.odds = [exp(kind.centred + bias) for kind, bias in zip(self.kinds, biases, strict=True)]
        if self.domains:
            self.domains.start()
        self.expansions: dict[tuple[int, ...], Expansion] = {}
        if self.ranking:
            self.ranking.start(self.tokens[self.predicted :])
        self.followed = () if self.tokens and self.tokens[-1] not in self.end_tokens else None

    def expand(self, node: tuple[int, ...]) -> Expansion:
        """What may follow a node of the draft."""
        if node not in self.expansions:
            self.expansions[node] = self._expand(node)
        return self.expansions[node]

    def _expand(self, node: tuple[int, ...]) -> Expansion:
        if node:
            own = self.expand(node[:-1]).candidates[node[-1]]
            samples, above = own.samples, own.path
            if above >= WORTH_LOWER and own.classes.get(REQUEST, NONE) < COPY:
                samples = [*samples, *self.lower_samples(node)]
        else:
            samples, above = [*self.request_samples(), *self.aligned_samples()], 1.0
            samples += [*(self.store_samples() if self.store else ()), *self.live_samples()]
        out = Expansion({}, {source: [] for source in BLENDED}, {}, {}, {}, {})
        out.told_apart = above >= WORTH_VOICES
        self.blend(samples, out)
        self.blend_feedback(node, out)
        successors = self.successors(node[-1] if node else self.tokens[-1])
        if successors:
            out.gates[SUCCESSORS] = gate_cell(SUCCESSORS, 0, successors[0][1])
        gates = {source: exp(self.weights.gates[cell]) for source, cell in out.gates.items()}
        out.weights = {source: gate / sum(gates.values()) for source, gate in gates.items()}
        lists = {
            FEEDBACK: [(t, p, c) for t, (p, c) in out.said.items()],
            SUCCESSORS: [(*s, 0) for s in successors],
        }
        for source, offered in lists.items():
            for token, prob, klass in offered:
                if token in out.candidates or above * out.weights[source] * prob >= WORTH_OFFERING:
                    candidate = out.candidates.setdefault(token, Candidate())
                    candidate.probs[source], candidate.classes[source] = prob, klass
        self.refine(above, out)
        if self.ranking:
            self.ranking.rank(Node(self, node, above, out, successors))
        return out

    def blend(self, samples: list[Sample], out: Expansion) -> None:
        """Prediction by partial matching within each source that has samples."""
        votes = defaultdict(lambda: defaultdict(list))
        for sample in reversed(samples):
            if sample.rest:
                token, klass = sample.rest[0], class_of(sample.length)
                candidate = out.candidates.setdefault(token, Candidate())
                candidate.samples.append(sample.after())
                longest = candidate.classes.get(sample.source, NONE)
                candidate.classes[sample.source] = max(longest, klass)
                votes[sample.source][klass].append((token, sample.weight))
                if sample.source == STORE and self.domains and out.told_apart:
                    out.voices.append((token, sample.weight, klass, sample.domain))
        for source, by_class in votes.items():
            rest = 1.0
            for klass in sorted(by_class, reverse=True):
                voting = [k for k in by_class if k == klass or (source in NESTED and k > klass)]
                count = sum(weight for k in voting for _, weight in by_class[k])
                seen = sum(c.classes.get(source, NONE) >= klass for c in out.candidates.values())
                cell = escape_cell(source, klass, count, seen)
                # less than one occurrence that counts whole is worth as much less, and no lesson
                held = (1 - self.weights.escapes[cell][0] / 65536) * min(count, 1.0)
                for k in voting:
                    for token, weight in by_class[k]:
                        out.candidates[token].probs[source] += rest * held * weight / count
                rest *= 1 - held
                if count >= 1:
                    out.contexts[source].append((klass, cell))
            peak = max(candidate.probs[source] for candidate in out.candidates.values())
            out.gates[source] = gate_cell(source, max(by_class), peak)
            out.votes[source] = sum(weight for _, weight in by_class[max(by_class)])

    def blend_feedback(self, node: tuple[int, ...], out: Expansion) -> None:
        """The same over the target's own distributions, and over what it lately held probable."""
        if not self.knowledge.feedback:
            return
        found = []
        for order, held in enumerate(self.knowledge.find([*self.tokens[self.predicted :], *node])):
            if held is not None:
                peak = held[0][0][1] if held[0] else 0.0
                found.append((order + 1, feedback_cell(order + 1, held[1], peak), held[0]))
        found.reverse()
        if self.recent:
            total = sum(prob for _, prob in self.recent)
            found.append(
                (0, feedback_cell(0, min(int(total * 16), 255), self.recent[0][1] / total), self.recent)
            )
        rest = 1.0
        for klass, cell, tokens in found:
            escape = self.weights.escapes[cell][0] / 65536
            total = sum(prob for _, prob in tokens)
            for token, prob in tokens:
                before, longest = out.said.get(token, (0.0, klass))
                out.said[token] = before + rest * (1 - escape) * prob / total, longest
            rest *= escape
            out.contexts[FEEDBACK].append((klass, cell))
        if found:
            peak = max((prob for prob, _ in out.said.values()), default=0.0)
            out.gates[FEEDBACK] = gate_cell(FEEDBACK, found[0][0], peak)

    def successors(self, token: int) -> list[tuple[int, float]]:
        if self.store is None:
            return []
        if self.domains and (own := self.domains.successors(token)):
            return own
        ids, shares = self.store.successors(token)
        return list(zip(ids.tolist(), shares.tolist(), strict=True))

    def refine(self, above: float, out: Expansion) -> None:
        """Mixes the sources, then asks what became of such probabilities, in general and in this request."""
        speaks = set(out.gates)
        for token, candidate in out.candidates.items():
            parts = (prob * out.weights[source] for source, prob in candidate.probs.items() if prob)
            candidate.mixed = candidate.path = min(sum(parts), 1.0)
            if candidate.is_refined:
                near = self.tokens[self.earliest(1) :][::-1]
                if not {REQUEST, LOWER} & set(candidate.classes) and token in near:
                    distance = near.index(token) + 1
                    candidate.occurrence = 3 - (distance >= 64) - (distance >= 512)
                at = scale(candidate.mixed)
                low, high = self.weights.refinements[candidate.row(speaks), int(at) : int(at) + 2, 0] / 65536
                candidate.refined = low + (high - low) * (at - int(at))
                candidate.path = self.correct(candidate.kind(speaks), candidate.refined)
        total = sum(candidate.path for candidate in out.candidates.values())
        for candidate in out.candidates.values():
            candidate.path *= above / max(total, 1.0)

    def knot(self, p: float) -> tuple[int, float]:
        at = scale(p) * (len(self.knots) - 1) / STEPS
        return int(at), at - int(at)

    def correct(self, kind: int, p: float) -> float:
        knot, above = self.knot(p)
        low, high = (exp(bias.centred) for bias in self.knots[knot : knot + 2])
        odds = p * (low + (high - low) * above) * self.odds[kind]
        return odds / (1 - p + odds)

    # learning

    def extend(self, tokens: list[int], topk: list[Any] | None, tree: Any, max_nodes: int) -> None:
        """Appends what the target has produced; ``topk`` has ids and probabilities for each token."""
        for row, token in enumerate(tokens):
            history = self.tokens[self.predicted :]
            if topk is not None:
                probable = best(*topk[row])
                self.knowledge.insert(history, probable)
                self.fade(probable, token)
            elif (held := self.knowledge.find(history)[-1]) is not None:
                self.fade(held[0], token)
            self.output += 1
            self.tokens.append(token)
            self.follow()
        self.learn(tokens, tree, max_nodes)

    def fade(self, probable: list[tuple[int, float]], came: int) -> None:
        """Remembers what was lately probable and did not come."""
        held = {token: prob * 0.8 for token, prob in self.recent}
        for token, prob in probable:
            held[token] = held.get(token, 0.0) + prob
        held.pop(came, None)
        self.recent = sorted(held.items(), key=lambda entry: -entry[1])[:32]

    def follow(self) -> None:
        """Keeps the place in the text that the output follows."""
        last = len(self.tokens) - 1
        if self.next is not None and self.next < last and self.tokens[self.next] == self.tokens[-1]:
            self.next = self.next + 1 if self.next + 1 != self.predicted else None
            self.run, self.astray = self.run + 1, 0
            return
        self.run, self.astray = 0, self.astray + 1
        length = 6 if self.next is None else 3
        wanted = last if self.next is None else self.next
        places = [p for p, _ in zip(self.chain(length, self.tokens, last), range(16), strict=False)]
        places = [p for p in places if self.predicted == 0 or p < self.predicted]
        if places:
            place = min(places, key=lambda p: abs(wanted - p))
            self.next = place + 1 if place + 1 != self.predicted else None
            self.run, self.astray = length, 0
        elif self.predicted == 0 and self.astray > 16:
            self.next = None

    def learn(self, tokens: list[int], tree: dict[tuple[int, ...], int], max_nodes: int) -> None:
        """Learns along the path of the output through the draft; ``tree`` has each node's place in it."""
        for token in tokens:
            node, self.followed = self.followed, None
            # the last of max_nodes was not expanded
            if node is None or (node and tree.get(node, max_nodes) >= max_nodes - 1) or max_nodes == 0:
                return
            if node and node[-1] in self.end_tokens:
                return
            evidence = self.expand(node) if node in self.expansions else None
            assert evidence is not None, "expanded before the tokens came"
            truth = evidence.candidates.get(token)
            if truth is not None:
                self.followed = (*node, token)
            self.learn_escapes(evidence, token, truth)
            if truth is not None and truth.mixed > 0:
                for source, cell in evidence.gates.items():
                    weight = evidence.weights[source]
                    step = 0.02 * (weight * truth.probs[source] / truth.mixed - weight)
                    self.weights.gates[cell] = min(max(self.weights.gates[cell] + step, -8.0), 8.0)
            self.learn_refinements(evidence, token)
            if truth is not None and self.domains:
                self.domains.learn(evidence.voices, token)
            for bias in (*self.knots, *self.kinds):
                bias.learn()
            for source in evidence.gates:
                given = truth.probs[source] if truth else 0.0
                self.luck[source] += 0.03 * (given - self.luck[source])

    def learn_escapes(self, evidence: Expansion, token: int, truth: Candidate | None) -> None:
        """From the longest context down to the first that held the truth."""
        for source, contexts in evidence.contexts.items():
            if source == FEEDBACK:
                held = evidence.said.get(token, (0.0, NONE))[1]
            else:
                held = NONE if truth is None else truth.classes.get(source, NONE)
            for klass, cell in contexts:
                Weights.update(self.weights.escapes[cell], held < klass, 60)
                if held >= klass:
                    break

    def learn_refinements(self, evidence: Expansion, token: int) -> None:
        speaks = set(evidence.gates)
        for other, candidate in evidence.candidates.items():
            if candidate.is_refined:
                came, kind = other == token, candidate.kind(speaks)
                cell = self.weights.refinements[candidate.row(speaks), int(scale(candidate.mixed) + 0.5)]
                Weights.update(cell, came, 255)
                corrected = self.correct(kind, candidate.refined)
                error, variance = came - corrected, corrected * (1 - corrected)
                knot, above = self.knot(candidate.refined)
                shares = (self.knots[knot], 1 - above), (self.knots[knot + 1], above), (self.kinds[kind], 1.0)
                for bias, share in shares:
                    bias.gradient += share * error
                    bias.pending += share * variance
                age = self.weights.ages[self.age]
                age[kind] = min(max(age[kind] + 0.01 * error, -2.0), 2.0)
