"""Tree verification for decoder-only transformers: mask and key-value cache.

One forward pass over ``[last token] + nodes`` gives the target model's logits after every node of a draft
tree, because each node attends to the committed prefix and to its own ancestors only (tree attention,
SpecInfer, arXiv 2305.09781). The accepted path is then kept in the cache, wherever it lay in the tree. See
``docs/verification.md``.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicLayer

_KV_ALIGNMENT = 16
"""CUDA kernels copy a mask of unaligned rows at every layer, so rows are allocated in this multiple."""


TREE = "sssd_tree|"
"""What the attention of a model is called while passes run by the tree kernel, before its own name."""


def implementation_of(config: Any) -> Any:
    """The attention that a model was given, ``"sdpa"`` or ``"eager"`` say."""
    name = config._attn_implementation
    return name.removeprefix(TREE) if isinstance(name, str) else name


class _TreeLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in a growing buffer, each row of the batch packed to the left."""

    def __init__(self, cache: "TreeCache") -> None:
        super().__init__()
        self.cache = cache
        self.buffers: list[Any] = []

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.buffers:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.buffers = self.cache.make_buffers(self, key_states, value_states)
            self.is_initialized = True
        end = max(self.cache.lengths) + key_states.shape[2]
        self.reserve(end)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            self.cache.write(buffer, states)
        self._expose(end)
        return self.keys, self.values

    def reserve(self, end: int) -> None:
        """Makes room for ``end`` tokens of each row, at least as many as the cache was made for."""
        if end <= self.buffers[0].shape[2]:
            return
        if self.cache.stack is None:
            self.buffers = [_grown(buffer, end, self.cache.capacity) for buffer in self.buffers]
        else:
            self.cache.restack(_grown(self.cache.stack, end, self.cache.capacity))

    def _expose(self, end: int) -> None:
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return max(self.cache.lengths)


