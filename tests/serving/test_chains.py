"""``shape="chain"``: drafts for verifiers that take no trees."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import DraftBatch, Drafter, DraftTree
from sssd.errors import InvalidArgumentError
from sssd.hardware import CostCurve, PassCosts, SizingRule

TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=60)
PROMPTS = [[1, 2, 3, 4] * 4, [5, 6, 7] * 5, [9, 8], [1, 5, 1, 6, 1, 7, 1]]


def private(**options):
    return Drafter(live_bytes=0, soft_bytes=0, threads=1, **options)


def most_probable(tree):
    """Nodes of the path that takes the first child of each node, which is the most probable one."""
    first: dict[int, int] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        first.setdefault(parent, node)
    path, node = [], -1
    while node in first:
        node = first[node]
        path.append(node)
    return path


def is_path(tree):
    return tree.parents.tolist() == list(range(-1, len(tree) - 1))


@settings(deadline=None, max_examples=100)
@given(prompt=TOKENS, produced=TOKENS, depth=st.integers(0, 8), nodes=st.integers(0, 9))
def test_a_chain_takes_the_most_probable_token_after_each(prompt, produced, depth, nodes):
    """As a walk down the tree of all that may come has it; the first nodes are the shorter chain."""
    sequence, limits = private().begin(prompt), {"max_depth": depth, "min_prob": 0.01}
    sequence.extend(produced)
    tree = sequence.draft(1024, **limits)
    assert len(tree) < 1024
    path = most_probable(tree)[:nodes]
    chain = sequence.draft(nodes, shape="chain", **limits)
    assert is_path(chain)
    for name in ("token_ids", "probs", "sources"):
        assert getattr(chain, name).tolist() == getattr(tree, name)[path].tolist()


@pytest.mark.parametrize("cut", [0, 1, 3, 1000])
def test_a_chain_that_was_cut_teaches_what_a_shorter_one_does(cut):
    one, two = (private().begin(PROMPTS[0] * 3) for _ in range(2))
    for token in [1, 2, 3, 4, 1, 5, 6, 1, 2]:
        one.draft(12, shape="chain")
        one.cut_draft(cut)
        two.draft(min(cut, 12), shape="chain")
        for sequence in (one, two):
            sequence.extend([token, token + 1])
    assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_of_chains_is_what_single_calls_are(threads):
    drafter, alone = Drafter(live_bytes=0, soft_bytes=0, threads=threads), private()
    sequences, twins = ([each.begin(prompt) for prompt in PROMPTS * 5] for each in (drafter, alone))
    out = DraftBatch(20, 200)
    for turn in range(8):
        tokens = np.arange(20) % 5 + turn % 3
        batch = drafter.step(sequences, tokens, np.arange(21), 10, shape="chain", out=out)
        for i, twin in enumerate(twins):
            twin.extend(tokens[i : i + 1])
            chain = twin.draft(10, shape="chain")
            assert batch[i].token_ids.tolist() == chain.token_ids.tolist()
            assert batch[i].probs.tolist() == chain.probs.tolist()
    whole = drafter.draft_batch(sequences, 10, shape="chain")
    shared = drafter.draft_batch(sequences, 10, total_nodes=30, shape="chain")
    assert sorted(shared.probs, reverse=True) == sorted(whole.probs, reverse=True)[:30]
    assert all(is_path(chain) for chain in shared)


@settings(deadline=None, max_examples=60)
@given(
    packed=st.booleans(),
    rises=st.lists(st.floats(0, 0.6), min_size=12, max_size=12),
    rate=st.floats(0.1, 4),
    ready=st.sets(st.integers(1, 12)),
)
def test_of_all_ways_to_cut_them_chains_get_the_best(packed, rises, rate, ready):
    """Against every combination of lengths; padded passes are as wide as the longest, packed hold all."""
    seconds = np.cumsum([1.0, *rises])
    sizes = [0, *sorted(ready or {1})]
    cost = PassCosts(sizes, seconds[sizes], packed=packed)
    drafter = private()
    sequences = [drafter.begin(prompt) for prompt in PROMPTS[:3]]
    chains = list(drafter.draft_batch(sequences, 4, shape="chain"))

    def value(lengths):
        size = sum(lengths) if packed else max(lengths)
        held = next((known for known in sizes if known >= size), None)
        if held is None:
            return -np.inf
        gain = sum(float(chain.probs[:n].sum()) for chain, n in zip(chains, lengths, strict=True))
        return gain - rate * (seconds[held] - seconds[0])

    best = max(map(value, itertools.product(*(range(len(chain) + 1) for chain in chains))))
    batch = drafter.draft_batch(sequences, 4, cost=cost, rate=rate, shape="chain")
    lengths = [len(chain) for chain in batch]
    assert value(lengths) == pytest.approx(best, abs=1e-6)
    for chain, cut in zip(chains, batch, strict=True):
        assert chain.first(len(cut)).token_ids.tolist() == cut.token_ids.tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_the_rule_counts_the_nodes_of_chains(packed):
    """What it lets draft, prices and counts as drafted are the chain's nodes."""
    ends = [1.0 + 0.05 * 511] * 2
    curve = CostCurve([1, 64], [1, 512], [0, 100], [[[1.0, 1.0], ends]] * 2, packed=packed)
    rule, drafter = SizingRule(curve, max_nodes=24), private()
    sequences = [drafter.begin([*PROMPTS[0] * 4, i]) for i in range(4)]
    made: list[list[int]] = [[] for _ in sequences]
    verified = 0
    for step in range(60):
        flat = [token for tokens in made for token in tokens]
        batch = drafter.step(sequences, flat, np.cumsum([0, *map(len, made)]), rule=rule, shape="chain")
        assert (step < 2) == (batch.drafted_sequences == 0)  # two plain steps, then the chains
        assert all(map(is_path, batch))
        sizes = np.diff(batch.offsets)
        assert batch.drafted_nodes <= 4 * 24
        made = []
        for sequence, chain in zip(sequences, batch, strict=True):
            text = (PROMPTS[0] * 400)[len(sequence) - 1 :][: len(chain) + 1]
            made.append(chain.accept(text)[1].tolist())
        size = int(sizes.sum() if packed else sizes.max())
        verified += int(sizes.sum())
        costs, _ = rule.costs(4, batch.context)
        rule.observe(
            batch=4,
            size=size,
            context=batch.context,
            seconds=costs.seconds[size],
            tokens=sum(map(len, made)),
        )
    assert rule.speedup > 2
    for sequence, tokens in zip(sequences, made, strict=True):
        sequence.extend(tokens)
        sequence.finish()
    nodes = drafter.metrics["nodes"]
    assert nodes["sum"] == verified > 0


