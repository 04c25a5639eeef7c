"""The whole API as a state machine, against what each sequence and namespace may know."""

import os
import random
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle import check_form, paths, successors

from sssd import DatastoreBuilder, DraftBatch, Drafter
from sssd.errors import BatchError, ClosedError, MemoryLimitError

END = 6
KINDS = 7
"""Each namespace has tokens of its own, so that whatever leaks is seen; the end token is common."""
FIRST = {"": END + 1, "a": END + 1 + KINDS, "b": END + 1 + 2 * KINDS}
VOCABULARY = END + 1 + 3 * KINDS
TOKENS = st.lists(st.integers(0, END), max_size=30)
NAMES = st.sampled_from(["", "a", "b"])
PICK = st.integers(0, 10**6)
SHORTEST_COPY = 6
LIVE, SOFT = 40_000, 20_000
ROOM = 6_000_000
"""Bytes for three namespaces and a few dozen sequences: now and then something does not fit."""


counts = {"operations": 0}


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
    tree: object = None

    def own(self, tokens):
        """Tokens of this namespace's kind."""
        return [token if token == END else self.first + token for token in tokens]

    def check(self, tree, max_nodes, max_depth=None):
        check_form(tree, max_nodes)
        if not self.tokens or self.tokens[-1] == END:
            assert len(tree) == 0
            return
        depths, own, said = tree.depths, successors(self.tokens), set()
        if len(self.tokens) > SHORTEST_COPY:
            # a copy that went astray may go on anywhere near
            said = set(self.tokens)
        if max_depth is not None:
            assert (depths <= max_depth).all()
        if self.max_length is not None:
            assert (depths < max(self.max_length - len(self.tokens), 1)).all()
        for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
            before = int(tree.token_ids[parent]) if parent >= 0 else self.tokens[-1]
            assert before != END
            known = own[before] | self.namespace.follows[before] | self.namespace.probable | said
            assert token in known, "out of the blue"