class TreeCache(Cache):  # type: ignore[misc]
    """Key-value cache whose rows advance at different speeds and from which a tree's path can be picked.

    Slot ``s`` of row ``b`` holds the state of that row's token ``s`` (padding of the prompt included), so
    there are no holes; slots from ``lengths[b]`` on are free. Sliding-window layers keep everything too: the
    window is in the mask, and a rejected draft must not push a token out. Buffers have room to grow, so a
    step copies its own tokens only, where ``DynamicCache`` copies the whole context.

    Args:
        batch_size: Number of rows.
        padding: Bool [batch_size, prompt length], False at padding; None without padding.
        capacity: Tokens of each row to make room for at once; beyond, the buffers grow.
        alike: Number of layers, if all are known to have keys and values of one shape on one device: these
            lie in one tensor then, and are moved by one operation instead of two a layer.

    Attributes:
        stack: That tensor, [2 * alike, B, heads, slots, dim], once there is one.
    """

    def __init__(self, batch_size: int, padding: Any = None, capacity: int = 0, alike: int = 0) -> None:
        super().__init__(layer_class_to_replicate=partial(_TreeLayer, self))
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self.padding = padding
        self.alike = alike
        self.stack: Any = None

    def make_buffers(self, layer: Any, *states: Any) -> list[Any]:
        """Buffers for a layer's keys and values, [B, heads, slots, dim] each; they grow when needed."""
        if not self.alike:
            return [part.new_empty(*part.shape[:2], 0, part.shape[3]) for part in states]
        if self.stack is None:
            batch, heads, _, dim = states[0].shape
            self.stack = states[0].new_empty(2 * self.alike, batch, heads, 0, dim)
        index = next(i for i, known in enumerate(self.layers) if known is layer)
        return list(self.stack[2 * index : 2 * index + 2])

    def restack(self, stack: Any) -> None:
        """Lets the layers' buffers be those of another tensor."""
        self.stack = stack
        for index, layer in enumerate(self.layers):
            if layer.buffers:
                layer.buffers = list(stack[2 * index : 2 * index + 2])

    def write(self, buffer: Any, states: Any) -> None:
        """Copies ``states`` [B, heads, T, dim] to the first T free slots of every row."""
        count = states.shape[2]
        start = self.lengths[0]
        if all(length == start for length in self.lengths):
            buffer[:, :, start : start + count] = states
        else:
            starts = torch.tensor(self.lengths, device=states.device)[:, None]
            slots = starts + torch.arange(count, device=states.device)
            rows = torch.arange(len(starts), device=states.device)[:, None]
            buffer[rows, :, slots] = states.transpose(1, 2)

    def commit(self, kept: NDArray[np.int64], offsets: NDArray[Any]) -> None:
        """Keeps, of the block written last, the given entries per row and frees the rest.

        Args:
            kept: Entries of all rows one after another, int64 [M], ascending in each row: 0 for the root,
                1 + i for node i.
            offsets: Where each row starts in them, integers [B + 1].
        """
        counts = offsets[1:] - offsets[:-1]
        # roots stay where they are
        if len(kept) > len(counts):
            places = np.arange(len(kept)) - np.repeat(offsets[:-1], counts)
            moved = kept != places
            if moved.any():
                starts = np.repeat(np.array(self.lengths), counts)[moved]
                rows = np.repeat(np.arange(len(counts)), counts)[moved]
                self._move(torch.from_numpy(np.stack([rows, starts + places[moved], starts + kept[moved]])))
        self.lengths = [length + count for length, count in zip(self.lengths, counts.tolist(), strict=True)]

    def _move(self, moves: Any) -> None:
        """Copies slots of every layer: int64 [3, M] are rows, where to and where from.

        All are read before any is written.
        """
        if self.stack is not None:
            rows, to, origin = moves.to(self.stack.device)
            self.stack[:, rows, :, to] = self.stack[:, rows, :, origin]
            return
        on_device: dict[Any, Any] = {}
        for layer in self.layers:
            if not layer.buffers:  # it shares those of another
                continue
            if layer.device not in on_device:
                on_device[layer.device] = moves.to(layer.device)
            rows, to, origin = on_device[layer.device]
            for buffer in layer.buffers:
                buffer[rows, :, to] = buffer[rows, :, origin]

    def select(self, rows: list[int]) -> None:
        """Keeps only the given rows of the batch, in ascending order."""
        self.lengths = [self.lengths[row] for row in rows]
        if self.padding is not None:
            self.padding = self.padding[rows]
        if self.stack is not None:
            # in place, without a copy of the whole in between
            for place, (row, length) in enumerate(zip(rows, self.lengths, strict=True)):
                if place != row:
                    self.stack[:, place, :, :length] = self.stack[:, row, :, :length]
            self.restack(self.stack[:, : len(rows)])
            return
        for layer in self.layers:
            layer.buffers = [buffer[rows] for buffer in layer.buffers]

    def load(self, cache: Any) -> None:
        """Starts from the states of a user's cache, which keeps every state."""
        for index, layer in enumerate(cache.layers):
            if layer.get_seq_length():
                self.update(layer.keys, layer.values, index)
        self.lengths = [cache.get_seq_length()] * len(self.lengths)

    def store(self, cache: Any) -> Any:
        """Writes the committed states of a one-row cache to ``cache``, a ``DynamicCache``, and returns it."""
        for index, layer in enumerate(self.layers):
            states = [buffer[:, :, : self.lengths[0]].clone() for buffer in layer.buffers]
            if not states:
                continue
            if index < len(cache.layers):
                held = cache.layers[index]
                held.lazy_initialization(*states)
                held.keys, held.values = states
            else:
                cache.update(*states, index)
        return cache


