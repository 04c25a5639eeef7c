"""The whole API as a state machine, against what each sequence and namespace may know.

The long run, a share of it for each seed; COUNTS says what was done, whatever ends the run:

    SSSD_FULL_TESTS=1 SSSD_MACHINE_COUNTS=COUNTS TMPDIR=/dev/shm \\
        python -m pytest tests/serving/test_machine.py --hypothesis-seed=SEED
"""

import functools
import json
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.stateful
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition
from oracle import check_form, paths, successors

from sssd import DatastoreBuilder, DraftBatch, Drafter
from sssd._core import PassCosts
from sssd.errors import (
    BatchError,
    ClosedError,
    InvalidArgumentError,
    InvalidTokenError,
    MemoryLimitError,
)

END = 6
KINDS = 7
"""Each namespace has tokens of its own, so that whatever leaks is seen; the end token is common."""
FIRST = {"": END + 1, "a": END + 1 + KINDS, "b": END + 1 + 2 * KINDS}
VOCABULARY = END + 1 + 3 * KINDS
TOKENS = st.lists(st.integers(0, END), max_size=30)
NAMES = st.sampled_from(["", "a", "b"])
PICK = st.integers(0, 10**6)
SHORTEST_COPY = 6
LIVE, FEEDBACK = 40_000, 20_000
ROOM, SEQUENCE_ROOM = 6_000_000, 200_000
"""Bytes for three namespaces and a few dozen sequences: now and then something does not fit."""
COSTS = PassCosts([0, 4, 16, 64], [1.0, 1.1, 1.3, 3.0])

counts: Counter = Counter()
started = time.process_time()


def rule(**arguments):
    """A rule of the machine that counts how often it ran."""

    def counted(function):
        @functools.wraps(function)
        def run(self, **drawn):
            function(self, **drawn)
            counts[function.__name__] += 1

        return hypothesis.stateful.rule(**arguments)(run)

    return counted


def report(**more):
    operations = {"operations": sum(counts.values()), **dict(counts.most_common())}
    seconds = round(time.process_time() - started, 1)
    if path := os.environ.get("SSSD_MACHINE_COUNTS"):
        Path(path).write_text(json.dumps({"cpu_seconds": seconds, **more, **operations}) + "\n")
    return f"{operations['operations']} operations in {seconds} s: {operations}"


@dataclass
class Namespace:
    """What may be drafted for every sequence of a namespace: which token after which."""

    follows: dict = field(default_factory=lambda: defaultdict(set))
    probable: set = field(default_factory=set)
    """Tokens that the target held probable anywhere: sequences with the same last tokens hear of it."""


@dataclass
class Model:
    """What a sequence is."""

    namespace: Namespace
    tokens: list
    max_length: int | None
    first: int
    predicted: list = field(default_factory=list)
    tree: object = None

    def own(self, tokens):
        """Tokens of this namespace's kind."""
        return [token if token == END else self.first + token for token in tokens]

    def check(self, tree, max_nodes, max_depth=None):
        check_form(tree, max_nodes)
        if (self.tokens or [END])[-1] == END and not (self.predicted and not self.tokens):
            assert len(tree) == 0
            return
        depths, own, said = tree.depths, successors([*self.predicted, *self.tokens]), set(self.predicted)
        if len(self.tokens) > SHORTEST_COPY:
            # a copy that went astray may go on anywhere near
            said |= set(self.tokens)
        if max_depth is not None:
            assert (depths <= max_depth).all()
        if self.max_length is not None:
            assert (depths < max(self.max_length - len(self.tokens), 1)).all()
        for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
            before = int(tree.token_ids[parent]) if parent >= 0 else (self.tokens or [None])[-1]
            assert before != END
            known = own[before] | self.namespace.follows[before] | self.namespace.probable | said
            assert token in known, f"{token} out of the blue"


