"""``rule=``: steps that a ``SizingRule`` sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import DraftBatch, Drafter, DraftTree
from sssd.errors import InvalidArgumentError, InvalidTokenError
from sssd.hardware import CostCurve, DraftCost, PassCosts, SizingRule

KEYS = "feedback_ids", "feedback_probs"
PERIOD = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


def curve(per_node=0.02, packed=True):
    ends = [1.0 + 511 * per_node] * 2
    return CostCurve(
        [1, 64], [1, 512], [0, 100], [[[1.0, 1.0], ends]] * 2, packed=packed, draft=DraftCost(node=1e-4)
    )


def probabilities(rng, shape):
    probs = rng.random(shape).astype(np.float32)
    return probs / (probs.sum(-1, keepdims=True) * 1.01)


class OneByOne:
    """The same step by the calls for single sequences, as an engine would make them that drafts elsewhere."""

    def __init__(self, drafter, sequences, rule):
        self.drafter, self.sequences, self.rule = drafter, sequences, rule
        self.paces = [rule.pace() for _ in sequences]
        self.trees = [DraftTree([], [])] * len(sequences)

    def step(self, produced, feedback):
        # the limits of a step are known before its tokens are
        limits, min_prob = self.rule.limits(self.paces), self.rule.min_prob
        drafts = []
        for i, (sequence, limit) in enumerate(zip(self.sequences, limits, strict=True)):
            if feedback is not None:
                rows = slice(1 + len(self.trees[i]))
                sequence.feedback(self.trees[i], feedback[0][i, rows], feedback[1][i, rows])
            sequence.extend(produced[i])
            # drafting nothing forgets the last draft, as the step does
            tree = sequence.draft(limit, min_prob=min_prob)
            drafts.append(tree if limit else None)
        context = sum(map(len, self.sequences)) / len(self.sequences)
        counts = self.rule.allocate(drafts, context, self.paces)
        for sequence, count in zip(self.sequences, counts, strict=True):
            sequence.cut_draft(count)
        self.trees = [
            DraftTree([], []) if tree is None else tree.first(count)
            for tree, count in zip(drafts, counts, strict=True)
        ]
        return self.trees, sum(tree is not None for tree in drafts), context


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1 << 30),
    count=st.integers(1, 5),
    per_node=st.sampled_from([1e-4, 0.02, 0.2, 5.0]),
    packed=st.booleans(),
    feeds=st.booleans(),
)
def test_a_step_is_what_single_calls_are(seed, count, per_node, packed, feeds):
    """Trees, what is learned, what is counted and what the rule makes of it."""
    rng = np.random.default_rng(seed)
    known = curve(per_node, packed)
    one, two = (Drafter(vocab_size=64, threads=1) for _ in range(2))
    rules = SizingRule(known), SizingRule(known)
    prompts = [rng.permutation(PERIOD).tolist() * 3 for _ in range(count)]
    sequences = [one.begin(prompt) for prompt in prompts]
    single = OneByOne(two, [two.begin(prompt) for prompt in prompts], rules[1])
    out = DraftBatch(count, count * 256)
    produced: list[list[int]] = [[] for _ in prompts]
    widest = 0
    for _ in range(40):
        shape = count, 1 + widest + int(rng.integers(3)), 4
        feedback = (rng.integers(0, 64, shape), probabilities(rng, shape)) if feeds else None
        given_back = {} if feedback is None else dict(zip(KEYS, feedback, strict=True))
        flat = [token for tokens in produced for token in tokens]
        offsets = np.cumsum([0, *map(len, produced)])
        batch = one.step(sequences, flat, offsets, 256, rule=rules[0], out=out, **given_back)
        trees, drafted, context = single.step(produced, feedback)
        assert (batch.drafted_sequences, batch.context) == (drafted, pytest.approx(context))
        for i, tree in enumerate(trees):
            assert batch[i].token_ids.tolist() == tree.token_ids.tolist()
            assert batch[i].probs.tolist() == tree.probs.tolist()
        accepted = []
        for i, tree in enumerate(trees):
            text = (prompts[i][: len(PERIOD)] * 99)[len(sequences[i]) :][: tree.depths.max(initial=0) + 1]
            noisy = [token if rng.random() < 0.9 else int(rng.integers(64)) for token in text]
            targets = np.append(noisy, 0)[np.append(0, tree.depths)]
            accepted.append(tree.accept(targets)[1].tolist())
        produced, widest = accepted, max(map(len, trees))
        size = sum(map(len, trees)) if packed else widest
        for rule in rules:
            rule.observe(
                batch=count,
                size=size,
                context=context,
                seconds=float(known.times(count, [size], context)[0]),
                tokens=sum(map(len, produced)),
                draft_seconds=1e-4,
            )
        assert (rules[0].min_prob, rules[0].speedup) == (rules[1].min_prob, rules[1].speedup)
    assert [s.state_dict() for s in sequences] == [s.state_dict() for s in single.sequences]
    for sequence in (*sequences, *single.sequences):
        sequence.close()
    assert one.stats == two.stats
    metrics = one.metrics
    assert metrics["accepted"]["sum"] <= metrics["nodes"]["sum"]


def test_rules_learn_how_many_nodes_pay():
    drafter, rule = Drafter(live_bytes=0, soft_bytes=0), SizingRule(curve(0.3))
    sequence = drafter.begin(PERIOD * 4)
    sizes = []
    for step in range(60):
        batch = drafter.step([sequence], [PERIOD[step % len(PERIOD)]], [0, 1], rule=rule)
        sizes.append(len(batch[0]))
        rule.observe(batch=1, size=sizes[-1], context=60, seconds=1.0 + 0.3 * sizes[-1], tokens=1)
    # the first steps tell what one without drafts takes, and drafts that bring nothing end
    assert sizes[:2] == [0, 0]
    assert max(sizes[2:6]) > 0
    assert sum(sizes[30:]) < sum(sizes[:30])


def test_single_drafts_go_by_the_rule_as_batches_of_one_do():
    one, two = (Drafter(live_bytes=0, soft_bytes=0) for _ in range(2))
    rules = SizingRule(curve()), SizingRule(curve())
    alone, batched = one.begin(PERIOD * 3), two.begin(PERIOD * 3)
    for step in range(20):
        tree = alone.draft(64, rule=rules[0])
        batch = two.draft_batch([batched], 64, rule=rules[1])
        assert tree.token_ids.tolist() == batch[0].token_ids.tolist()
        assert batch.drafted_nodes >= len(tree)
        for sequence in (alone, batched):
            sequence.extend([PERIOD[step % len(PERIOD)]])
        for rule in rules:
            rule.observe(batch=1, size=len(tree), context=50, seconds=1.0 + 0.02 * len(tree), tokens=1)
    assert alone.state_dict() == batched.state_dict()


def test_feedback_is_of_the_last_draft_or_of_the_root():
    """Whatever was appended, taken back or prefilled since, rows of a draft that is gone teach nothing."""
    rng = np.random.default_rng(3)
    for change in ("none", "extend", "prefill", "truncate", "truncate and extend"):
        one, two = (Drafter(vocab_size=64, threads=1) for _ in range(2))
        sequences = [drafter.begin(PERIOD * 3) for drafter in (one, two)]
        trees = [sequence.draft(16) for sequence in sequences]
        assert len(trees[0]) > 4
        for sequence in sequences:
            if change == "extend":
                sequence.extend([1])
            if change == "prefill":
                sequence.prefill([1])
            if change.startswith("truncate"):
                sequence.truncate(len(PERIOD) * 3 - 1)
            if change.endswith("and extend"):
                sequence.extend([7])
        ids, probs = rng.integers(0, 64, (1, 17, 4)), probabilities(rng, (1, 17, 4))
        one.step([sequences[0]], [], [0, 0], 16, feedback_ids=ids, feedback_probs=probs)
        tree = trees[1] if change == "none" else DraftTree([], [])
        sequences[1].feedback(tree, ids[0, : len(tree) + 1], probs[0, : len(tree) + 1])
        for _ in range(8):
            a, b = (sequence.draft(64, min_prob=0.0) for sequence in sequences)
            assert (a.token_ids.tolist(), a.probs.tolist()) == (b.token_ids.tolist(), b.probs.tolist())
            token = int(a.token_ids[0])
            for sequence in sequences:
                sequence.extend([token])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": PassCosts([0], [1.0])}, "give rule, or cost and rate"),
        ({"rate": 1.0}, "give rule, or cost and rate"),
        ({"total_nodes": 4}, "total_nodes"),
        ({"feedback_ids": [[[1]]]}, "give both or neither"),
        ({"feedback_ids": [[1]], "feedback_probs": [[1.0]]}, "shape"),
        ({"feedback_ids": [[[1]]] * 2, "feedback_probs": [[[1.0]]] * 2}, "shape"),
        ({"feedback_ids": [[[1]]], "feedback_probs": [[[1.0], [1.0]]]}, "rows"),
        ({"feedback_ids": [[[1, 2]]], "feedback_probs": [[[0.5]]]}, "columns"),
        ({"feedback_ids": [[[1]]], "feedback_probs": [[[1.5]]]}, "between 0 and 1"),
        ({"feedback_ids": [[[1.5]]], "feedback_probs": [[[0.5]]]}, "shape"),
        ({"feedback_ids": [[[99]]], "feedback_probs": [[[0.5]]]}, "outside the vocabulary"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options, message):
    drafter, rule = Drafter(vocab_size=64), SizingRule(curve())
    sequence = drafter.begin(PERIOD)
    with pytest.raises((InvalidArgumentError, InvalidTokenError), match=message):
        drafter.step([sequence], [1], [0, 1], rule=rule, **options)
    assert len(sequence) == len(PERIOD)


def test_constants_are_listed_and_can_be_changed():
    options = SizingRule.options()
    assert options["longest_wait"][0] == 8
    assert all(effect for _, effect in options.values())
    assert SizingRule(curve(), options={"most_nodes": 7}).max_nodes == 7
    for bad in ({"none": 1.0}, {"debt": -1.0}, {"debt": float("nan")}):
        with pytest.raises(InvalidArgumentError, match="no option"):
            SizingRule(curve(), options=bad)
    with pytest.raises(InvalidArgumentError, match="CostCurve"):
        SizingRule(PassCosts([0], [1.0]))


def test_a_vanished_limit_is_no_trap():
    """A rule of no nodes drafts nothing, and says so."""
    drafter, rule = Drafter(), SizingRule(curve(), max_nodes=0)
    batch = drafter.step([drafter.begin(PERIOD)], [], [0, 0], rule=rule)
    assert (len(batch[0]), batch.drafted_sequences, batch.drafted_nodes) == (0, 0, 0)
