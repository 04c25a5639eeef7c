"""Verify passes of one batch: its cache, and the fastest way to run the model over it."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike

from sssd._core import DraftBatch, PassBlock
from sssd.errors import InvalidArgumentError
from sssd.hf.contract import check_model, forward
from sssd.hf.fast import FastPass, fast_pass, give_up
from sssd.hf.interface import give_up_kernels, model_pass
from sssd.hf.static import WIDTHS, Answer, StaticCache, StaticStore, bucket_of, give_back, lease
from sssd.hf.verify import AttentionMasks, TreeCache

STATIC_DEVICES = {"cuda"}
"""Types of devices where launching kernels one by one takes longer than running them."""


def warm_up(
    model: Any,
    *,
    batch: int = 1,
    length: int = 4096,
    widths: Iterable[int] = WIDTHS,
    sample: bool = False,
) -> int:
    """Records the passes of a model on a GPU ahead; else calls do so when a shape has come up three times.

    Args:
        model: A model that ``sssd.hf.generate`` can verify.
        batch: Most rows that calls will have. All numbers below are recorded too: powers of two.
        length: Most tokens of prompt and output that they will have. Buffers of this size are kept.
        widths: Tokens of each row, of 1, 2, 4, ... 64.
        sample: Whether the calls will sample or use logits processors; their passes are other ones.

    Returns:
        How many passes were recorded: 0 where none are, on a CPU say.

    Raises:
        UnsupportedModelError: The model cannot be verified.
        InvalidArgumentError: ``batch`` or ``length`` is not positive, or a width is none of those.
    """
    check_model(model)
    widths = tuple(widths)
    if batch < 1 or length < 1:
        raise InvalidArgumentError(f"batch and length must be at least 1, got {batch} and {length}")
    if set(widths) - set(WIDTHS):
        raise InvalidArgumentError(f"widths must be of {', '.join(map(str, WIDTHS))}, got {list(widths)}")
    count = 0
    with torch.inference_mode(), Passes(model, batch, None, length + WIDTHS[-1]) as passes:
        rows = bucket_of(batch)
        while rows:
            count += passes.warm_up(widths, accept=not sample, rows=rows)
            rows //= 2
    return count


class Passes:
    """Runs verify passes: on fixed buffers, else on the fast path, else by the model's own forward.

    On fixed buffers the fast path runs, or the model's own modules with a kernel for their attention.

    A context manager, at whose end the fixed buffers are given back.

    Args:
        model: A model that :func:`sssd.hf.contract.check_model` lets pass.
        batch: Number of rows.
        padding: Bool [B, prompt length], False at padding; None without padding.
        room: Tokens of each row that the cache should hold.
        fast_path: Whether to look for a fast path.
        cache: What to hold the states in, in place of a cache of these rows; then there are no fixed buffers.

    Attributes:
        cache: The states of the batch.
        block: What the last :meth:`fill` filled.
        overlaps: Whether the device works on a pass by itself, once it is launched.
        settled: Whether the last pass ran as later ones of its shape will, so that its time tells theirs.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        padding: Any = None,
        room: int = 0,
        fast_path: bool = True,
        cache: TreeCache | None = None,
    ) -> None:
        self.model = model
        self.masks = AttentionMasks(model)
        self.fast: FastPass | None = fast_pass(model) if fast_path else None
        self.overlaps = model.device.type in STATIC_DEVICES
        self.store: StaticStore | None = None
        self.settled = True
        self.left = False
        # layers of the known families are alike
        alike = 0 if self.fast is None else len(self.fast.layers)
        self.cache = TreeCache(batch, padding, room, alike) if cache is None else cache
        self.cache.alike = alike
        self.block = self._own_block = PassBlock()
        if cache is not None:
            return
        runner: Any = self.fast
        if fast_path and runner is None and self.overlaps:
            runner = model_pass(model)
        if runner is not None and self.overlaps:
            try:
                self.store = lease(runner, batch, room)
                self.cache = StaticCache(self.store, batch, padding)
            except Exception as error:  # too little memory, say
                self.close()
                self.left = True
                (give_up_kernels if self.fast is None else give_up)(model, f"fixed buffers failed ({error})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the fixed buffers back."""
        if self.store is not None:
            give_back(self.store)
            self.store = None

    def width(self, nodes: int) -> int:
        """Tokens of each row in a pass over trees of at most so many nodes."""
        if self.store is None or self.left:
            return nodes + 1
        return next((width for width in WIDTHS if width > nodes), nodes + 1)

    def warm_up(self, widths: Iterable[int] = WIDTHS, accept: bool = True, rows: int | None = None) -> int:
        """Records passes of these widths ahead, of all rows or of fewer; see :meth:`StaticStore.warm_up`."""
        if self.store is None or self.left:
            return 0
        known = [width for width in widths if width in WIDTHS]
        return self.store.warm_up(rows or len(self.cache.lengths), known, accept)

    def fill(
        self, trees: DraftBatch | None, roots: ArrayLike, positions: ArrayLike, width: int | None = None
    ) -> PassBlock:
        """Writes the entries of the next pass.

        Args:
            trees: Drafts of the B rows of the cache, None where nothing is drafted.
            roots: Last token of each row.
            positions: Its position id.
            width: Entries of each row, a :meth:`width`; by default that of the largest tree.
        """
        if width is None:
            width = self.width(0 if trees is None else int(np.diff(trees.offsets).max(initial=0)))
        if self.store is not None and width in WIDTHS:
            self.block = self.store.block
            self.store.fill(trees, roots, positions, width)
        else:
            self.block = self._own_block
            self.block.fill(trees, roots, positions, width=width, mask=True, links=True)
        return self.block

    def launch(self, accept: bool = False) -> Callable[[], tuple[Any, Answer | None]]:
        """Begins a pass over what :meth:`fill` has written; the function that it returns ends it.

        Where :attr:`overlaps` holds, the device is at work in between. The states of the block are in the
        cache then, but its lengths stay as they are; its ``commit`` says what to keep.

        Args:
            accept: Whether ``commit`` will be told to keep what the most probable tokens accept.

        Returns:
            A function that gives logits [B, T, vocabulary] after each entry, valid until the next pass, and
            with ``accept`` the answer, where the device gives it by itself.
        """
        cache, width = self.cache, self.block.ids.shape[1]
        if (
            self.store is not None
            and not self.left
            and isinstance(cache, StaticCache)
            and self.block is self.store.block
            and cache.has_room(width)
        ):
            try:
                finish = self.store.launch(cache.lengths, accept)
            except Exception as error:
                # the lengths are as they were: what the pass has written lies in free slots
                self._leave_fast_path(error)
            else:
                cache.moved = accept
                self.settled = self.store.settled
                return finish
        self.settled = True
        if not self.overlaps:
            return lambda: (self._forward(), None)
        logits = self._forward()
        return lambda: (logits, None)

    def _forward(self) -> Any:
        """A pass over buffers that grow, by the fast path or by the model itself."""
        device, cache, block = self.model.device, self.cache, self.block
        ids, depths, positions = torch.from_numpy(np.stack([block.ids, block.depths, block.positions])).to(
            device
        )
        tree = torch.from_numpy(block.mask).to(device)
        mask = self.masks.build(cache, tree, depths)
        if self.fast is not None:
            try:
                return self.fast(ids, positions, cache, mask)
            except Exception as error:
                self._leave_fast_path(error)
        return forward(self.model, ids, mask, positions, cache)

    def _leave_fast_path(self, error: Exception) -> None:
        """Goes on by the model's own forward; the cache stays where it is, in the fixed buffers as well."""
        if self.fast is None:
            give_up_kernels(self.model, f"a pass failed ({error})")
        else:
            give_up(self.model, f"a pass failed ({error})")
        self.fast, self.left = None, True
