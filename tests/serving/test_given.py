"""Drafts from outside, and what is allowed."""

import threading

import numpy as np
import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from sssd import SOURCES, Drafter, DraftTree
from sssd.errors import BatchError, ClosedError, InvalidArgumentError, InvalidTokenError
from sssd.hardware import CostCurve, SizingRule

GIVEN = SOURCES.index("given")
TEXT = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2]


def paths(tree):
    found = []
    for node, parent in enumerate(tree.parents):
        above = () if parent < 0 else found[parent]
        found.append((*above, int(tree.token_ids[node])))
    return found


def same(one, two):
    arrays = ("token_ids", "parents", "probs", "sources")
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in arrays)


def begin(text=TEXT, **options):
    return Drafter(vocab_size=100, threads=1, **options).begin(text)


def sound(tree):
    sums = {}
    for parent, prob in zip(tree.parents, tree.probs, strict=True):
        sums[parent] = sums.get(parent, 0) + prob
        assert 0 <= prob <= (1 if parent < 0 else tree.probs[parent])
    assert all(total <= (1 if parent < 0 else tree.probs[parent]) * 1.0001 for parent, total in sums.items())
    assert (np.diff(tree.probs) <= 0).all()


class TestGiven:
    def test_what_nobody_else_knows_is_drafted_and_told(self):
        assert (50, 51) in paths(begin().draft(16, given=[50, 51, 52]))
        tree = begin().draft(16, given=[50, 51, 52], given_probs=[0.8, 0.8, 0.8])
        found = paths(tree)
        assert (50, 51, 52) in found
        assert tree.sources[found.index((50,))] == GIVEN
        assert tree.sources[found.index((3,))] != GIVEN
        sound(tree)

    def test_forms_mean_the_same(self):
        chain = begin().draft(16, given=[50, 51], given_probs=[0.5, 0.8])
        padded = np.array([[50, 51, -1, -1]], np.int32)
        rows = begin().draft(16, given=padded, given_probs=np.array([[0.5, 0.8, 0, 0]], np.float32))
        tree = begin().draft(16, given=DraftTree([50, 51], [-1, 0], [0.5, 0.4]))
        assert same(chain, rows)
        assert same(chain, tree)
        silent = begin().draft(16, given=DraftTree([50, 51], [-1, 0]))
        assert same(silent, begin().draft(16, given=[[50], [50, 51]]))
        assert not same(silent, chain)

    def test_without_nodes_it_is_none(self):
        plain = begin().draft(8)
        for empty in ([], [[]], np.zeros((0, 3), np.int32), [-1, -1], DraftTree([], [])):
            assert same(plain, begin().draft(8, given=empty))

    def test_leaves_are_extended(self):
        text = [*range(10, 30), 5, *range(30, 40)]
        tree = begin(text).draft(12, given=[12, 13])
        assert (12, 13, 14, 15) in paths(tree)

    def test_leaves_are_extended_from_all_sources(self):
        drafter = Drafter(vocab_size=100, threads=1)
        drafter.begin(list(range(60, 80))).finish()
        sequence = drafter.begin([1, 2, 3])
        assert not any(token >= 60 for token in sequence.draft(12).token_ids)
        assert (60, 61, 62, 63) in paths(sequence.draft(12, given=[60, 61]))

    def test_probabilities_are_believed_as_they_come_true(self):
        def trusted(right):
            sequence = begin([1, 2, 3])
            for step in range(30):
                sequence.draft(8, given=[50 + step % 20], given_probs=[0.6])
                sequence.extend([50 + step % 20] if right else [49 - step % 40])
            tree = sequence.draft(8, given=[99], given_probs=[0.6])
            return dict(zip(paths(tree), tree.probs, strict=True)).get((99,), 0)

        assert trusted(True) > 0.75
        assert trusted(False) < 0.05

    def test_what_is_learned_is_handed_on(self):
        drafter = Drafter(vocab_size=100, live_bytes=0, threads=1)

        def first(right):
            with drafter.begin([1, 2, 3]) as sequence:
                before = sequence.draft(8, given=[99], given_probs=[0.6]).probs[0]
                for step in range(30):
                    sequence.draft(8, given=[50 + step % 20], given_probs=[0.6])
                    sequence.extend([50 + step % 20] if right else [49 - step % 40])
            return before

        fresh = first(right=True)
        assert first(right=True) > fresh

    def test_a_guest_that_is_always_wrong_costs_next_to_nothing(self):
        text = np.random.default_rng(1).integers(0, 20, 40).tolist() * 8

        def accepted(guest):
            sequence, found, position = begin(text[:60]), 0, 60
            while position < len(text):
                tree = sequence.draft(
                    8, **({"given": [90, 91, 92], "given_probs": [0.9] * 3} if guest else {})
                )
                path = []
                while position + len(path) < len(text) and (*path, text[position + len(path)]) in paths(tree):
                    path.append(text[position + len(path)])
                found += len(path)
                sequence.extend(text[position : position + len(path) + 1])
                position += len(path) + 1
            return found

        assert accepted(guest=True) >= 0.97 * accepted(guest=False)

    def test_bad_drafts_change_nothing(self):
        sequence = begin()
        before = begin().draft(8)
        for given, probs, raised in [
            ([100], None, InvalidTokenError),
            (DraftTree([100], [-1]), None, InvalidTokenError),
            (range(1025), None, (InvalidArgumentError, InvalidTokenError)),
            ([5], [1.5], InvalidArgumentError),
            ([5], [float("nan")], InvalidArgumentError),
            ([5], [0.5, 0.5], InvalidArgumentError),
            ([[5], [6]], [[0.5]], InvalidArgumentError),
            ([[5]], [[0.5], [0.5]], InvalidArgumentError),
            (DraftTree([5], [-1]), [0.5], InvalidArgumentError),
            (None, [0.5], InvalidArgumentError),
            ("text", None, InvalidArgumentError),
            (7, None, InvalidArgumentError),
        ]:
            with pytest.raises(raised):
                sequence.draft(8, given=given, given_probs=probs)
        assert same(sequence.draft(8), before)
        sequence.check_integrity()

    @settings(max_examples=60, deadline=None)
    @cases(st.data())
    def test_trees_are_sound_and_prefixes_of_larger_ones(self, data):
        token = st.integers(0, 12)
        sequence = begin(data.draw(st.lists(token, min_size=1, max_size=60)))
        for _ in range(data.draw(st.integers(1, 5))):
            chains = data.draw(st.lists(st.lists(token, max_size=6), max_size=6))
            probs = [
                data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(c), max_size=len(c)))
                for c in chains
            ]
            said = {"given": chains, "given_probs": probs} if data.draw(st.booleans()) else {"given": chains}
            shape = data.draw(st.sampled_from(["tree", "chain"]))
            large = sequence.draft(24, min_prob=0, shape=shape, **said)
            small = sequence.draft(7, min_prob=0, shape=shape, **said)
            assert same(large.first(7), small)
            sound(small)
            if shape == "chain":
                assert small.parents.tolist() == list(range(-1, len(small) - 1))
            sequence.check_integrity()
            sequence.extend(data.draw(st.lists(token, min_size=1, max_size=4)))
        sequence.check_integrity()


