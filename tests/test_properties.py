"""The drafter against the oracle."""

import random

import numpy as np
import pytest
import world
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from oracle import COVERED, check_covered, check_draft, check_form, paths

from sssd import Datastore, Drafter

END = 6
TOKENS = st.lists(st.integers(0, END), max_size=40)


class Drafting(RuleBasedStateMachine):
    """Several sequences of one drafter, each compared with its own history."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.drafter = Drafter(vocab_size=END + 1, end_token_ids=[END])
        self.histories = {}
        self.logs = {}

    @rule(target=sequences, prompt=TOKENS)
    def begin(self, prompt):
        sequence = self.drafter.begin(prompt)
        self.histories[sequence] = list(prompt)
        self.logs[sequence] = [("begin", list(prompt))]
        return sequence

    @rule(sequence=sequences, tokens=TOKENS)
    def extend(self, sequence, tokens):
        sequence.extend(np.array(tokens, np.int64))
        self.histories[sequence] += tokens
        self.logs[sequence].append(("extend", tokens))

    @rule(sequence=sequences, max_nodes=st.sampled_from([0, 1, 2, 5, 16, 64, 1024]))
    def draft(self, sequence, max_nodes):
        tree = sequence.draft(max_nodes, min_prob=0.0)
        check_draft(self.histories[sequence], {END}, tree, max_nodes)
        self.logs[sequence].append(("draft", max_nodes))

    @rule(sequence=sequences)
    def what_followed_the_last_token_is_drafted(self, sequence):
        tree = sequence.draft(1024, max_depth=1, min_prob=0.0)
        check_covered(self.histories[sequence], {END}, tree)
        self.logs[sequence].append(("draft", 1024, 1, 0.0))

    @rule(
        sequence=sequences, max_nodes=st.integers(1, 40), follow=st.integers(0, 40), bonus=st.integers(0, END)
    )
    def step(self, sequence, max_nodes, follow, bonus):
        """Accepts a drafted path and a bonus token, as a decoder does."""
        drafted = paths(sequence.draft(max_nodes))
        accepted = [*drafted[follow % len(drafted)], bonus] if drafted else [bonus]
        sequence.extend(accepted)
        self.histories[sequence] += accepted
        self.logs[sequence] += [("draft", max_nodes), ("extend", accepted)]

    @rule(sequence=sequences)
    def replay_gives_the_same(self, sequence):
        """A fresh drafter, given the same calls, drafts the same: nothing leaks between sequences."""
        drafter = Drafter(vocab_size=END + 1, end_token_ids=[END])
        for name, argument, *limits in self.logs[sequence]:
            if name == "begin":
                twin = drafter.begin(argument)
            elif limits:
                twin.draft(argument, max_depth=limits[0], min_prob=limits[1])
            else:
                getattr(twin, name)(argument)
        expected, tree = twin.draft(64), sequence.draft(64)
        self.logs[sequence].append(("draft", 64))
        assert expected.token_ids.tolist() == tree.token_ids.tolist()
        assert expected.parents.tolist() == tree.parents.tolist()
        assert expected.probs.tolist() == tree.probs.tolist()

    @rule(sequence=consumes(sequences))
    def close(self, sequence):
        sequence.close()
        assert sequence.closed
        del self.histories[sequence], self.logs[sequence]

    @invariant()
    def sequences_hold_their_tokens(self):
        for sequence, history in self.histories.items():
            assert len(sequence) == len(history)
            assert sequence.token_ids.tolist() == history


Drafting.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDrafting = Drafting.TestCase


@pytest.fixture(scope="module")
def datastore(tmp_path_factory):
    return Datastore.open(world.store(tmp_path_factory.mktemp("properties") / "store.sssd"))


@pytest.mark.parametrize("kind", ["request", "datastore", "feedback", "live", "prediction", "all"])
@given(
    seed=st.integers(0, 2**32),
    length=st.sampled_from([0, 30, 300, 1000]),
    most=st.integers(0, 80),
    few=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_the_first_nodes_are_the_tree_of_a_smaller_budget(kind, seed, length, most, few, datastore):
    """Whatever speaks for a node, its probability is the same in drafts of all sizes."""

    def has(name):
        return kind in (name, "all")

    rng = random.Random(seed)
    drafter = Drafter(
        vocab_size=world.VOCABULARY,
        datastore=datastore if has("datastore") else None,
        live_bytes=1 << 20 if has("live") else 0,
        soft_bytes=1 << 20 if has("feedback") else 0,
        threads=1,
    )
    for _ in range(3 if has("live") else 0):
        drafter.begin(world.text(rng, 200)).finish()
    sequence = drafter.begin(world.text(rng, length), world.text(rng, 50) if has("prediction") else None)
    for _ in range(4):
        tokens = world.text(rng, 3)
        topk = zip(*[world.distribution(rng, token) for token in tokens], strict=True)
        sequence.extend(tokens, *(topk if has("feedback") else ()))
        whole = sequence.fork().draft(most)
        for budget in {0, most // 2, few.draw(st.integers(0, most)), most}:
            tree, first = sequence.fork().draft(budget), whole.first(budget)
            for array in ("token_ids", "parents", "probs", "sources"):
                assert getattr(tree, array).tolist() == getattr(first, array).tolist(), array
        sequence.draft(16)


@example(list(range(1000)))
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=300, unique=True))
@settings(deadline=None)
def test_copies_go_as_deep_as_the_budget(passage):
    """The second time a passage of distinct tokens starts, the draft is the rest of it."""
    tree = Drafter().begin([*passage, 2**31 - 1, passage[0]]).draft(len(passage) - 1, min_prob=0.0)
    assert paths(tree)[-1] == tuple(passage[1:])


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(100, 200))
@settings(deadline=None)
def test_a_repetition_is_drafted_on_its_second_appearance(before, token):
    sequence = Drafter().begin(before)
    sequence.extend([token, token + 1])
    sequence.extend([token])
    assert (token + 1,) in paths(sequence.draft(1))


@example(list(range(1, COVERED + 1)))
@given(st.lists(st.integers(1, 50), min_size=1, max_size=COVERED))
@settings(deadline=None)
def test_everything_that_followed_the_last_token_is_drafted(followers):
    history = [token for follower in followers for token in (0, follower)] + [0]
    check_covered(history, set(), Drafter().begin(history).draft(1024, max_depth=1, min_prob=0.0))


def test_trees_keep_their_form_while_the_weights_are_learned():
    text = np.random.default_rng(0).zipf(1.5, 4000) % 100
    sequence = Drafter().begin(text[:100])
    for start in range(100, len(text), 4):
        check_form(sequence.draft(48), 48)
        sequence.extend(text[start : start + 4])
