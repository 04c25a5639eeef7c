"""Verify passes of one model and cache, on the fast path where there is one."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd.hf.fast import FastPass, fast_pass
from sssd.hf.verify import AttentionMasks, TreeCache


class Passes:
    """Runs verify passes.

    Args:
        model: A model that :func:`sssd.hf.verify.check_model` lets pass.
        cache: Its states.
        fast_path: Whether to look for a fast path.
    """

    def __init__(self, model: Any, cache: TreeCache, fast_path: bool = True) -> None:
        self.model, self.cache = model, cache
        self.masks = AttentionMasks(model)
        self.fast: FastPass | None = fast_pass(model) if fast_path else None

    def run(
        self,
        ids: NDArray[np.int64],
        depths: NDArray[np.int64],
        positions: NDArray[np.int64],
        tree_mask: NDArray[np.bool_],
    ) -> Any:
        """Logits [B, T, vocabulary] after each of ``[root] + nodes``; their states are in the cache then.

        The cache's lengths stay as they are; its ``commit`` says what to keep.

        Args:
            ids: Int64 [B, T].
            depths: Int64 [B, T], 0 for the root.
            positions: Int64 [B, T].
            tree_mask: Bool [B, T, T], True where query i may attend to entry j.
        """
        device = self.model.device
        block = torch.from_numpy(np.stack([ids, depths, positions])).to(device)
        tree = torch.from_numpy(tree_mask).to(device)
        mask = self.masks.build(self.cache, tree, block[1], windows=self.fast is None)
        if self.fast is not None:
            return self.fast(block[0], block[2], self.cache, mask)
        return self.model(
            input_ids=block[0],
            attention_mask=mask,
            position_ids=block[2],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits
