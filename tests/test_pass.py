"""PassBlock against naive versions of its arrays, and DraftBatch.from_trees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import DraftBatch, Drafter, DraftTree, PassBlock
from sssd.errors import InvalidArgumentError, InvalidTokenError


@st.composite
def trees(draw):
    """A tree of up to 12 nodes, now and then of more than 64 entries."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    nodes = draw(st.one_of(st.integers(0, 12), st.just(70)))
    token_ids, parents = [], []
    for node in range(nodes):
        parent = int(rng.integers(-1, node))
        siblings = {token_ids[i] for i in range(node) if parents[i] == parent}
        token_ids.append(int(rng.choice([token for token in range(90) if token not in siblings])))
        parents.append(parent)
    return DraftTree(token_ids, parents)


batches = st.lists(st.none() | trees(), max_size=5)


def path_of(parents, entry):
    """The entry and those above it, from the entry up."""
    while entry >= 0:
        yield entry
        entry = parents[entry]


def rows_of(batch, roots, positions, width):
    """What a row's entries are, the slow way."""
    for tree, root, position in zip(batch, roots, positions, strict=True):
        token_ids = [] if tree is None else tree.token_ids.tolist()
        parents = [-1, *([] if tree is None else (tree.parents + 1).tolist())]
        fillers = 0 if width is None else width - len(parents)
        ids = [root, *token_ids] + [root] * fillers
        parents += [-1] * fillers
        above = [list(path_of(parents, entry)) for entry in range(len(parents))]
        depths = [len(path) - 1 for path in above]
        yield ids, parents, above, depths, [position + depth for depth in depths]


