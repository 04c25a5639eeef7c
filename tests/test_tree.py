"""DraftTree against naive versions of its methods."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import paths

from sssd import Drafter, DraftTree
from sssd.errors import InvalidArgumentError, InvalidTokenError


@st.composite
def trees(draw):
    """A tree with distinct siblings and path probabilities that fall."""
    token_ids, parents, probs, taken = [], [], [], set()
    for node in range(draw(st.integers(0, 20))):
        parent, token = draw(st.integers(-1, node - 1)), draw(st.integers(0, 9))
        if (parent, token) in taken:
            continue
        parent = min(parent, len(token_ids) - 1)
        if (parent, token) in taken:
            continue
        taken.add((parent, token))
        token_ids.append(token)
        parents.append(parent)
        probs.append((probs[parent] if parent >= 0 else 1.0) * draw(st.floats(0.0625, 1, width=16)))
    return DraftTree(token_ids, parents, probs)


def ancestors(tree, node):
    while node >= 0:
        yield node
        node = tree.parents[node]


@given(trees(), st.integers(0, 5))
def test_mask_and_positions(tree, extra):
    width = len(tree) + extra
    mask, positions = tree.attention_mask(width), tree.position_ids(100, width)
    expected = np.eye(width + 1, dtype=bool)
    # padding too: it is a child of the root
    expected[:, 0] = True
    for node in range(len(tree)):
        expected[node + 1, [above + 1 for above in ancestors(tree, node)]] = True
    assert (mask == expected).all()
    assert mask.dtype == bool
    assert positions.dtype == np.int64
    assert positions.tolist() == [100, *(100 + tree.depths).tolist(), *[100] * extra]
    assert (tree.attention_mask() == expected[: len(tree) + 1, : len(tree) + 1]).all()


@given(trees(), st.integers(0, 5))
def test_padding(tree, extra):
    token_ids, parents = tree.pad(len(tree) + extra, 7)
    assert token_ids.tolist() == tree.token_ids.tolist() + [7] * extra
    assert parents.tolist() == tree.parents.tolist() + [-1] * extra
    if len(tree):
        with pytest.raises(InvalidArgumentError, match="width"):
            tree.pad(len(tree) - 1)


@given(trees(), st.integers(0, 8))
def test_chain_is_the_best_path(tree, k):
    found = paths(tree)
    value = {path: sum(tree.probs[above] for above in ancestors(tree, n)) for n, path in enumerate(found)}
    fitting = [path for path in found if len(path) <= k]
    chain = tuple(tree.chain(k).tolist())
    assert chain in fitting if fitting else chain == ()
    assert all(value[path] <= value[chain] + 1e-4 for path in fitting)


@given(trees(), st.data())
def test_accept_walks_along_the_target(tree, data):
    targets = data.draw(st.lists(st.integers(0, 9), min_size=len(tree) + 1, max_size=len(tree) + 1))
    nodes, token_ids = tree.accept(targets)
    at, expected = -1, []
    while True:
        following = [
            n for n in range(len(tree)) if tree.parents[n] == at and tree.token_ids[n] == targets[at + 1]
        ]
        if not following:
            break
        at = following[0]
        expected.append(at)
    assert nodes.tolist() == expected
    assert token_ids.tolist() == [*tree.token_ids[expected].tolist(), targets[at + 1]]
    with pytest.raises(InvalidArgumentError, match="target_ids"):
        tree.accept([*targets, 1])


@given(trees())
def test_breadth_first_links(tree):
    nodes, first_child, next_sibling = tree.breadth_first()
    order = [-1, *nodes.tolist()]
    assert sorted(order) == list(range(-1, len(tree)))
    assert (np.diff(tree.depths[nodes]) >= 0).all()
    for position, node in enumerate(order):
        children, at = [], first_child[position]
        while at != -1:
            children.append(order[at])
            at = next_sibling[at]
        assert children == [n for n in range(len(tree)) if tree.parents[n] == node]


@given(trees())
def test_text_shows_every_node(tree):
    lines = tree.render(lambda ids: f"<{ids[0]}>").splitlines()
    assert len(lines) == len(tree) + 1
    assert all(sum(f"<{token}>" in line for line in lines) >= 1 for token in tree.token_ids)
    assert repr(tree).startswith(f"DraftTree({len(tree)} nodes")
    assert tree.expected_accepted == pytest.approx(tree.probs.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [-1, -1]), "node 1 repeats the token of its sibling 0"),
        (([1], [0]), "parent of node 0"),
        (([1], [-2]), "parent of node 0"),
        (([1, 2], [-1]), "same length"),
        (([1], [-1], [float("nan")]), "probability of node 0"),
        (([1], [-1], [1.5]), "probability of node 0"),
        (([1] * 1025, range(-1, 1024)), "at most 1024"),
        (([1], [0.5]), "parents"),
    ],
)
def test_arrays_that_are_no_tree_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        DraftTree(*arguments)


def test_bad_tokens_are_refused():
    with pytest.raises(InvalidTokenError):
        DraftTree([-1], [-1])


def test_impossible_widths_and_lengths_are_refused():
    tree = DraftTree([1, 2], [-1, 0], [0.5, 0.25])
    for width in (-1, 1, 1025, 10**9):
        for call in (tree.attention_mask, tree.pad, lambda width: tree.position_ids(0, width)):
            with pytest.raises(InvalidArgumentError, match="between the tree's 2 nodes and 1024"):
                call(width)
    with pytest.raises(InvalidArgumentError, match="k must not be negative"):
        tree.chain(-1)
    assert tree.chain(10**9).tolist() == [1, 2]


def test_arrays_are_copies():
    tree = Drafter().begin([1, 2, 1]).draft(1)
    tree.token_ids[0] = 9
    assert tree.token_ids.tolist() == [2]
    assert tree.token_ids.dtype == tree.parents.dtype == tree.depths.dtype == np.int32
    assert tree.probs.dtype == np.float32
