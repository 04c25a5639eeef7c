"""The whole API as a state machine, against what each sequence and namespace may know.

With and without a datastore, with namespaces that expire, and with sequences known by string ids. Batches are
compared with single calls, and trees with smaller ones. ``benches/machine.py`` makes the long run, by many
seeds; ``SSSD_MACHINE_COUNTS`` names a file that says what was done, whatever ends the run.
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
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition
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
from sssd.requests import Requests

END = 6
KINDS = 7
"""Each namespace has tokens of its own, so that whatever leaks is seen; the end token is common."""
FIRST = {"": END + 1, "a": END + 1 + KINDS, "b": END + 1 + 2 * KINDS}
VOCABULARY = END + 1 + 3 * KINDS
TOKENS = st.lists(st.integers(0, END), max_size=30)
NAMES = st.sampled_from(["", "a", "b"])
IDS = st.sampled_from(["", "0", "req-é", *(f"cmpl-{number}" for number in range(30))])
DOCUMENTS = [
    [first + token for token in document[:-1]]
    + [document[-1] if document[-1] == END else first + document[-1]]
    for first in FIRST.values()
    for document in ([0, 1, 2, 6, 3, 0, 1], [4, 6, 6, 5, END], [0, 1, 2, 6, 4], [1, 2, 0])
]
"""What the datastore holds: of each kind, with one token of it (6) that only the datastore says."""
PICK = st.integers(0, 10**6)
SHORTEST_COPY = 6
LIVE, FEEDBACK = 40_000, 20_000
ROOM, SEQUENCE_ROOM = 6_000_000, 200_000
"""Bytes for three namespaces and a few dozen sequences: now and then something does not fit."""
COSTS = PassCosts([0, 4, 16, 64], [1.0, 1.1, 1.3, 3.0])
SHORT = 0.004
"""Seconds that namespaces outlive their sequences, in some runs."""

counts: Counter = Counter()
checks: Counter = Counter()
"""Trees that were compared with those of other calls, by kind."""
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
        found = {"cpu_seconds": seconds, **more, "checks": dict(checks), **operations}
        Path(path).write_text(json.dumps(found) + "\n")
    return f"{operations['operations']} operations in {seconds} s: {operations}"


def same(tree, other):
    """Whether trees agree to the last bit."""
    names = ("token_ids", "parents", "probs", "sources")
    return all(getattr(tree, name).tobytes() == getattr(other, name).tobytes() for name in names)


@functools.cache
def store():
    """The path of the datastore. The folder goes when the interpreter does."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "store.sssd"
    with DatastoreBuilder(path, vocab_size=VOCABULARY) as builder:
        for document in DOCUMENTS:
            builder.add(document)
    return folder, path


@dataclass
class Namespace:
    """What may be drafted for every sequence of a namespace: which token after which."""

    follows: dict = field(default_factory=lambda: defaultdict(set))
    probable: set = field(default_factory=set)
    """Tokens that the target held probable anywhere: sequences with the same last tokens hear of it."""
    used: tuple = (0.0, 0.0)
    """When it was last in use at the earliest, and at the latest."""

    def ended(self):
        """A sequence of it has just ended."""
        self.used = self.used[0], time.monotonic()


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

    def append(self, tokens, probable):
        """Appends tokens, at each of which the target held some others probable."""
        for token, likely in zip(tokens, probable, strict=True):
            if self.tokens:
                self.namespace.follows[self.tokens[-1]].update(likely)
            self.namespace.probable.update(likely)
            self.tokens.append(token)

    def check(self, stored, tree, max_nodes, max_depth=None):
        """Whether the tree holds only what the sequence may know, and the datastore, ``stored``."""
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
            # a prediction comes before the prompt, and so before an empty one
            known |= stored.get(self.predicted[-1] if before is None else before, set())
            assert token in known, f"{token} out of the blue"


