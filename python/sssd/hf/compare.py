"""A way to run passes against the model's own forward, on a small tree behind a short text."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.functional import pad

from sssd.hf.contract import cache_argument, forward
from sssd.hf.kernels.tree import Tree
from sssd.hf.verify import AttentionMasks, TreeCache

_TEXT = 11
_PARENTS = [-1, 0, 1, 2, 3, 2, 5, 6, 4, 7, 9]
"""Two branches below the third token."""


class NotKnown(Exception):
    """A way to run passes does not fit the model; the message says why."""


def compare(
    model: Any, run: Callable[[Any, Any, TreeCache, Any, Any], Any], counts: Iterable[int] = (1, 11)
) -> list[tuple[Any, Any]]:
    """Logits of a way to run passes and of the model's own forward, float32 [1, T, vocabulary].

    Args:
        model: A model that takes tree masks.
        run: Gives logits of token ids and positions [1, T], the cached states of the text before, a tree mask
            [1, T, T] and depths [1, T].
        counts: Tokens of each pass, the first ones of the tree.
    """
    device = model.device
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(1, _TEXT + 1, device=device)[None] * 7919 % vocab_size
    size = len(_PARENTS)
    tree = torch.zeros(1, size, size, dtype=torch.bool, device=device)
    depths = [0] * size
    for i, parent in enumerate(_PARENTS):
        if parent >= 0:
            tree[0, i] = tree[0, parent]
            depths[i] = depths[parent] + 1
        tree[0, i, i] = True
    positions = torch.tensor([depths], device=device)
    masks, name = AttentionMasks(model), cache_argument(model)
    own, mine = TreeCache(1), TreeCache(1)
    pairs = []
    with torch.inference_mode():
        for cache in (own, mine):
            text = torch.arange(_TEXT, device=device)[None]
            model(input_ids=tokens, use_cache=True, position_ids=text, **{name: cache})
            cache.lengths = [_TEXT]
        for count in counts:
            ids, places = tokens[:, :count], positions[:, :count] + _TEXT
            shape = tree[:, :count, :count], positions[:, :count]
            theirs = forward(model, ids, masks.build(own, *shape), places, own)
            ours = run(ids, places, mine, *shape)
            pairs.append((ours.float(), theirs.float()))
    return pairs


def check_choices(ours: Any, theirs: Any, dtype: Any) -> None:
    """Checks logits that were computed in a type: equal choices, but for those as good within rounding.

    Raises:
        NotKnown: They differ by more, or in float32 the logits do.
    """
    error = distance(ours, theirs)
    if dtype == torch.float32 and not error < 1e-4:
        raise NotKnown(f"its logits differ from the model's own by {error:.1e}")
    chosen = theirs.gather(-1, ours.argmax(-1, keepdim=True))
    best, scale = theirs.amax(-1, keepdim=True), theirs.abs().amax(-1, keepdim=True)
    if not bool((best - chosen <= 8 * torch.finfo(dtype).eps * scale).all()):
        raise NotKnown("it chooses other tokens than its own forward")


def distance(ours: Any, theirs: Any) -> float:
    """The relative difference of two tensors."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))


def as_kernels_read(cache: TreeCache, tree_mask: Any, depths: Any) -> tuple[Tree, Any]:
    """The tree of a pass over at most 63 tokens of one row, and keys and values of all layers.

    These are [parts, 1, key heads, slots, dim], with as many free slots as there are tokens.

    Raises:
        NotKnown: The layers' keys and values are not of one shape.
    """
    count = depths.shape[1]
    ancestors = (tree_mask * (1 << torch.arange(count, device=depths.device))).sum(-1)
    lengths = torch.tensor(cache.lengths, device=depths.device)
    held = [buffer[:, :, : cache.lengths[0]] for layer in cache.layers for buffer in layer.buffers]
    alike = {(part.shape, part.dtype, part.device) for part in held}
    if len(alike) != 1 or len(held) != 2 * len(cache.layers):
        raise NotKnown("its layers' keys and values are not all of one shape")
    return Tree(ancestors, depths, lengths, torch.zeros_like(lengths)), pad(
        torch.stack(held), (0, 0, 0, count)
    )