@settings(deadline=None)
@given(batches, st.booleans(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_arrays_are_those_of_the_trees(batch, packed, extra, random):
    roots = [random.randrange(100) for _ in batch]
    positions = [random.randrange(5000) for _ in batch]
    widest = max((1 + (0 if tree is None else len(tree)) for tree in batch), default=0)
    width = None if packed or extra == 0 else max(widest, 1) + extra
    block = PassBlock()
    flat = DraftBatch.from_trees(batch)
    block.fill(flat, roots, positions, width=width, packed=packed, mask=True, links=True)
    used = None if packed else (width or widest)
    expected = list(rows_of(batch, roots, positions, used))
    shape = (len(batch), used) if used is not None else (sum(len(row[0]) for row in expected),)
    assert len(block) == len(batch)
    for name, column in (("ids", 0), ("parents", 1), ("depths", 3), ("positions", 4)):
        array = getattr(block, name)
        assert (array.shape, array.dtype) == (shape, np.int64)
        assert array.ravel().tolist() == [value for row in expected for value in row[column]]
    assert block.rows.ravel().tolist() == [i for i, row in enumerate(expected) for _ in row[0]]
    starts = np.append(0, np.cumsum([len(row[0]) for row in expected], dtype=int))
    assert block.offsets.tolist() == starts.tolist()
    check_relatives(block, expected, starts, shape, packed)


def check_relatives(block, expected, starts, shape, packed):
    """Mask, bits and links."""
    words = max(1, -(-max((len(row[0]) for row in expected), default=0) // 64))
    assert (block.ancestors.shape, block.ancestors.dtype) == ((*shape, words), np.uint64)
    assert (block.mask.shape, block.mask.dtype) == ((*shape, shape[-1]), np.bool_)
    bits = block.ancestors.reshape(-1, words)
    mask = block.mask.reshape(len(bits), shape[-1])
    first, following = block.first_child.ravel(), block.next_sibling.ravel()
    for (_, parents, above, _, _), start in zip(expected, starts, strict=False):
        column = start if packed else 0
        for entry, path in enumerate(above):
            row = int.from_bytes(bits[start + entry].astype("<u8").tobytes(), "little")
            assert row == sum(1 << other for other in path)
            assert np.flatnonzero(mask[start + entry]).tolist() == sorted(column + other for other in path)
            children, child = [], first[start + entry]
            while child >= 0:
                children.append(int(child))
                child = following[start + child]
            assert children == [i for i, parent in enumerate(parents) if parent == entry]


@settings(deadline=None)
@given(batches, st.booleans(), st.integers(0, 3), st.data())
def test_acceptance_is_that_of_each_tree(batch, packed, extra, data):
    widest = max((1 + (0 if tree is None else len(tree)) for tree in batch), default=0)
    block = PassBlock()
    width = None if packed or not batch else widest + extra
    block.fill(DraftBatch.from_trees(batch), [3] * len(batch), [0] * len(batch), width=width, packed=packed)
    dtype = data.draw(st.sampled_from([np.int64, np.int32, np.uint16]))
    # half of the entries are followed by one of their children
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    targets = rng.integers(0, 90, block.ids.shape).astype(dtype)
    flat, starts = targets.reshape(-1), block.offsets
    for row, tree in enumerate(batch):
        for node in rng.permutation(0 if tree is None else len(tree)):
            if rng.random() < 0.5:
                flat[starts[row] + tree.parents[node] + 1] = tree.token_ids[node]
    kept, tokens, offsets = block.accept(targets if data.draw(st.booleans()) else np.asfortranarray(targets))
    assert (kept.dtype, tokens.dtype, offsets.dtype) == (np.int64, np.int64, np.int32)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(kept), len(batch) + 1)
    for row, tree in enumerate(batch):
        own = flat[starts[row] : starts[row] + 1 + (0 if tree is None else len(tree))].astype(np.int64)
        nodes, accepted = (DraftTree([], []) if tree is None else tree).accept(own)
        start, end = offsets[row : row + 2]
        assert kept[start:end].tolist() == [0, *(nodes + 1).tolist()]
        assert tokens[start:end].tolist() == accepted.tolist()


def test_a_step_goes_from_draft_to_draft():
    """What an engine does: draft, fill, choose, accept, and the tokens into the next draft."""
    drafter = Drafter()
    texts = [[1, 2, 3, 4] * 4, [7, 8, 7, 8, 7], [5]]
    lengths = [len(text) for text in texts]
    sequences = [drafter.begin(text[:-1]) for text in texts]
    tokens, offsets = [text[-1] for text in texts], np.arange(4)
    block, trees = PassBlock(), DraftBatch(3, 3 * 8)
    for _ in range(4):
        trees = drafter.step(sequences, tokens, offsets, max_nodes=8, out=trees)
        roots = [text[-1] for text in texts]
        block.fill(trees, roots, [len(text) - 1 for text in texts], packed=True)
        _, tokens, offsets = block.accept((block.ids + 1) % 9)
        for row, text in enumerate(texts):
            new = tokens[offsets[row] : offsets[row + 1]]
            assert len(new) == offsets[row + 1] - offsets[row] >= 1
            text += new.tolist()
    assert [text[length - 1 :] for text, length in zip(texts, lengths, strict=True)] == [
        [(text[length - 1] + i) % 9 for i in range(len(text) - length + 1)]
        for text, length in zip(texts, lengths, strict=True)
    ]


def test_no_trees_are_rows_of_roots():
    block = PassBlock()
    block.fill(None, [4, 5], [10, 20], mask=True)
    assert block.ids.tolist() == [[4], [5]]
    assert block.positions.tolist() == [[10], [20]]
    assert block.mask.tolist() == [[[True]], [[True]]]
    kept, tokens, offsets = block.accept([[8], [9]])
    assert (kept.tolist(), tokens.tolist(), offsets.tolist()) == ([0, 0], [8, 9], [0, 1, 2])
    assert repr(block) == "PassBlock(2 rows of 1 entries)"


def test_buffers_are_the_callers_or_grow():
    tree = DraftTree([1, 2], [-1, 0])
    one, two = DraftBatch.from_trees([tree]), DraftBatch.from_trees([tree] * 2)
    ids, mask = np.zeros(4, np.int64), np.zeros(9, bool)
    block = PassBlock(ids=ids, mask=mask)
    block.fill(one, [7], [0], mask=True)
    assert ids.tolist() == [7, 1, 2, 0]
    assert mask.reshape(3, 3).tolist() == tree.attention_mask().tolist()
    assert np.shares_memory(block.ids, ids)
    with pytest.raises(InvalidArgumentError, match="ids has room for 4 values, and the pass takes 6; give"):
        block.fill(two, [7, 7], [0, 0])
    assert len(block) == 0
    block = PassBlock()
    block.fill(one, [7], [0])
    first = block.ids
    block.fill(two, [8, 9], [0, 0])
    assert (first.tolist(), block.ids.tolist()) == ([[7, 1, 2]], [[8, 1, 2], [9, 1, 2]])
    grown = block.ids
    for _ in range(3):
        block.fill(one, [7], [0])
        assert np.shares_memory(block.ids, grown)


def test_what_is_wrong_is_said():
    tree = DraftTree([1, 2], [-1, 0])
    flat, block = DraftBatch.from_trees([tree, None]), PassBlock()
    for arguments, options, message in (
        (([1], [0, 0]), {}, "roots must hold one token for each of 2 trees, got 1"),
        (([1, 2], [0]), {}, "positions must hold the root's position of each of 2 rows, got 1"),
        (([1, 2], [0, 2**63 - 1]), {}, "position of row 1"),
        (([1, 2], [0, 0.5]), {}, "positions must be"),
        (([1, 2], [0, 0]), {"width": 2}, "width must be between 3, the root and nodes"),
        (([1, 2], [0, 0]), {"width": 10**9}, "and 1025, got 1000000000"),
        (([1, 2], [0, 0]), {"width": -1}, "width must not be negative"),
        (([1, 2], [0, 0]), {"width": 3, "packed": True}, "packed rows have no width"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            block.fill(flat, *arguments, **options)
    with pytest.raises(InvalidTokenError, match="token id -1 at index 0"):
        block.fill(flat, [-1, 1], [0, 0])
    block.fill(flat, [1, 2], [0, 0])
    for targets in ([1, 2], [[1, 2, 3]], [[0.5] * 3] * 2, None, "text", np.zeros((2, 4), int)):
        with pytest.raises(InvalidArgumentError, match=r"targets must be integers of shape \[2, 3\]"):
            block.accept(targets)
    for name in ("mask", "first_child", "next_sibling"):
        with pytest.raises(InvalidArgumentError, match="call fill with"):
            getattr(block, name)
    for bad in (np.zeros(4, np.int32), np.zeros((2, 2), np.int64), np.zeros(8, np.int64)[::2], [1]):
        with pytest.raises(InvalidArgumentError, match="ids must be a contiguous, writable int64 array"):
            PassBlock(ids=bad)
    kept, *_ = block.accept(np.zeros((2, 3), int))
    with pytest.raises(InvalidArgumentError, match="targets"):
        block.accept(kept)


def test_trees_that_were_written_to_are_refused():
    flat, block = DraftBatch.from_trees([DraftTree([1, 2, 3], [-1, 0, 1])]), PassBlock()
    for name, value, message in (
        ("parents", 1, "parent of node 1 of tree 0"),
        ("token_ids", -1, "token of node 1 of tree 0"),
        ("offsets", 2**30, "offsets of tree 0"),
    ):
        array = getattr(flat, name)
        before, array[1] = array[1], value
        with pytest.raises(InvalidArgumentError, match=message):
            block.fill(flat, [1], [0])
        assert len(block) == 0
        array[1] = before
    # what was filled accepts by the trees as they were
    block.fill(flat, [1], [0])
    block.ids[:], block.parents[:], flat.token_ids[:] = 0, -5, 77
    assert block.accept([[1, 2, 3, 4]])[1].tolist() == [1, 2, 3, 4]


@settings(deadline=None)
@given(batches)
def test_batches_of_trees(batch):
    flat = DraftBatch.from_trees(batch)
    assert len(flat) == len(batch)
    for tree, copy in zip(batch, flat, strict=True):
        same = DraftTree([], []) if tree is None else tree
        for name in ("token_ids", "parents", "depths", "probs", "sources"):
            assert (getattr(same, name) == getattr(copy, name)).all()


def test_batches_of_trees_use_what_room_they_are_given():
    tree, out = DraftTree([1, 2], [-1, 0], [0.5, 0.25]), DraftBatch(2, 3)
    assert DraftBatch.from_trees([tree, None], out=out) is out
    assert (out.offsets.tolist(), out.probs.tolist()) == ([0, 2, 2], [0.5, 0.25])
    with pytest.raises(InvalidArgumentError, match="room for 2 sequences and 3 nodes"):
        DraftBatch.from_trees([tree] * 2, out=out)
    with pytest.raises(InvalidArgumentError, match=r"trees\[1\] must be a DraftTree or None, got"):
        DraftBatch.from_trees([tree, 5])
    assert len(DraftBatch.from_trees([])) == 0