class TestAllowed:
    def test_nothing_else_is_drafted(self):
        plain = begin().draft(16)
        assert (3,) in paths(plain)
        mask = np.ones(100, bool)
        mask[3] = False
        words = np.packbits(np.append(mask, np.zeros(28, bool)), bitorder="little").view(np.uint32)
        for allowed in (mask, words, words.view(np.int32), [t for t in range(100) if t != 3]):
            tree = begin().draft(16, given=[[3], [7]], allowed=allowed)
            assert all(path[0] != 3 for path in paths(tree))
            assert (7,) in paths(tree)
            sound(tree)
        assert len(begin().draft(16, allowed=[])) == 0

    def test_what_is_forced_is_drafted(self):
        forced = [77, 78, 79]

        def rule(path):
            return [forced[len(path)]] if len(path) < 3 else []

        tree = begin().draft(8, allowed=rule)
        assert paths(tree) == [(77,), (77, 78), (77, 78, 79)]
        assert tree.probs.tolist() == [1, 1, 1]

    @settings(max_examples=50, deadline=None)
    @cases(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(0, 5), st.integers(1, 40))
    def test_a_callable_holds_at_every_node(self, text, salt, nodes):
        asked = []

        def fits(path, token):
            return (token * 7 + sum(path) + salt) % 3 != 0

        def rule(path):
            asked.append(path)
            assert all(fits(path[:at], token) for at, token in enumerate(path))
            kind = (len(path) + salt) % 3
            ids = [token for token in range(100) if fits(path, token)]
            if kind == 0:
                return ids
            mask = np.zeros(100, bool)
            mask[ids] = True
            return (
                mask
                if kind == 1
                else np.packbits(np.append(mask, np.zeros(28, bool)), bitorder="little").view("i4")
            )

        sequence = begin(text)
        given = [[1, 2, 3], [4, 5], [6]]
        tree = sequence.draft(nodes, min_prob=0, given=given, allowed=rule)
        assert all(fits(path[:-1], path[-1]) for path in paths(tree))
        assert len(set(asked)) == len(asked)
        assert asked[0] == ()
        # what is not asked for ahead of need is bounded
        assert len(asked) <= 16 * (len(tree) + 2)
        sound(tree)
        # once all is known, a draft is that of a draft that knows it from the start
        again = begin(text).draft(nodes, min_prob=0, given=given, allowed=rule)
        assert same(tree, again)
        sequence.check_integrity()

    def test_anything_is_allowed_where_none_is_returned(self):
        assert same(begin().draft(16), begin().draft(16, allowed=lambda path: None))

    def test_what_a_callable_raises_is_raised(self):
        sequence = begin()
        with pytest.raises(ZeroDivisionError):
            sequence.draft(8, allowed=lambda path: 1 / 0)
        with pytest.raises(InvalidArgumentError):
            sequence.draft(8, allowed=lambda path: "text")
        assert same(sequence.draft(8), begin().draft(8))
        sequence.check_integrity()

    def test_a_callable_may_use_the_drafter(self):
        sequence = begin()
        done = threading.Event()

        def rule(path):
            thread = threading.Thread(target=lambda: (sequence.token_ids, sequence.extend([]), done.set()))
            thread.start()
            thread.join(20)
            return

        sequence.draft(8, allowed=rule)
        assert done.is_set()

    def test_bad_masks_are_refused(self):
        sequence = begin()
        for allowed in (
            np.ones(99, bool),
            np.ones(3, np.uint32),
            np.ones(100),
            "text",
            7,
            np.ones((2, 100), bool),
        ):
            with pytest.raises(InvalidArgumentError):
                sequence.draft(8, allowed=allowed)
        with pytest.raises(InvalidTokenError):
            sequence.draft(8, allowed=[100])
        sequence.close()
        with pytest.raises(ClosedError):
            sequence.draft(8, allowed=lambda path: None)