class Serving(RuleBasedStateMachine):
    """Sequences of one drafter in several namespaces; ``rows`` holds those that are open, by their ids."""

    @initialize(datastore=st.booleans(), ttl=st.sampled_from([None, SHORT, 3600.0]))
    def start(self, datastore, ttl):
        self.ttl = ttl
        self.stored = {}
        self.options = {"max_bytes": ROOM, "max_sequence_bytes": SEQUENCE_ROOM, "threads": 2}
        if ttl is not None:
            self.options["namespace_ttl"] = ttl
        if datastore:
            self.options["datastore"] = store()[1]
            for document in DOCUMENTS:
                for token, following in successors(document).items():
                    self.stored[token] = self.stored.get(token, set()) | following
        self.drafter = Drafter(
            vocab_size=VOCABULARY, end_token_ids=[END], live_bytes=LIVE, soft_bytes=FEEDBACK, **self.options
        )
        self.requests = Requests(self.drafter)
        self.age = 0
        self.namespaces = {"": Namespace()}
        self.rows = []
        self.out = DraftBatch(64, 2048)

    def pick(self, number):
        name, model = self.rows[number % len(self.rows)]
        return self.requests[name], model

    def namespace(self, name, used):
        """The namespace of this name, which somebody asked for between the times of ``used``."""
        namespace = self.namespaces.setdefault(name, Namespace())
        namespace.used = used
        return namespace

    def look(self):
        """Namespaces are there as long as they have sequences, and the time to live after it."""
        before = time.monotonic()
        listed = set(self.drafter.namespaces())
        after = time.monotonic()
        assert listed <= set(self.namespaces)
        busy = {id(model.namespace) for _, model in self.rows}
        for name, namespace in list(self.namespaces.items()):
            if id(namespace) in busy:
                assert name in listed
                namespace.used = before, after
            elif name == "" or self.ttl is None:
                assert name in listed
            elif name in listed:
                assert before - namespace.used[1] < self.ttl
            else:
                assert after - namespace.used[0] >= self.ttl
                checks["namespaces whose time was up"] += 1
                del self.namespaces[name]

    def full(self, sequence=None):
        """Whoever was refused memory was so for a reason."""
        memory = self.drafter.memory
        large = sequence is not None and sequence.memory_bytes > SEQUENCE_ROOM - 80_000
        assert large or memory["used"] > memory["limit"] - 1_000_000

    def forks(self, sequences, each=1):
        """Twins of the sequences; none where one has still to read its prompt, or memory does not suffice."""
        twins = []
        try:
            if all(sequence.ready for sequence in sequences):
                for sequence in sequences:
                    for _ in range(each):
                        twins.append(sequence.fork())
        except MemoryLimitError:
            for twin in twins:
                twin.close()
            return []
        return twins

    @rule(
        request_id=IDS,
        prompt=TOKENS,
        prediction=st.none() | TOKENS,
        name=NAMES,
        extra=st.none() | st.integers(0, 12),
        background=st.booleans(),
    )
    def begin(self, request_id, prompt, prediction, name, extra, background):
        length = None if extra is None else len(prompt) + extra
        model = Model(Namespace(), [], length, FIRST[name])
        prompt, prediction = model.own(prompt), prediction and model.own(prediction)
        model.predicted = prediction or []
        options = {"namespace": name, "max_length": length, "background": background}
        if request_id in self.requests:
            with pytest.raises(InvalidArgumentError, match="is running"):
                self.requests.begin(request_id, prompt, prediction=prediction, **options)
            return None
        self.look()
        before = time.monotonic()
        try:
            sequence = self.requests.begin(request_id, prompt, prediction=prediction, **options)
            assert len(sequence) == len(prompt)
        except MemoryLimitError:
            assert request_id not in self.requests
            if name in self.drafter.namespaces():  # there was room for it, and not for the sequence
                self.namespace(name, (before, time.monotonic()))
            return self.full()
        after, known = time.monotonic(), self.namespaces.get(name)
        idle = (
            known is not None and name != "" and all(known is not other.namespace for _, other in self.rows)
        )
        if idle and self.ttl is not None and before - known.used[1] >= self.ttl:
            del self.namespaces[name]
        model.namespace, model.tokens = self.namespace(name, (before, after)), prompt
        self.rows.append((request_id, model))
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
        model.check(self.stored, model.tree, max_nodes, max_depth)

    @precondition(lambda self: self.rows)
    @rule(
        at=PICK,
        most=st.sampled_from([1, 5, 16, 64, 300]),
        few=st.integers(0, 64),
        min_prob=st.sampled_from([0.0, 0.001]),
        rate=st.sampled_from([0.1, 1.0, 3.0]),
    )
    def first_nodes(self, at, most, few, min_prob, rate):
        """A tree begins with that of any smaller budget, and cost sizes it alike in all calls."""
        sequence, model = self.pick(at)
        refused = self.drafter.memory["refused"]
        twins = self.forks([sequence], 4)
        if twins:
            one, two, three, four = twins
            whole, first = one.draft(most, min_prob=min_prob), two.draft(min(few, most), min_prob=min_prob)
            sized = three.draft(most, min_prob=min_prob, cost=COSTS, rate=rate)
            (batched,) = self.drafter.draft_batch([four], most, min_prob=min_prob, cost=COSTS, rate=rate)
            if self.drafter.memory["refused"] == refused:
                assert same(first, whole.first(few))
                assert [len(sized)] == COSTS.allocate([whole], rate)
                assert same(sized, whole.first(len(sized)))
                assert same(batched, sized)
                model.check(self.stored, whole, most)
                checks["smaller trees"] += len(whole) > 0
            for twin in twins:
                twin.close()

    @precondition(lambda self: self.rows)
    @rule(at=PICK, verified=st.integers(0, 20))
    def cut_draft(self, at, verified):
        """Less is verified than was drafted; what is told later of nodes cut off is not asked for."""
        sequence, model = self.pick(at)
        sequence.cut_draft(verified)
        if model.tree is not None:
            model.tree = model.tree.first(verified)

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
        """One step for some of the sequences, in one call or in its halves: it is what single calls are."""
        chance = random.Random(seed)
        rows = chance.sample(self.rows, min(count, len(self.rows)))
        names = [name for name, _ in rows]
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
        refused = self.drafter.memory["refused"]
        twins = []
        # what the target held probable would reach the namespace twice
        if k == 0 and chance.random() < 0.5:
            for name in names:
                # forks do not await the outcome of the last draft
                self.requests[name].truncate(len(self.requests[name]))
            twins = self.forks([self.requests[name] for name in names])
        failures, batch = {}, None
        try:
            if halves:
                self.requests.extend_batch(names, **new)
                batch = self.requests.draft_batch(names, **limits)
            else:
                batch = self.requests.step(names, **new, **limits)
        except BatchError as failed:
            failures, batch = failed.failures, failed.batch
        trees = [None] * len(rows) if batch is None else list(batch)
        assert len(trees) == len(rows)
        assert batch is None or limits["total_nodes"] is None or batch.offsets[-1] <= total
        for at, ((_, model), added, row) in enumerate(zip(rows, tokens, probable, strict=True)):
            if at not in failures:
                model.append(added, row)
        for at, ((name, model), budget, tree) in enumerate(zip(rows, budgets, trees, strict=True)):
            if at in failures:
                assert type(failures[at]) is MemoryLimitError
                assert not tree
                self.full(self.requests[name])
            elif tree is not None:
                model.check(self.stored, tree, budget)
                model.tree = tree
        if twins and self.drafter.memory["refused"] == refused:
            self.single(rows, tokens, limits, trees, twins, chance, refused)
        for twin in twins:
            twin.close()

    def single(self, rows, tokens, limits, trees, twins, chance, refused):
        """Single calls give the trees of the batch as far as they go, and learn the same from them."""
        alone = []
        for twin, added, budget in zip(twins, tokens, limits["max_nodes"], strict=True):
            try:
                twin.extend(added)
            except MemoryLimitError:
                return self.full(twin)
            alone.append(twin.draft(budget))
        if self.drafter.memory["refused"] != refused:
            return None
        if limits["cost"] is not None and limits["min_nodes"] == 0:
            assert [len(tree) for tree in trees] == COSTS.allocate(alone, limits["rate"])
        for (name, model), twin, tree, whole in zip(rows, twins, trees, alone, strict=True):
            assert same(tree, whole.first(len(tree)))
            if limits["cost"] is None and limits["total_nodes"] is None:
                assert len(tree) == len(whole)
            twin.cut_draft(len(tree))
            drafted = [(), *paths(tree)]
            path = [*chance.choice(drafted), *model.own([chance.randint(0, END)])]
            sequence = self.requests[name]
            for each in (twin, sequence):
                try:
                    each.extend(path)
                except MemoryLimitError:
                    return self.full(each)
            model.tokens += path
            model.tree = None
            if self.drafter.memory["refused"] == refused:
                assert sequence.state_dict() == twin.state_dict()
            checks["single calls"] += len(tree) > 0
        return None

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
    @rule(at=PICK, taken=st.integers(0, 40), tokens=TOKENS)
    def follow(self, at, taken, tokens):
        """A row as an engine has it, changed at its end, or another text."""
        sequence, model = self.pick(at)
        row = model.tokens[: max(len(model.tokens) - taken, 0)] + model.own(tokens)
        equal = [one == two for one, two in zip(model.tokens, row, strict=False)]
        shared = equal.index(False) if False in equal else len(equal)
        anew = shared == 0 < len(model.tokens)
        model.tree = None
        try:
            sequence.follow(np.array(row, np.int32))
        except MemoryLimitError:
            left = sequence.token_ids.tolist()
            assert left in (model.tokens, model.tokens[:shared])
            model.tokens, model.predicted = left, model.predicted if left else []
            return self.full(sequence)
        model.tokens, model.predicted = row, [] if anew else model.predicted
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK, new_id=IDS)
    def fork(self, at, new_id):
        sequence, model = self.pick(at)
        name, _ = self.rows[at % len(self.rows)]
        if new_id in self.requests:
            with pytest.raises(InvalidArgumentError, match="is running"):
                self.requests.fork(name, new_id)
            return None
        try:
            self.requests.fork(name, new_id)
        except MemoryLimitError:
            assert new_id not in self.requests
            return self.full(sequence)
        twin = Model(model.namespace, list(model.tokens), model.max_length, model.first, model.predicted)
        self.rows.append((new_id, twin))
        return None

    @precondition(lambda self: self.rows)
    @rule(at=PICK, how=st.sampled_from(["finish", "close", "commit"]))
    def end(self, at, how):
        sequence, model = self.pick(at)
        name, _ = self.rows[at % len(self.rows)]
        {"finish": self.requests.finish, "close": self.requests.abort, "commit": lambda _: sequence.commit()}[
            how
        ](name)
        # as if it had ended now, if it is the last
        model.namespace.ended()
        if how != "close":
            for token, following in successors(model.tokens).items():
                model.namespace.follows[token] |= following
        if how != "commit":
            assert sequence.closed
            self.rows.pop(at % len(self.rows))
            for gone in (
                self.requests.abort,
                self.requests.finish,
                lambda name: self.requests.draft_batch([name]),
            ):
                with pytest.raises(InvalidArgumentError, match="there is no request"):
                    gone(name)
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
    @rule(at=PICK, how=st.integers(0, 8))
    def misuse(self, at, how):
        """What is refused changes nothing, as the invariants tell."""
        sequence, _ = self.pick(at)
        name, _ = self.rows[at % len(self.rows)]
        wrong = [
            (InvalidTokenError, lambda: sequence.extend([FIRST[""], "a"])),
            (InvalidArgumentError, lambda: sequence.truncate(len(sequence) + 1)),
            (InvalidArgumentError, lambda: sequence.extend([1], [[1]], [[1.5]])),
            (InvalidArgumentError, lambda: self.drafter.step([sequence] * 2, [1, 1], [0, 1, 2])),
            (InvalidTokenError, lambda: self.drafter.step([sequence], [1.5], [0, 1])),
            (InvalidArgumentError, lambda: self.drafter.step([sequence], [1], [0, 2])),
            (InvalidArgumentError, lambda: self.requests.step([name, "nobody"], [1, 1], [0, 1, 2])),
            (InvalidArgumentError, lambda: self.requests.fork("nobody", "somebody")),
            (InvalidArgumentError, lambda: self.requests.step([name, name], [1, 1], [0, 1, 2])),
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

    @precondition(lambda self: self.ttl == SHORT)
    @rule()
    def wait(self):
        """Whoever has no sequences is forgotten."""
        time.sleep(SHORT)

    @precondition(lambda self: self.rows and self.age >= 15)
    @rule(map_learned=st.booleans())
    def save_and_load(self, map_learned):
        """The next drafter knows what the last one knew; the sequences are those of the last."""
        for name, model in self.rows:
            self.requests.abort(name)
            model.namespace.ended()
        assert len(self.requests) == 0
        self.rows, self.age = [], 0
        self.look()
        with tempfile.TemporaryDirectory() as folder:
            self.drafter.save(folder)
            learned, documents = Path(folder) / "live.sssd", 0
            with DatastoreBuilder(learned, vocab_size=VOCABULARY) as builder:
                if "" in self.namespaces:
                    documents = self.drafter.freeze(builder)
            options = dict(self.options)
            if map_learned and documents:
                options["datastore"] = [*([options["datastore"]] if "datastore" in options else []), learned]
                for token, following in self.namespaces[""].follows.items():
                    self.stored[token] = self.stored.get(token, set()) | following
            before = time.monotonic()
            self.drafter = Drafter.load(folder, **options)
        self.requests = Requests(self.drafter)
        after = time.monotonic()
        for namespace in self.namespaces.values():
            namespace.used = before, after
        self.namespace("", (before, after))

    @invariant()
    def everything_holds_together(self):
        self.age += 1
        assert list(self.requests) == [name for name, _ in self.rows]
        for name, model in self.rows:
            sequence = self.requests[name]
            assert sequence.token_ids.tolist() == model.tokens
            sequence.check_integrity()
        self.look()
        memory, counted = self.drafter.memory, self.drafter.metrics
        assert memory["used"] <= memory["peak"] <= memory["limit"]
        assert counted["accepted"]["sum"] <= counted["nodes"]["sum"]
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
