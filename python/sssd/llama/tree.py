"""A loop for llama-cpp-python in which draft trees are verified: a sequence id for each path to a leaf."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp
from llama_cpp import _internals

from sssd._core import Drafter, DraftTree, Sequence, SizingRule
from sssd.errors import InvalidArgumentError, MemoryLimitError, SssdError
from sssd.hardware import CostCurve
from sssd.llama.draft_model import linear

logger = logging.getLogger("llama_cpp.sssd")


class TreeDecoder:
    """Decodes with a ``Llama``'s weights, in a context of its own in which the nodes of a tree see their
    ancestors only.

    llama.cpp's attention goes by sequences, of which a token may be in several: each path from the root to a
    leaf is a sequence, and a node is in those of all leaves below it. One pass verifies the tree; the path
    that the target takes stays in the cache. Tokens are sampled by ``Llama``'s own samplers, from the logits
    of the pass that verified them, whatever was drafted: for a temperature of 0 each is their most probable
    one. Not for use from several threads at once, nor while the ``Llama`` itself runs.

    Args:
        llama: the model. Models whose memory is no cache of keys and values (recurrent ones) cannot go back
            and have no trees.
        max_nodes: the largest tree.
        max_leaves: the most paths; trees are cut before the node that would make one more. Each costs the
            cache's bookkeeping in every step.
        end_token_ids: tokens that end a text; by default the model's own.
        datastore: as in ``Drafter``.
        drafter: a drafter of one's own, in place of these two.
        learn: whether later texts learn from earlier ones.
        curve: cost of a pass by its tokens, to begin with.
        namespace: of the drafter.

    Attributes:
        drafter: the ``Drafter``.
        passes: passes that gave tokens so far.
        drafted: nodes verified so far.
        accepted: of these, those that came true.
        failed: steps that met an error while drafting, and verified nothing.

    Raises:
        InvalidArgumentError: ``max_nodes`` or ``max_leaves`` is out of range.
        ValueError: llama.cpp makes no context.
        What ``Drafter`` raises.
    """

    def __init__(
        self,
        llama: Any,
        *,
        max_nodes: int = 24,
        max_leaves: int = 8,
        end_token_ids: Any = None,
        datastore: Any = None,
        drafter: Drafter | None = None,
        learn: bool = True,
        curve: CostCurve | None = None,
        namespace: str = "",
    ) -> None:
        most = int(llama_cpp.llama_max_parallel_sequences()) - 1
        if not (1 <= max_leaves <= most and 1 <= max_nodes < llama.n_batch):
            raise InvalidArgumentError(
                f"max_leaves must be between 1 and {most} and max_nodes between 1 and {llama.n_batch - 1}, "
                f"got {max_leaves} and {max_nodes}"
            )
        self.end_token_ids = [llama.token_eos()] if end_token_ids is None else list(end_token_ids)
        self.drafter = drafter or Drafter(
            vocab_size=llama.n_vocab(), end_token_ids=self.end_token_ids, datastore=datastore, threads=1
        )
        self.max_nodes, self.max_leaves, self.learn, self.namespace = max_nodes, max_leaves, learn, namespace
        self.passes = self.drafted = self.accepted = self.failed = 0
        self._llama = llama
        self._rule = SizingRule(curve or linear(0.3), max_nodes=max_nodes)
        params = llama_cpp.llama_context_params.from_buffer_copy(llama.context_params)
        params.n_seq_max, params.kv_unified = max_leaves + 1, True
        self._context = _internals.LlamaContext(model=llama._model, params=params, verbose=False)
        self._batch = _internals.LlamaBatch(
            n_tokens=llama.n_batch, embd=0, n_seq_max=max_leaves + 1, verbose=False
        )
        self._length = llama.n_ctx()
        self._held: list[int] = []
        self._sampler: Any = None
        self._leaf_of: list[int] = []
        self._draft_seconds = 0.0

    def close(self) -> None:
        """Frees the context; the ``Llama`` stays."""
        self._batch.close()
        self._context.close()

    def generate(
        self, tokens: Any, *, max_tokens: int | None = None, temp: float = 0.0, **sampling: Any
    ) -> Iterator[int]:
        """Decodes a text, as ``Llama.generate`` does, and ends after an end token, ``max_tokens`` or when the
        context is full.

        What the cache holds of the prompt from the text before is not read again.

        Args:
            tokens: ids of the prompt.
            max_tokens: the most tokens.
            temp: the temperature; 0 is greedy.
            **sampling: what else ``Llama.generate`` takes for sampling: ``top_k``, ``top_p``, ``min_p``,
                ``repeat_penalty``, ``grammar`` and the like. By default no token is penalised.

        Yields:
            The tokens.

        Raises:
            InvalidArgumentError: the prompt has no token, or does not fit into the context.
            InvalidTokenError: a token is outside the vocabulary.
            RuntimeError: llama.cpp's pass failed.
        """
        text = [int(token) for token in tokens]
        if not 0 < len(text) < self._length:
            message = f"the prompt must have 1 to {self._length - 1} tokens, not {len(text)}"
            raise InvalidArgumentError(message)
        most = self._length if max_tokens is None else min(self._length, len(text) + max_tokens)
        sequence = self._begin(text, most)
        self._sampler = self._llama._init_sampler(temp=temp, **{"repeat_penalty": 1.0, **sampling})
        try:
            produced = [self._read(text)] if len(text) < most else []
            while produced:
                text += produced
                done = len(text) >= most or produced[-1] in self.end_token_ids
                tree = self._draft(sequence, produced, 0 if done else most - len(text))
                yield from produced
                produced = [] if done else self._verify(text, tree, most)
            if sequence is not None and self.learn and not sequence.closed:
                sequence.finish()
        except RuntimeError:
            # what a pass that failed has left behind
            self._context.kv_cache_clear()
            self._held.clear()
            raise
        finally:
            self._sampler.close()
            if sequence is not None:
                sequence.close()

    def _begin(self, text: list[int], most: int) -> Sequence | None:
        """None where there is no memory for drafts."""
        try:
            return self.drafter.begin(text, namespace=self.namespace, max_length=most)
        except MemoryLimitError as full:
            self._failed(full)
            return None

    def _failed(self, problem: SssdError) -> None:
        if self.failed == 0:
            logger.warning("sssd: a text goes on without drafts; later failures are counted: %s", problem)
        self.failed += 1

    def _draft(self, sequence: Sequence | None, produced: list[int], room: int) -> DraftTree:
        """What is to be verified next: a tree of no more leaves than there are sequences, that fits."""
        started = time.perf_counter()
        tree = DraftTree([], [], [])
        if sequence is None or sequence.closed:
            return tree
        try:
            sequence.extend(produced)
            if room > 1:
                tree = sequence.draft(min(self.max_nodes, room - 1), rule=self._rule)
            fits = _nodes_within(tree.parents.tolist(), self.max_leaves)
            if fits < len(tree):
                sequence.cut_draft(fits)
                tree = tree.first(fits)
        except SssdError as problem:
            self._failed(problem)
            sequence.close()
            tree = DraftTree([], [], [])
        self._draft_seconds = time.perf_counter() - started
        return tree

    def _read(self, prompt: list[int]) -> int:
        """Reads what the cache does not hold of a prompt; the token after it."""
        shared = 0
        for held, new in zip(self._held, prompt[:-1], strict=False):
            if held != new:
                break
            shared += 1
        if not llama_cpp.llama_memory_seq_rm(self._context.memory, 0, shared, -1):
            # a memory that cannot go back in part
            self._context.kv_cache_clear()
            shared = 0
        del self._held[shared:]
        for start in range(shared, len(prompt), self._llama.n_batch):
            piece = prompt[start : start + self._llama.n_batch]
            self._batch.set_batch(batch=piece, n_past=start, logits_all=False)
            self._context.decode(self._batch)
            self._held += piece
        self.passes += 1
        return int(self._sampler.sample(self._context, -1))

    def _verify(self, text: list[int], tree: DraftTree, most: int) -> list[int]:
        """One pass over the last token and a tree; what the target says, whose last token was not drafted."""
        started = time.perf_counter()
        parents, ids = tree.parents.tolist(), tree.token_ids.tolist()
        leaves = self._fill(text[-1], tree)
        memory, past = self._context.memory, len(self._held)
        for leaf in range(1, leaves + 1):
            llama_cpp.llama_memory_seq_cp(memory, 0, leaf, -1, -1)
        self._context.decode(self._batch)
        children = {
            (parent, token): node for node, (parent, token) in enumerate(zip(parents, ids, strict=True))
        }
        node: int | None = -1
        taken, produced = -1, []
        while node is not None:
            taken = node
            produced.append(int(self._sampler.sample(self._context, taken + 1)))
            if produced[-1] in self.end_token_ids or len(text) + len(produced) >= most:
                break
            node = children.get((taken, produced[-1]))
        accepted = len(produced) - 1
        if accepted:
            llama_cpp.llama_memory_seq_cp(memory, self._leaf_of[taken], 0, past, past + 1 + accepted)
        for leaf in range(1, leaves + 1):
            llama_cpp.llama_memory_seq_rm(memory, leaf, -1, -1)
        self._held += [text[-1], *produced[:-1]]
        self.passes += 1
        self.drafted += len(tree)
        self.accepted += accepted
        self._rule.observe(
            batch=1,
            size=len(tree),
            context=float(past),
            seconds=time.perf_counter() - started,
            tokens=len(produced),
            draft_seconds=self._draft_seconds,
        )
        return produced

    def _fill(self, root: int, tree: DraftTree) -> int:
        """Puts root and tree into the batch; how many leaves there are."""
        parents = tree.parents.tolist()
        below: list[list[int]] = [[] for _ in parents]
        leaves = 0
        inner = set(parents)
        for node in range(len(parents) - 1, -1, -1):
            if node not in inner:
                leaves += 1
                below[node].append(leaves)
            if parents[node] >= 0:
                below[parents[node]] += below[node]
        self._leaf_of = [sequences[0] for sequences in below]
        past, batch = len(self._held), self._batch.batch
        rows = [
            (root, 0, range(leaves + 1)),
            *zip(tree.token_ids.tolist(), tree.depths.tolist(), below, strict=True),
        ]
        for place, (token, depth, sequences) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, past + depth, True
            batch.n_seq_id[place] = len(sequences)
            for number, sequence in enumerate(sequences):
                batch.seq_id[place][number] = sequence
        batch.n_tokens = len(rows)
        return leaves


def _nodes_within(parents: list[int], leaves: int) -> int:
    """How many of the first nodes make a tree of at most so many leaves."""
    inner: set[int] = set()
    found = 0
    for node, parent in enumerate(parents):
        found += parent < 0 or parent in inner
        if found > leaves:
            return node
        inner.add(parent)
    return len(parents)