def _grown(buffer: Any, needed: int, capacity: int) -> Any:
    *outer, size, dim = buffer.shape
    room = capacity if needed <= capacity else max(needed + 64, size * 3 // 2)
    larger = buffer.new_zeros(*outer, room, dim)
    larger[..., :size, :] = buffer
    return larger


class AttentionMasks:
    """Builds the 4D masks of a verify pass in the form that the model takes.

    Args:
        model: A model that :func:`sssd.hf.contract.check_model` lets pass.

    Attributes:
        windows: The sliding window of all layers (None: full attention), or of each layer type where they
            differ.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self.windows = windows_of(config)
        known = self.windows.values() if isinstance(self.windows, dict) else [self.windows]
        self._narrowest = min((window for window in known if window is not None), default=1 << 62)
        self._additive = implementation_of(config) == "eager"
        self._dtype = model.dtype

    def build(self, cache: TreeCache, tree_mask: Any, depths: Any) -> Any:
        """Returns the mask of ``[root] + nodes`` against the cached prefix and against one another.

        Args:
            cache: The cache before the pass.
            tree_mask: Bool [B, T, T], True where query i may attend to entry j of the block.
            depths: Int64 [B, T], 0 for the root.

        Returns:
            A mask [B, 1, T, S + T], S the longest cached row: bool (True = attend) for sdpa, additive for
            eager; a dict of such masks by layer type for models that mix full and sliding attention; None
            for one token that attends to everything.
        """
        count = depths.shape[1]
        lengths = cache.lengths
        end = max(lengths) + count
        # some models leave the window to their cache, and ours keeps everything
        if count == 1 and cache.padding is None and len(set(lengths)) == 1 and end <= self._narrowest:
            return None
        # rows of a mask are allocated in multiples, and only then cut
        aligned = -(-end // _KV_ALIGNMENT) * _KV_ALIGNMENT
        if end <= self._narrowest and cache.padding is None and len(set(lengths)) == 1:
            # everything that is cached, and the block behind it
            mask = tree_mask.new_ones(len(lengths), 1, count, aligned)
            mask[:, 0, :, lengths[0] : end] = tree_mask
            mask = self._in_form(mask)[..., :end]
            return dict.fromkeys(self.windows, mask) if isinstance(self.windows, dict) else mask
        starts = torch.tensor(lengths, device=depths.device)
        return self.assemble(aligned, starts, tree_mask, depths, cache.padding, end)

    def assemble(
        self, span: int, starts: Any, tree_mask: Any, depths: Any, padding: Any = None, end: int | None = None
    ) -> Any:
        """The mask over the first ``span`` slots, cut to ``end``, from tensors only: fit for a CUDA graph.

        Args:
            span: Slots to look at, a multiple of 16.
            starts: Int64 [B], tokens of each row in the cache.
            tree_mask: As in :meth:`build`, like the following.
            depths: See above.
            padding: Bool [B, prompt length], False at padding, or None.
            end: Slots of the result; all of ``span`` if left out.
        """
        count = depths.shape[1]
        slots = torch.arange(span, device=depths.device)
        starts = starts[:, None]
        offsets = slots - starts
        in_prefix = offsets < 0
        if padding is not None:
            width = padding.shape[1]
            in_prefix[:, :width] &= padding
        in_block = (offsets >= 0) & (offsets < count)
        offsets = offsets.clamp(0, count - 1)
        allowed = tree_mask.gather(2, offsets[:, None].expand(-1, count, -1))
        allowed = (allowed & in_block[:, None]) | in_prefix[:, None]

        def finish(window: int | None) -> Any:
            mask = allowed
            if window is not None:
                # The window counts positions: siblings share one, although each has a slot of its own.
                keys = torch.where(in_block, starts + depths.gather(1, offsets), slots)
                mask = mask & ((starts + depths)[:, :, None] - keys[:, None] < window)
            return self._in_form(mask)[:, None, :, :end]

        if isinstance(self.windows, dict):
            return {kind: finish(window) for kind, window in self.windows.items()}
        return finish(self.windows)

    def _in_form(self, mask: Any) -> Any:
        """A bool mask in the form that the model takes."""
        if not self._additive:
            return mask
        return torch.zeros_like(mask, dtype=self._dtype).masked_fill_(~mask, torch.finfo(self._dtype).min)


def windows_of(config: Any) -> dict[str, int | None] | int | None:
    """The sliding window of all layers (None: full attention), or of each layer type where they differ."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}
    return None if kinds == {"full_attention"} else window