class TestArrays:
    def test_chains_come_in_rows_of_one_length(self):
        drafter = private()
        sequences = [drafter.begin(prompt) for prompt in PROMPTS]
        for shape in ("chain", "tree"):
            batch = drafter.draft_batch(sequences, 12, max_depth=5, shape=shape)
            for k in (0, 1, 3, 7):
                token_ids, lengths = batch.chains(k, pad=77)
                assert (token_ids.shape, token_ids.dtype, lengths.dtype) == ((4, k), np.int32, np.int32)
                for tree, row, length in zip(batch, token_ids, lengths, strict=True):
                    chain = tree.chain(k)
                    assert row.tolist() == [*chain, *[77] * (k - len(chain))]
                    assert length == len(chain)
                    path = tree.path(k)
                    assert tree.token_ids[path].tolist() == chain.tolist()
                    assert (np.diff(tree.probs[path]) <= 0).all()
            assert batch.chains(3)[0].min() == -1

    def test_buffers_are_used(self):
        drafter = private()
        batch = drafter.draft_batch([drafter.begin(prompt) for prompt in PROMPTS[:2]], 4, shape="chain")
        out, lengths = np.full((5, 4), 9, np.int32), np.full(5, 9, np.int32)
        token_ids, counts = batch.chains(4, out=out, lengths=lengths)
        assert token_ids.base is out
        assert counts.base is lengths
        assert (token_ids.shape, counts.tolist()) == ((2, 4), lengths[:2].tolist())
        assert (out[2:] == 9).all()
        assert (lengths[2:] == 9).all()
        assert drafter.draft_batch([], 4, shape="chain").chains(3)[0].shape == (0, 3)

    @pytest.mark.parametrize(
        "options",
        [
            {"out": np.zeros((1, 4), np.int32)},
            {"out": np.zeros((2, 5), np.int32)},
            {"out": np.zeros((2, 4), np.int64)},
            {"out": np.zeros((4, 2), np.int32).T},
            {"out": [[0] * 4] * 2},
            {"out": np.zeros(8, np.int32)},
            {"lengths": np.zeros(1, np.int32)},
            {"lengths": np.zeros(2)},
            {"k": -1},
            {"k": 1025},
        ],
    )
    def test_what_does_not_fit_is_refused(self, options):
        drafter = private()
        batch = drafter.draft_batch([drafter.begin(prompt) for prompt in PROMPTS[:2]], 4, shape="chain")
        with pytest.raises(InvalidArgumentError):
            batch.chains(**{"k": 4, **options})


def test_other_shapes_are_refused():
    drafter = private()
    sequence = drafter.begin(PROMPTS[0])
    for call in (
        lambda: sequence.draft(4, shape="list"),
        lambda: drafter.draft_batch([sequence], 4, shape=""),
        lambda: drafter.step([sequence], [1], [0, 1], 4, shape="Chain"),
    ):
        with pytest.raises(InvalidArgumentError, match='shape must be "tree" or "chain"'):
            call()
    assert len(sequence) == len(PROMPTS[0])


def test_trees_have_paths():
    tree = DraftTree([1, 2, 3, 1, 5], [-1, 0, -1, 2, 1], [0.6, 0.5, 0.3, 0.25, 0.1])
    assert (tree.path(9).tolist(), tree.path(1).tolist(), tree.path(0).tolist()) == ([0, 1, 4], [0], [])
    with pytest.raises(InvalidArgumentError, match="k must not be negative"):
        tree.path(-1)
