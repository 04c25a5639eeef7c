"""Draft trees and drafters made up for tests: random, partly right, and always wrong."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import numpy as np

from sssd import DraftTree


def random_tree(rng: np.random.Generator, nodes: int, vocab_size: int) -> Any:
    """A random tree with distinct siblings; parents are among the newest nodes, so paths grow long."""
    token_ids: list[int] = []
    parents: list[int] = []
    while len(token_ids) < nodes:
        parent = int(rng.integers(max(-1, len(parents) - 4), len(parents)))
        token = int(rng.integers(vocab_size))
        if (parent, token) not in zip(parents, token_ids, strict=True):
            token_ids.append(token)
            parents.append(parent)
    return DraftTree(token_ids, parents)


def paths_of(tree: Any) -> list[list[int]]:
    """For every node the nodes from the root down to it."""
    paths: list[list[int]] = []
    for node, parent in enumerate(tree.parents.tolist()):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


class ScriptedSequence:
    """Stands in for ``sssd.Sequence``; its drafts come from a function of the tokens so far."""

    def __init__(self, token_ids: Iterable[int], draft: Callable[[list[int], int], Any]) -> None:
        self.token_ids = [int(token) for token in token_ids]
        self.closed = False
        self._draft = draft

    def extend(self, token_ids: Iterable[int]) -> None:
        self.token_ids.extend(int(token) for token in token_ids)

    def draft(self, max_nodes: int) -> Any:
        return self._draft(self.token_ids, max_nodes)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ScriptedDrafter:
    """Drafts from known texts, mixed with wrong tokens.

    Args:
        texts: Prompt + continuation of every request, as token lists.
        vocab_size: Wrong tokens are drawn below this.
        right: Probability that a node on the way down continues the known text; 0 drafts nonsense only.
        seed: Of the random choices.
    """

    def __init__(self, texts: list[list[int]], vocab_size: int, right: float, seed: int = 0) -> None:
        self.texts, self.vocab_size, self.right = texts, vocab_size, right
        self.rng = np.random.default_rng(seed)
        self.sequences: list[ScriptedSequence] = []

    def begin(self, prompt_ids: Iterable[int]) -> ScriptedSequence:
        self.sequences.append(ScriptedSequence(prompt_ids, self.draft))
        return self.sequences[-1]

    def draft(self, token_ids: list[int], max_nodes: int) -> Any:
        known = next((text for text in self.texts if text[: len(token_ids)] == token_ids), None)
        tree = random_tree(self.rng, max_nodes, self.vocab_size)
        tokens, parents = tree.token_ids.tolist(), tree.parents.tolist()
        if known is None:
            return tree
        # Lay the true continuation along one random path, so that it is no prefix of the tree.
        path = max(paths_of(tree), key=lambda nodes: (len(nodes), self.rng.random()))
        for node, token in zip(path, known[len(token_ids) :], strict=False):
            if self.rng.random() >= self.right:
                break
            taken = [i for i, parent in enumerate(parents) if parent == parents[node] and tokens[i] == token]
            if taken and taken[0] != node:
                tokens[taken[0]] = tokens[node]
            tokens[node] = token
        return DraftTree(tokens, parents)
