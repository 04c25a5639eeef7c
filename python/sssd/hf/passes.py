"""Verify passes of one batch: its cache, and the fastest way to run the model over it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd.hf.fast import FastPass, fast_pass
from sssd.hf.static import WIDTHS, Answer, StaticCache, lease
from sssd.hf.verify import AttentionMasks, TreeCache

STATIC_DEVICES = {"cuda"}
"""Types of devices where launching kernels one by one takes longer than running them."""


class Passes:
    """Runs verify passes: on fixed buffers, else on the fast path, else by the model's own forward.

    Args:
        model: A model that :func:`sssd.hf.verify.check_model` lets pass.
        batch: Number of rows.
        padding: Bool [B, prompt length], False at padding; None without padding.
        room: Tokens of each row that the cache should hold.
        fast_path: Whether to look for a fast path.

    Attributes:
        cache: The states of the batch.
    """

    def __init__(
        self, model: Any, batch: int, padding: Any = None, room: int = 0, fast_path: bool = True
    ) -> None:
        self.model = model
        self.masks = AttentionMasks(model)
        self.fast: FastPass | None = fast_pass(model) if fast_path else None
        self.store = None
        if self.fast is not None and model.device.type in STATIC_DEVICES:
            self.store = lease(self.fast, batch, room)
            self.cache: TreeCache = StaticCache(self.store, batch, padding)
        else:
            self.cache = TreeCache(batch, padding, room)

    def close(self) -> None:
        """Gives the fixed buffers back."""
        if self.store is not None:
            self.store.busy = False
            self.store = None

    def width(self, nodes: int) -> int:
        """Tokens of each row in a pass over trees of at most so many nodes."""
        if self.store is None:
            return nodes + 1
        return next((width for width in WIDTHS if width > nodes), nodes + 1)

    def run(
        self,
        ids: NDArray[np.int64],
        depths: NDArray[np.int64],
        positions: NDArray[np.int64],
        tree_mask: NDArray[np.bool_],
        parents: NDArray[np.int64],
        accept: bool = False,
    ) -> tuple[Any, Answer | None]:
        """Logits [B, T, vocabulary] after each of ``[root] + nodes``; their states are in the cache then.

        The cache's lengths stay as they are; its ``commit`` says what to keep.

        Args:
            ids: Int64 [B, T], T a :meth:`width`.
            depths: Int64 [B, T], 0 for the root.
            positions: Int64 [B, T].
            tree_mask: Bool [B, T, T], True where query i may attend to entry j.
            parents: Int64 [B, T], entry of each entry's parent; -1 for the root and for what fills up rows.
            accept: Whether ``commit`` will be told to keep what the most probable tokens accept.

        Returns:
            The logits, and with ``accept`` the answer, where the device gives it by itself.
        """
        cache, width = self.cache, ids.shape[1]
        if (
            self.store is not None
            and isinstance(cache, StaticCache)
            and width in WIDTHS
            and cache.has_room(width)
        ):
            cache.moved = accept
            return self.store.run(ids, depths, positions, tree_mask, parents, cache.lengths, accept)
        device = self.model.device
        block = torch.from_numpy(np.stack([ids, depths, positions])).to(device)
        tree = torch.from_numpy(tree_mask).to(device)
        mask = self.masks.build(cache, tree, block[1], windows=self.fast is None)
        if self.fast is not None:
            return self.fast(block[0], block[2], cache, mask), None
        output = self.model(
            input_ids=block[0],
            attention_mask=mask,
            position_ids=block[2],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits, None
