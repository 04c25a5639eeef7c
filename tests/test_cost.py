"""``cost=``: drafting calls that size trees by what passes cost."""

import math

import numpy as np
import pytest

from sssd import Drafter
from sssd.errors import ClosedError, InvalidArgumentError
from sssd.hardware import CostCurve, PassCosts, SizingRule

PROMPTS = [[1, 2, 3, 4] * 4, [5, 6, 7] * 5, [9, 8], [1, 5, 1, 6, 1, 7, 1]]
SIZES = list(range(65))


def costs(per_node: float, packed: bool = True) -> PassCosts:
    return PassCosts(SIZES, [1.0 + per_node * size for size in SIZES], packed=packed)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("per_node", [1e-6, 0.02, 0.1, 0.3, 10.0])
def test_batches_get_what_allocate_gives_their_trees(per_node, packed):
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    sequences = [drafter.begin(prompt) for prompt in PROMPTS]
    cost = costs(per_node, packed)
    whole = [sequence.draft(32) for sequence in [drafter.begin(prompt) for prompt in PROMPTS]]
    counts = cost.allocate(whole, len(PROMPTS) / 1.0)
    batch = drafter.draft_batch(sequences, 32, cost=cost)
    assert [len(batch[i]) for i in range(len(PROMPTS))] == counts
    for i, tree in enumerate(whole):
        assert np.array_equal(batch[i].token_ids, tree.first(counts[i]).token_ids)
    if per_node in (1e-6, 10.0):
        assert (sum(counts) == 0) == (per_node == 10.0)


def test_one_sequence_and_a_batch_of_one_agree():
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    for per_node in (0.05, 0.5):
        one, two = drafter.begin(PROMPTS[0]), drafter.begin(PROMPTS[0])
        for token in [1, 2, 4, 1, 2, 3, 4]:
            alone = one.draft(32, cost=costs(per_node))
            tree = drafter.draft_batch([two], 32, cost=costs(per_node))[0]
            assert np.array_equal(alone.token_ids, tree.token_ids)
            assert alone.probs.tolist() == tree.probs.tolist()
            one.extend([token])
            two.extend([token])
        assert one.state_dict() == two.state_dict()


def test_min_nodes_come_first_and_later_steps_go_on():
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    sequences = [drafter.begin(prompt) for prompt in PROMPTS]
    batch = drafter.draft_batch(sequences, 32, min_nodes=2, cost=costs(100.0))
    assert len(batch[0]) == 2
    batch = drafter.step(sequences, [1, 5, 9, 1], [0, 1, 2, 3, 4], 32, cost=costs(0.01))
    assert len(batch[0]) > 2


@pytest.mark.parametrize("way", ["draft", "step", "cut"])
def test_what_is_counted_is_what_was_verified(way):
    """One node of each draft is verified, where up to 32 are drafted and many would be accepted."""
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    text = ([1, 2, 3, 4] * 6 + [9, 8]) * 20
    sequence = drafter.begin(text[:60])
    one = PassCosts([0, 1], [1.0, 1.01])
    drafts = verified = accepted = 0
    produced = []
    while len(sequence) + len(produced) < len(text) - 2:
        if way == "step":
            tree = drafter.step([sequence], produced, [0, len(produced)], 32, cost=one, rate=1.0)[0]
        else:
            sequence.extend(produced)
            tree = sequence.draft(32, **({"cost": one, "rate": 1.0} if way == "draft" else {}))
        if way == "cut":
            assert len(tree) > 1
            sequence.cut_draft(1)
            tree = tree.first(1)
        assert len(tree) == 1
        at = len(sequence)
        path, produced = tree.accept(text[at : at + 2])
        drafts, verified, accepted = drafts + 1, verified + len(tree), accepted + len(path)
    sequence.extend(produced)
    sequence.finish()
    stats, metrics = drafter.stats, drafter.metrics
    sources = stats["sources"].values()
    assert stats["drafts"] == sum(metrics["nodes"]["counts"]) == drafts
    assert sum(source["drafted"] for source in sources) == metrics["nodes"]["sum"] == verified
    assert sum(source["accepted"] for source in sources) == metrics["accepted"]["sum"] == accepted > 100


@pytest.mark.parametrize("nodes", [0, 1, 5, 1000])
def test_a_draft_that_was_cut_teaches_what_a_smaller_one_does(nodes):
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    one, two = drafter.begin(PROMPTS[0] * 3), drafter.begin(PROMPTS[0] * 3)
    for token in [1, 2, 3, 4, 1, 5, 6, 1, 2]:
        assert len(one.draft(32)) > 5
        one.cut_draft(nodes)
        two.draft(min(nodes, 32))
        for sequence in (one, two):
            sequence.extend([token, token + 1])
    assert one.state_dict() == two.state_dict()
    with pytest.raises(InvalidArgumentError, match="nodes must not be negative"):
        one.cut_draft(-1)
    one.close()
    with pytest.raises(ClosedError):
        one.cut_draft(1)


def test_a_draft_that_is_verified_whole_teaches_all_of_it():
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    one, two = drafter.begin(PROMPTS[0] * 3), drafter.begin(PROMPTS[0] * 3)
    trees = [sequence.draft(32, min_prob=0.9) for sequence in (one, two)]
    assert trees[0].parents.tolist() == list(range(-1, len(trees[0]) - 1))
    assert 0 < len(trees[0]) < 32
    one.cut_draft(len(trees[0]))
    for sequence in (one, two):
        sequence.extend([*trees[0].token_ids, 77])
    assert one.state_dict() == two.state_dict()