class Serving(RuleBasedStateMachine):
    """Sequences of one drafter in several namespaces; ``rows`` holds those that are open."""

    def __init__(self):
        super().__init__()
        self.drafter = Drafter(
            vocab_size=VOCABULARY,
            end_token_ids=[END],
            live_bytes=LIVE,
            soft_bytes=FEEDBACK,
            max_bytes=ROOM,
            max_sequence_bytes=SEQUENCE_ROOM,
            threads=2,
        )
        self.age = 0
        self.namespaces = {"": Namespace()}
        self.rows = []
        self.out = DraftBatch(64, 2048)

    def pick(self, number):
        return self.rows[number % len(self.rows)]

    def namespace(self, name):
        return self.namespaces.setdefault(name, Namespace())

    def full(self, sequence=None):
        """Whoever was refused memory was so for a reason."""
        memory = self.drafter.memory
        large = sequence is not None and sequence.memory_bytes > SEQUENCE_ROOM - 80_000
        assert large or memory["used"] > memory["limit"] - 1_000_000

    @rule(
        prompt=TOKENS,
        prediction=st.none() | TOKENS,
        name=NAMES,
        extra=st.none() | st.integers(0, 12),
        background=st.booleans(),
    )
    def begin(self, prompt, prediction, name, extra, background):
        length = None if extra is None else len(prompt) + extra
        model = Model(Namespace(), [], length, FIRST[name])
        prompt, prediction = model.own(prompt), prediction and model.own(prediction)
        model.predicted = prediction or []
        try:
            sequence = self.drafter.begin(
                prompt, prediction, namespace=name, max_length=length, background=background
            )
            assert len(sequence) == len(prompt)
        except MemoryLimitError:
            if name in self.drafter.namespaces():  # there was room for it, and not for the sequence
                self.namespace(name)
            return self.full()
        model.namespace, model.tokens = self.namespace(name), prompt
        self.rows.append((sequence, model))
        return None

    @precondition(lambda self: self.rows)
    @rule(
        at=PICK,
        tokens=TOKENS,
        times=st.sampled_from([1, 1, 1, 9]),
        kind=st.sampled_from(["extend", "prefill"]),
    )
    def append(self, at, tokens, times, kind):
        sequence, model = self.pick(at)
        tokens = model.own(tokens) * times
        try:
            getattr(sequence, kind)(np.array(tokens, np.int64))
        except MemoryLimitError:
            return self.full(sequence)
        model.tokens += tokens
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK, tokens=st.lists(st.integers(0, END), min_size=1, max_size=6), seed=PICK)
    def extend_with_probabilities(self, at, tokens, seed):
        sequence, model = self.pick(at)
        rng = np.random.default_rng(seed)
        tokens = model.own(tokens)
        ids = model.first + rng.integers(0, END, (len(tokens), 2))
        try:
            sequence.extend(tokens, ids, np.full(ids.shape, 0.4, np.float32))
        except MemoryLimitError:
            return self.full(sequence)
        for token, row in zip(tokens, ids.tolist(), strict=True):
            if model.tokens:
                model.namespace.follows[model.tokens[-1]].update(row)
            model.namespace.probable.update(row)
            model.tokens.append(token)
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK, seed=PICK)
    def feedback(self, at, seed):
        """The target's probabilities after each node of the last draft."""
        sequence, model = self.pick(at)
        if model.tree is not None and model.tokens:
            rng = np.random.default_rng(seed)
            before = [model.tokens[-1], *model.tree.token_ids.tolist()]
            ids = model.first + rng.integers(0, END, (len(before), 2))
            sequence.feedback(model.tree, ids, np.full(ids.shape, 0.4, np.float32))
            for token, row in zip(before, ids.tolist(), strict=True):
                model.namespace.follows[token].update(row)
                model.namespace.probable.update(row)

    @precondition(lambda self: self.rows)
    @rule(
        at=PICK,
        max_nodes=st.sampled_from([0, 1, 2, 5, 16, 64, 1024]),
        max_depth=st.none() | st.integers(0, 4),
        min_prob=st.sampled_from([0.0, 0.001, 0.2]),
        rate=st.none() | st.sampled_from([0.1, 1.0, 3.0]),
    )
    def draft(self, at, max_nodes, max_depth, min_prob, rate):
        sequence, model = self.pick(at)
        cost = None if rate is None else COSTS
        model.tree = sequence.draft(max_nodes, max_depth=max_depth, min_prob=min_prob, cost=cost, rate=rate)
        assert (model.tree.probs >= np.float32(min_prob)).all()
        model.check(model.tree, max_nodes, max_depth)

    @precondition(lambda self: self.rows)
    @rule(at=PICK, follow=PICK, bonus=st.integers(0, END))
    def accept(self, at, follow, bonus):
        """Follows the last draft and adds a token, as a decoder does."""
        sequence, model = self.pick(at)
        if model.tree is not None:
            drafted = [(), *paths(model.tree)]
            tokens = [*drafted[follow % len(drafted)], *model.own([bonus])]
            try:
                sequence.extend(tokens)
            except MemoryLimitError:
                return self.full(sequence)
            model.tokens += tokens
            model.tree = None
        return None

    @precondition(lambda self: self.rows)
    @rule(
        count=st.integers(0, 12),
        seed=PICK,
        total=st.none() | st.integers(30, 90),
        min_nodes=st.integers(0, 2),
        rate=st.none() | st.sampled_from([0.1, 3.0]),
        reuse=st.booleans(),
        halves=st.booleans(),
        k=st.sampled_from([0, 0, 2]),
    )
    def step(self, count, seed, total, min_nodes, rate, reuse, halves, k):
        """One step for some of the sequences, in one call or in its halves."""
        chance = random.Random(seed)
        rows = chance.sample(self.rows, min(count, len(self.rows)))
        sequences = [sequence for sequence, _ in rows]
        tokens = [model.own(chance.randint(0, END) for _ in range(chance.randint(0, 3))) for _, model in rows]
        probable = [
            [[model.first + chance.randrange(END) for _ in range(k)] for _ in added]
            for (_, model), added in zip(rows, tokens, strict=True)
        ]
        budgets = [chance.choice([0, 3, 10, 40]) for _ in rows]
        new = {
            "token_ids": [token for row in tokens for token in row],
            "offsets": np.append(0, np.cumsum([len(row) for row in tokens], dtype=int)),
        }
        if k > 0:
            ids = np.array([row for added in probable for row in added], np.int32).reshape(-1, k)
            new |= {"topk_ids": ids, "topk_probs": np.full(ids.shape, 0.4, np.float32)}
        limits = {
            "max_nodes": budgets,
            "total_nodes": total if rate is None else None,
            "min_nodes": min_nodes,
            "cost": None if rate is None else COSTS,
            "rate": rate,
            "out": self.out if reuse else None,
        }
        failures, batch = {}, None
        try:
            if halves:
                self.drafter.extend_batch(sequences, **new)
                batch = self.drafter.draft_batch(sequences, **limits)
            else:
                batch = self.drafter.step(sequences, **new, **limits)
        except BatchError as failed:
            failures, batch = failed.failures, failed.batch
        trees = [None] * len(rows) if batch is None else list(batch)
        assert len(trees) == len(rows)
        assert batch is None or limits["total_nodes"] is None or batch.offsets[-1] <= total
        for at, ((_, model), added, row) in enumerate(zip(rows, tokens, probable, strict=True)):
            if at not in failures:
                for token, likely in zip(added, row, strict=True):
                    if model.tokens:
                        model.namespace.follows[model.tokens[-1]].update(likely)
                    model.namespace.probable.update(likely)
                    model.tokens.append(token)
        for at, ((sequence, model), budget, tree) in enumerate(zip(rows, budgets, trees, strict=True)):
            if at in failures:
                assert type(failures[at]) is MemoryLimitError
                assert not tree
                self.full(sequence)
            elif tree is not None:
                model.check(tree, budget)
                model.tree = tree

    @precondition(lambda self: self.rows)
    @rule(at=PICK, taken=st.integers(0, 40))
    def truncate(self, at, taken):
        sequence, model = self.pick(at)
        length = max(len(model.tokens) - taken, 0)
        try:
            sequence.truncate(length)
        except MemoryLimitError:
            return self.full(sequence)
        del model.tokens[length:]
        model.tree = None
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK)
    def fork(self, at):
        sequence, model = self.pick(at)
        try:
            fork = sequence.fork()
        except MemoryLimitError:
            return self.full(sequence)
        twin = Model(model.namespace, list(model.tokens), model.max_length, model.first, model.predicted)
        self.rows.append((fork, twin))
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK, how=st.sampled_from(["finish", "close", "commit"]))
    def end(self, at, how):
        sequence, model = self.pick(at)
        getattr(sequence, how)()
        if how != "close":
            for token, following in successors(model.tokens).items():
                model.namespace.follows[token] |= following
        if how != "commit":
            assert sequence.closed
            self.rows.pop(at % len(self.rows))
            try:
                self.drafter.draft_batch([sequence])
            except BatchError as failed:
                assert [type(failure) for failure in failed.failures.values()] == [ClosedError]  # noqa: PT017
            else:
                raise AssertionError("a closed sequence was drafted for")

    @precondition(lambda self: self.rows)
    @rule(name=NAMES)
    def remove_namespace(self, name):
        assert self.drafter.remove_namespace(name) == (name in self.namespaces)
        self.namespaces.pop(name, None)

    @precondition(lambda self: self.rows)
    @rule(at=PICK, how=st.integers(0, 5))
    def misuse(self, at, how):
        """What is refused changes nothing, as the invariants tell."""
        sequence, _ = self.pick(at)
        wrong = [
            (InvalidTokenError, lambda: sequence.extend([FIRST[""], "a"])),
            (InvalidArgumentError, lambda: sequence.truncate(len(sequence) + 1)),
            (InvalidArgumentError, lambda: sequence.extend([1], [[1]], [[1.5]])),
            (InvalidArgumentError, lambda: self.drafter.step([sequence] * 2, [1, 1], [0, 1, 2])),
            (InvalidTokenError, lambda: self.drafter.step([sequence], [1.5], [0, 1])),
            (InvalidArgumentError, lambda: self.drafter.step([sequence], [1], [0, 2])),
        ]
        error, call = wrong[how]
        with pytest.raises(error):
            call()

    @precondition(lambda self: self.rows)
    @rule(keep=st.booleans())
    def weights(self, keep):
        """Sequences to come start with other weights, for which the oracle holds as well."""
        if "" not in self.namespaces:
            return
        state = self.drafter.state_dict()
        self.drafter.reset()
        if keep:
            self.drafter.load_state_dict(state)
            assert self.drafter.state_dict() == state

    @precondition(lambda self: self.rows and self.age >= 15)
    @rule()
    def save_and_load(self):
        """The next drafter knows what the last one knew; the sequences are those of the last."""
        with tempfile.TemporaryDirectory() as folder:
            self.drafter.save(folder)
            self.drafter = Drafter.load(folder, max_bytes=ROOM, max_sequence_bytes=SEQUENCE_ROOM, threads=2)
            with DatastoreBuilder(f"{folder}/live.sssd", vocab_size=VOCABULARY) as builder:
                if "" in self.namespaces:
                    self.drafter.freeze(builder)
        self.namespace("")
        for sequence, _ in self.rows:
            sequence.close()
        self.rows, self.age = [], 0

    @invariant()
    def everything_holds_together(self):
        self.age += 1
        for sequence, model in self.rows:
            assert sequence.token_ids.tolist() == model.tokens
            sequence.check_integrity()
        listed, memory = self.drafter.namespaces(), self.drafter.memory
        assert set(listed) == set(self.namespaces)
        assert memory["used"] <= memory["peak"] <= memory["limit"]
        if not self.rows:
            assert memory["used"] == memory["shared"]

    def teardown(self):
        report()


def teardown_module():
    print(report(finished=True))  # noqa: T201


FULL = bool(os.environ.get("SSSD_FULL_TESTS"))
Serving.TestCase.settings = settings(
    max_examples=500 if FULL else 40,
    stateful_step_count=400 if FULL else 40,
    phases=[Phase.generate, Phase.shrink] if FULL else list(Phase),
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck) if FULL else [],
)
TestServing = pytest.mark.timeout(3600 if FULL else 600)(Serving.TestCase)