def said_of(row):
    return [
        {},
        {"given": [50, 51]},
        {"given": [[60], [61, 62]], "given_probs": [[0.3], [0.6, 0.9]]},
        {"allowed": lambda path: [70 + len(path)] if len(path) < 5 else None},
        {"given": DraftTree([80], [-1], [0.9]), "allowed": np.arange(100) > 40},
    ][row]


class TestBatch:
    @pytest.mark.parametrize("options", [{}, {"total_nodes": 30}, {"total_nodes": 30, "shape": "chain"}])
    def test_rows_are_drafted_as_alone(self, options):
        drafter = Drafter(vocab_size=100, threads=3, live_bytes=0)
        texts = [[*TEXT, row] for row in range(5)] * 3
        sequences = [drafter.begin(text) for text in texts]
        twins = [drafter.begin(text) for text in texts]
        said = [said_of(row % 5) for row in range(15)]
        columns = {name: [row.get(name) for row in said] for name in ("given", "given_probs", "allowed")}
        shape = {"shape": options["shape"]} if "shape" in options else {}
        batch = drafter.draft_batch(sequences, 8, **columns, **options)
        assert batch.offsets[-1] <= options.get("total_nodes", 15 * 8)
        for tree, twin, row in zip(batch, twins, said, strict=True):
            # what was cut teaches what a draft of that size does
            alone = twin.draft(8, **row, **shape)
            assert same(tree, alone.first(len(tree)))
            assert "total_nodes" in options or len(tree) == len(alone)
            twin.cut_draft(len(tree))
            twin.extend([5])
        batch = drafter.step(sequences, [5] * 15, range(16), 8, **columns, **options)
        for tree, twin, row in zip(batch, twins, said, strict=True):
            assert same(tree, twin.draft(8, **row, **shape).first(len(tree)))
        for sequence in sequences:
            sequence.check_integrity()

    def test_prices_share_them_out(self):
        curve = CostCurve([1, 64], [1, 4096], [0], [[[1.0], [1.0 + 0.001 * 4095]]] * 2, packed=True)
        drafter = Drafter(vocab_size=100, threads=1)
        sequences = [drafter.begin(TEXT) for _ in range(4)]
        batch = drafter.draft_batch(sequences, 16, cost=curve, given=[[50, 51], None, None, None])
        assert GIVEN in batch[0].sources
        assert GIVEN not in batch[1].sources
        tree = drafter.begin(TEXT).draft(16, cost=curve, allowed=lambda path: [77])
        assert set(tree.token_ids.tolist()) == {77}

    def test_a_rule_takes_them(self):
        curve = CostCurve([1, 64], [1, 4096], [0], [[[1.0], [1.0 + 0.001 * 4095]]] * 2, packed=True)
        rule, drafter = SizingRule(curve), Drafter(vocab_size=100, threads=1)
        sequence, drafted = drafter.begin([1]), 0
        for step in range(200):
            forced = 10 + step % 80
            tree = sequence.draft(rule=rule, given=[forced], allowed=lambda path, forced=forced: [forced])
            assert set(tree.token_ids.tolist()) <= {forced}
            drafted += len(tree)
            sequence.extend([forced] * (1 + len(tree)))
            rule.observe(batch=1, size=len(tree), context=step + 1, seconds=1.0, tokens=1 + len(tree))
        assert drafted > 0

    def test_a_batch_is_a_guest(self):
        drafter = Drafter(vocab_size=100, threads=1)
        batch = drafter.draft_batch([drafter.begin([5, 6, 7, 5]), drafter.begin([8, 9, 8])], 4)
        drafted = drafter.draft_batch([drafter.begin([1]), drafter.begin([2])], 8, given=batch)
        assert (6, 7) in paths(drafted[0])
        assert (9, 8) in paths(drafted[1])

    def test_bad_rows_change_nothing(self):
        drafter = Drafter(vocab_size=100, threads=1)
        sequences = [drafter.begin(TEXT), drafter.begin(TEXT)]
        for said in (
            {"given": [[5]]},
            {"given": [[5], [6], [7]]},
            {"given": [[5], [100]]},
            {"given": 7},
            {"allowed": [None, np.ones(3, bool)]},
        ):
            with pytest.raises((InvalidArgumentError, InvalidTokenError)):
                drafter.step(sequences, [3, 3], [0, 1, 2], 8, **said)
        assert [len(sequence.token_ids) for sequence in sequences] == [len(TEXT)] * 2

    def test_what_a_callable_raises_ends_the_drafts_alone(self):
        drafter = Drafter(vocab_size=100, threads=2)
        sequences = [drafter.begin(TEXT) for _ in range(12)]
        rules = [None] * 11 + [lambda path: 1 / 0]
        with pytest.raises(ZeroDivisionError):
            drafter.step(sequences, [3] * 12, range(13), 8, allowed=rules)
        assert all(len(sequence.token_ids) == len(TEXT) + 1 for sequence in sequences)
        for sequence in sequences:
            sequence.check_integrity()
        assert len(drafter.draft_batch(sequences, 8)[0]) > 0

    def test_closed_sequences_fail_alone(self):
        drafter = Drafter(vocab_size=100, threads=1)
        sequences = [drafter.begin(TEXT), drafter.begin(TEXT)]
        sequences[0].close()
        with pytest.raises(BatchError) as raised:
            drafter.draft_batch(sequences, 8, given=[[50], [50]], allowed=[lambda path: None] * 2)
        assert list(raised.value.failures) == [0]
        assert (50,) in paths(raised.value.batch[1])