def test_a_draft_is_counted_once_in_however_many_pieces_its_outcome_comes():
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    sequence = drafter.begin(PROMPTS[0] * 3)
    nodes = len(sequence.draft(8))
    for tokens in ([1], [], [2, 3], [77], [1]):
        sequence.extend(tokens)
    sequence.finish()
    stats, metrics = drafter.stats, drafter.metrics
    assert stats["drafts"] == sum(metrics["nodes"]["counts"]) == 1
    assert sum(source["drafted"] for source in stats["sources"].values()) == metrics["nodes"]["sum"] == nodes
    assert sum(source["accepted"] for source in stats["sources"].values()) == metrics["accepted"]["sum"] == 3


def test_a_rule_gives_cost_and_rate():
    curve = CostCurve([1, 8], [1, 64], [0, 1000], np.ones((2, 2, 2)) + np.arange(2)[:, None], packed=True)
    cost, rate = SizingRule(curve).costs(4, 10)
    drafter = Drafter()
    assert len(drafter.begin(PROMPTS[0]).draft(32, cost=cost, rate=rate)) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 1.0},
        {"cost": costs(1), "rate": -1.0},
        {"cost": costs(1), "rate": math.nan},
        {"cost": costs(1), "total_nodes": 4},
    ],
)
def test_bad_options_are_refused(options):
    drafter = Drafter()
    with pytest.raises(InvalidArgumentError):
        drafter.draft_batch([drafter.begin([1])], 4, **options)
    with pytest.raises((InvalidArgumentError, TypeError)):
        drafter.begin([1]).draft(4, **options, total_nodes=3)


FLAT = CostCurve([1], [1], [0], [[[1.0]]])


class TestCurves:
    """``cost=`` with a whole curve: read at the batch and the length of its requests."""

    @staticmethod
    def curve(per_node=0.1, per_node_of_long_texts=10.0):
        """Passes of long texts, of 100 tokens, take longer for a node."""
        ends = [1.0 + 511 * each for each in (per_node, per_node_of_long_texts)]
        return CostCurve([1, 64], [1, 512], [20, 100], [[[1.0, 1.0], ends]] * 2, packed=True)

    def test_batches_and_steps_are_sized_as_by_the_costs_at_their_mean_length(self):
        curve, drafter = self.curve(), Drafter(live_bytes=0, soft_bytes=0)
        sequences = [drafter.begin(prompt) for prompt in PROMPTS]
        mean = sum(map(len, sequences)) / len(sequences)
        expected = drafter.draft_batch(sequences, 32, cost=curve.costs(len(sequences), mean, 33))
        found = drafter.draft_batch(sequences, 32, cost=curve)
        sizes = [len(found[i]) for i in range(len(PROMPTS))]
        assert sizes == [len(expected[i]) for i in range(len(PROMPTS))]
        whole = drafter.draft_batch(sequences, 32)
        assert 0 < sum(sizes) < len(whole.token_ids[: whole.offsets[-1]])
        none = drafter.step(sequences, [], [0] * (len(PROMPTS) + 1), 32, cost=self.curve(100.0, 100.0))
        assert sum(len(none[i]) for i in range(len(PROMPTS))) == 0

    def test_one_sequence_is_sized_at_its_length(self):
        curve, drafter = self.curve(), Drafter(live_bytes=0, soft_bytes=0)
        short, long = drafter.begin([1, 2, 3, 4] * 4), drafter.begin([1, 2, 3, 4] * 40)
        assert len(short.draft(32, cost=curve)) > 0
        assert len(long.draft(32, cost=curve)) == 0
        assert len(long.draft(32, cost=curve, rate=0.0)) == len(long.draft(32)) > 0

    def test_a_prompt_that_is_indexed_in_the_background_is_not_waited_for(self):
        sequence = Drafter(threads=1).begin(PROMPTS[0] * 1000, background=True)
        assert len(sequence.draft(32, cost=self.curve())) == 0
        assert not sequence.ready

    def test_padded_curves_give_the_widths_that_are_ready(self):
        curve = CostCurve([1, 8], [1, 64], [0, 1], np.ones((2, 2, 2)), ready=(1, 4))
        drafter = Drafter(live_bytes=0, soft_bytes=0)
        assert len(drafter.begin([1, 2, 3, 4] * 4).draft(32, cost=curve)) == 3

    @pytest.mark.parametrize("bad", [3, "h100", {}, object(), SizingRule(FLAT)])
    def test_what_is_no_cost_is_refused(self, bad):
        drafter = Drafter()
        sequence = drafter.begin(PROMPTS[0])
        for call in (
            lambda: sequence.draft(8, cost=bad),
            lambda: drafter.draft_batch([sequence], 8, cost=bad),
            lambda: drafter.step([sequence], [1], [0, 1], 8, cost=bad),
        ):
            with pytest.raises(InvalidArgumentError, match="cost must be PassCosts or a CostCurve"):
                call()
        assert len(sequence) == len(PROMPTS[0])

    def test_rates_need_costs_and_curves_need_sense(self):
        sequence = Drafter().begin(PROMPTS[0])
        with pytest.raises(InvalidArgumentError, match="rate needs cost"):
            sequence.draft(8, rate=1.0)
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(InvalidArgumentError, match="rate"):
                sequence.draft(8, cost=self.curve(), rate=bad)
            with pytest.raises(InvalidArgumentError, match="context"):
                self.curve().costs(1, bad, 8)
        with pytest.raises(InvalidArgumentError, match="at least 1"):
            self.curve().costs(0, 1, 8)
        with pytest.raises(InvalidArgumentError, match="at least 1"):
            self.curve().costs(1, 1, -8)
        sequence.close()
        with pytest.raises(ClosedError):
            sequence.draft(8, cost=self.curve())

    def test_an_empty_batch(self):
        assert len(Drafter().draft_batch([], 8, cost=self.curve())) == 0
