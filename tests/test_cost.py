"""``cost=``: drafting calls that size trees by what passes cost."""

import math

import numpy as np
import pytest

from sssd import Drafter
from sssd.errors import InvalidArgumentError
from sssd.hardware import Budget, CostCurve, PassCosts

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
        alone = one.draft(32, cost=costs(per_node))
        (tree,) = [drafter.draft_batch([two], 32, cost=costs(per_node))[0]]
        assert np.array_equal(alone.token_ids, tree.token_ids)


def test_min_nodes_come_first_and_later_steps_go_on():
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    sequences = [drafter.begin(prompt) for prompt in PROMPTS]
    batch = drafter.draft_batch(sequences, 32, min_nodes=2, cost=costs(100.0))
    assert len(batch[0]) == 2
    batch = drafter.step(sequences, [1, 5, 9, 1], [0, 1, 2, 3, 4], 32, cost=costs(0.01))
    assert len(batch[0]) > 2


def test_a_budget_gives_cost_and_rate():
    curve = CostCurve([1, 8], [1, 64], [0, 1000], np.ones((2, 2, 2)) + np.arange(2)[:, None], packed=True)
    cost, rate = Budget(curve).costs(4, 10)
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
