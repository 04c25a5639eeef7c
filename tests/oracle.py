"""What a draft must be, whatever the predictor's weights are: a slow check against the whole history."""

import itertools
from collections import defaultdict

import numpy as np

from sssd import SOURCES, DraftTree

COVERED = 16
"""Up to so many earlier occurrences of the last token, all that followed it are drafted. Of more, those with
the longest contexts come first, and what followed others may be missing."""


def successors(history: list[int]) -> dict[int, set[int]]:
    """The tokens that followed each token."""
    found: dict[int, set[int]] = defaultdict(set)
    for token, following in itertools.pairwise(history):
        found[token].add(following)
    return found


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Each node as the tokens from the root's child to it."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        found.append(((*found[parent],) if parent >= 0 else ()) + (token,))
    return found


def check_form(tree: DraftTree, max_nodes: int) -> None:
    """The invariants of any draft tree."""
    parents, depths, probs = tree.parents, tree.depths, tree.probs
    assert len(tree) <= max_nodes
    assert len(set(paths(tree))) == len(tree), "siblings share a token"
    assert all(-1 <= parent < node for node, parent in enumerate(parents))
    assert all(depths[n] == (depths[p] if p >= 0 else 0) + 1 for n, p in enumerate(parents))
    assert np.isfinite(probs).all()
    assert ((probs >= 0) & (probs <= 1)).all()
    assert (np.diff(probs) <= 0).all(), "nodes are not ordered by probability"
    for parent in range(-1, len(tree)):
        above = probs[parent] if parent >= 0 else 1.0
        assert probs[parents == parent].sum() <= above + 1e-5


def check_draft(history: list[int], end_tokens: set[int], tree: DraftTree, max_nodes: int) -> None:
    """A draft without a datastore holds what the history supports."""
    check_form(tree, max_nodes)
    followed = successors(history)
    for node, (token, parent) in enumerate(zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True)):
        before = int(tree.token_ids[parent]) if parent >= 0 else history[-1]
        assert before not in end_tokens, f"node {node} follows an end token"
        if token not in followed[before]:
            # the output replaces, adds or leaves out tokens of what it copies
            assert SOURCES[tree.sources[node]] == "aligned", f"node {node}: {token} never followed {before}"
            assert parent == -1
            assert token in history
    if not history or history[-1] in end_tokens:
        assert len(tree) == 0


def check_covered(history: list[int], end_tokens: set[int], tree: DraftTree) -> None:
    """A draft of depth 1, with all nodes and ``min_prob=0``, holds all that followed the last token."""
    if history and history[-1] not in end_tokens and history[:-1].count(history[-1]) <= COVERED:
        assert {path[0] for path in paths(tree)} >= successors(history)[history[-1]]