class Serving(RuleBasedStateMachine):
    """Sequences of one drafter in several namespaces; ``rows`` holds those that are open."""

    def __init__(self):
        super().__init__()
        self.drafter = Drafter(
            vocab_size=VOCABULARY,
            end_token_ids=[END],
            live_bytes=LIVE,
            soft_bytes=SOFT,
            max_bytes=ROOM,
            threads=2,
        )
        self.namespaces = {"": Namespace()}
        self.rows = []
        self.out = DraftBatch(64, 2048)

    def pick(self, number):
        return self.rows[number % len(self.rows)]

    def namespace(self, name):
        return self.namespaces.setdefault(name, Namespace())

    def full(self):
        memory = self.drafter.memory
        assert memory["used"] > memory["limit"] - 1_000_000

    @rule(prompt=TOKENS, name=NAMES, extra=st.none() | st.integers(0, 12), background=st.booleans())
    def begin(self, prompt, name, extra, background):
        length = None if extra is None else len(prompt) + extra
        model = Model(Namespace(), [], length, FIRST[name])
        prompt = model.own(prompt)
        try:
            sequence = self.drafter.begin(prompt, namespace=name, max_length=length, background=background)
            assert len(sequence) == len(prompt)
        except MemoryLimitError:
            if name in self.drafter.namespaces():  # there was room for it, and not for the sequence
                self.namespace(name)
            return self.full()
        model.namespace, model.tokens = self.namespace(name), prompt
        self.rows.append((sequence, model))
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK, tokens=TOKENS, kind=st.sampled_from(["extend", "prefill"]))
    def append(self, at, tokens, kind):
        sequence, model = self.pick(at)
        tokens = model.own(tokens)
        getattr(sequence, kind)(np.array(tokens, np.int64))
        model.tokens += tokens

    @precondition(lambda self: self.rows)
    @rule(at=PICK, tokens=st.lists(st.integers(0, END), min_size=1, max_size=6), seed=PICK)
    def extend_with_probabilities(self, at, tokens, seed):
        sequence, model = self.pick(at)
        rng = np.random.default_rng(seed)
        tokens = model.own(tokens)
        ids = model.first + rng.integers(0, END, (len(tokens), 2))
        for token, row in zip(tokens, ids.tolist(), strict=True):
            if model.tokens:
                model.namespace.follows[model.tokens[-1]].update(row)
            model.namespace.probable.update(row)
            model.tokens.append(token)
        sequence.extend(tokens, ids, np.full(ids.shape, 0.4, np.float32))

    @precondition(lambda self: self.rows)
    @rule(
        at=PICK,
        max_nodes=st.sampled_from([0, 1, 2, 5, 16, 64, 1024]),
        max_depth=st.none() | st.integers(0, 4),
    )
    def draft(self, at, max_nodes, max_depth):
        sequence, model = self.pick(at)
        model.tree = sequence.draft(max_nodes, max_depth=max_depth)
        model.check(model.tree, max_nodes, max_depth)

    @precondition(lambda self: self.rows)
    @rule(at=PICK, follow=PICK, bonus=st.integers(0, END))
    def accept(self, at, follow, bonus):
        """Follows the last draft and adds a token, as a decoder does."""
        sequence, model = self.pick(at)
        if model.tree is not None:
            drafted = [(), *paths(model.tree)]
            tokens = [*drafted[follow % len(drafted)], *model.own([bonus])]
            sequence.extend(tokens)
            model.tokens += tokens
            model.tree = None

    @precondition(lambda self: self.rows)
    @rule(
        count=st.integers(0, 12),
        seed=PICK,
        total=st.none() | st.integers(30, 90),
        min_nodes=st.integers(0, 2),
        reuse=st.booleans(),
    )
    def step(self, count, seed, total, min_nodes, reuse):
        chance = random.Random(seed)
        rows = chance.sample(self.rows, min(count, len(self.rows)))
        tokens = [model.own(chance.randint(0, END) for _ in range(chance.randint(0, 3))) for _, model in rows]
        budgets = [chance.choice([0, 3, 10, 40]) for _ in rows]
        batch = self.drafter.step(
            [sequence for sequence, _ in rows],
            [token for row in tokens for token in row],
            np.append(0, np.cumsum([len(row) for row in tokens], dtype=int)),
            budgets,
            total_nodes=total,
            min_nodes=min_nodes,
            out=self.out if reuse else None,
        )
        assert len(batch) == len(rows)
        assert total is None or batch.offsets[-1] <= total
        for (_, model), added, budget, tree in zip(rows, tokens, budgets, batch, strict=True):
            model.tokens += added
            model.tree = tree
            model.check(tree, budget)

    @precondition(lambda self: self.rows)
    @rule(at=PICK, taken=st.integers(0, 40))
    def truncate(self, at, taken):
        sequence, model = self.pick(at)
        length = max(len(model.tokens) - taken, 0)
        try:
            sequence.truncate(length)
        except MemoryLimitError:
            return self.full()
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
            return self.full()
        twin = Model(model.namespace, list(model.tokens), model.max_length, model.first)
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

    @rule(name=NAMES)
    def remove_namespace(self, name):
        assert self.drafter.remove_namespace(name) == (name in self.namespaces)
        self.namespaces.pop(name, None)

    @rule()
    def save_and_load(self):
        """The next drafter knows what the last one knew; the sequences are those of the last."""
        with tempfile.TemporaryDirectory() as folder:
            self.drafter.save(folder)
            self.drafter = Drafter.load(folder, max_bytes=ROOM, threads=2)
            with DatastoreBuilder(f"{folder}/live.sssd", vocab_size=VOCABULARY) as builder:
                if "" in self.namespaces:
                    self.drafter.freeze(builder)
        self.namespace("")
        for sequence, _ in self.rows:
            sequence.close()
        self.rows = []

    @invariant()
    def everything_holds_together(self):
        counts["operations"] += 1
        for sequence, model in self.rows:
            assert sequence.token_ids.tolist() == model.tokens
            sequence.check_integrity()
        listed, memory = self.drafter.namespaces(), self.drafter.memory
        assert set(listed) == set(self.namespaces)
        assert memory["used"] <= memory["peak"] <= memory["limit"]
        if not self.rows:
            assert memory["used"] == memory["shared"]


def teardown_module():
    print(f"{counts['operations']} operations")  # noqa: T201


FULL = bool(os.environ.get("SSSD_FULL_TESTS"))
Serving.TestCase.settings = settings(
    max_examples=20_000 if FULL else 40,
    stateful_step_count=80 if FULL else 40,
    deadline=None,
    suppress_health_check=list(HealthCheck) if FULL else [],
)
TestServing = Serving.TestCase
