"""Verify passes without allocation: fixed buffers, a few fixed widths, CUDA graphs of each.

Keys and values lie in buffers of fixed capacity, the pass's inputs in tensors that are written in place, and
the rows' lengths on the device. So a pass of one width is always the same sequence of kernels, which a CUDA
graph replays with one launch. The pass ends on the device: it chooses the target's tokens, walks the trees,
moves the accepted path's keys and values together, and hands the host one small tensor.

On a CPU the same code runs without graphs; tests do so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sssd._core import TOP_K, DraftBatch, PassBlock
from sssd.hf.fast import FastPass
from sssd.hf.verify import AttentionMasks, TreeCache

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of each row that passes are prepared for."""
_SMALLEST_SPAN = 256
_KEPT_STORES = 2
"""Idle stores of a model: calls of two shapes may take turns."""
_lock = Lock()


def span_of(slots: int, capacity: int) -> int:
    """The number of slots that a pass looks at when ``slots`` are in use: 256, 384, 512, 768, ..."""
    span = _SMALLEST_SPAN
    while span < slots:
        span = span * 3 // 2 if span & (span - 1) == 0 else span * 4 // 3
    return min(span, capacity)


@dataclass
class Answer:
    """What a pass tells the host, as numpy arrays.

    Attributes:
        targets: Int64 [B, T], the target's choice after each entry.
        topk_ids: Int64 [B, T, k], its most probable tokens.
        topk_probs: Float32 [B, T, k].
    """

    targets: NDArray[np.int64]
    topk_ids: NDArray[np.int64]
    topk_probs: NDArray[np.float32]


class StaticStore:
    """Fixed buffers of one batch size and capacity, and the passes recorded on them.

    Args:
        fast: The model's fast path.
        batch: Most rows.
        capacity: Slots of each row, a multiple of 16.
        record: Makes of a function one that repeats what it did, given the same tensors; by default a CUDA
            graph on a CUDA device and the function itself elsewhere.

    Attributes:
        block: What the next pass verifies, in memory from which a device copies by itself.
    """

    def __init__(
        self,
        fast: FastPass,
        batch: int,
        capacity: int,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self.fast, self.batch, self.capacity = fast, batch, capacity
        self.busy = False
        self.masks = AttentionMasks(fast.model)
        device = fast.device
        shape = (batch, fast.kv_heads, capacity, fast.head_dim)
        pin = device.type == "cuda"
        most = WIDTHS[-1]
        # whoever made them, later calls write to them, which inference tensors would not allow
        with torch.inference_mode(False):
            self.stack = torch.zeros(2 * len(fast.layers), *shape, dtype=fast.dtype, device=device)
            self.buffers = [list(self.stack[i : i + 2]) for i in range(0, len(self.stack), 2)]
            # ids, depths, positions, parents and ancestors of every entry, end to end; and each row's length
            self._host = torch.zeros(6, batch * most, dtype=torch.long, pin_memory=pin)
            self._device = self._host.to(device)
            self._answer = torch.zeros(batch, most, 1 + 2 * TOP_K, dtype=torch.int32, device=device)
            self._keep = torch.ones(batch, capacity, dtype=torch.bool, device=device)
        ids, depths, positions, parents, ancestors, _ = self._host.numpy()
        self.block = PassBlock(
            ids=ids, depths=depths, positions=positions, parents=parents, ancestors=ancestors.view(np.uint64)
        )
        self._copied = torch.cuda.Event() if pin else None
        self._logits: dict[tuple[Any, ...], Any] = {}
        self._recorded: dict[tuple[Any, ...], Callable[[], None]] = {}
        self._record = record or (Recorder() if device.type == "cuda" else lambda function: function)
        self.vocab_size = fast.embedding.num_embeddings

    def set_padding(self, padding: Any) -> None:
        """Takes over what is padding: bool [B, prompt length], False there, or None."""
        self._keep.fill_(True)
        if padding is not None:
            rows, width = padding.shape
            self._keep[:rows, :width] = padding

    def update(self, keys: Any, values: Any, layer: int) -> tuple[Any, Any]:
        """Writes the running pass's states [B, heads, T, dim] and returns those of the span."""
        batch = keys.shape[0]
        rows = self._rows[:batch]
        found = []
        for buffer, states in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[rows, :, self._slots] = states.transpose(1, 2)
            found.append(buffer[:batch, :, : self._span])
        return found[0], found[1]

    def fill(self, trees: DraftBatch | None, roots: ArrayLike, positions: ArrayLike, width: int) -> None:
        """Fills :attr:`block` as :meth:`sssd.hf.passes.Passes.fill` says."""
        if self._copied is not None:
            # nobody may have waited for the last pass: the caller gave up
            self._copied.synchronize()
        self.block.fill(trees, roots, positions, width=width, mask=True, links=True)

    def launch(self, lengths: list[int], accept: bool) -> Callable[[], tuple[Any, Answer | None]]:
        """Begins a pass over the entries of :attr:`block`; the function that it returns waits for its end.

        Args:
            lengths: Slots in use of each row.
            accept: Whether to walk the trees by the target's most probable tokens and to move the accepted
                states together; else the caller commits.

        Returns:
            A function that gives logits [B, T, vocabulary], valid until the next pass, and with ``accept``
            the answer.
        """
        batch, width = self.block.ids.shape
        span = span_of(max(lengths) + width, self.capacity)
        self._host[-1, :batch] = torch.tensor(lengths)
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        key = (batch, width, span, accept)
        if key not in self._recorded:
            self._recorded[key] = self._record(lambda: self._pass(*key))
        self._recorded[key]()
        return lambda: (self._logits[key], self._read(batch, width) if accept else None)

    def _pass(self, batch: int, width: int, span: int, accept: bool) -> None:
        device = self.fast.device
        entries = self._device[:-1, : batch * width].view(-1, batch, width)
        ids, depths, positions, parents, ancestors = entries
        lengths = self._device[-1, :batch]
        tree_mask = (ancestors[..., None] >> torch.arange(width, device=device) & 1).bool()
        self._rows = torch.arange(batch, device=device)[:, None]
        self._slots = lengths[:, None] + torch.arange(width, device=device)
        self._span = span
        mask = self.masks.assemble(span, lengths, tree_mask, depths, self._keep[:batch, :span])
        logits = self.fast(ids, positions, self, mask)
        self._logits[batch, width, span, accept] = logits
        if accept:
            targets = logits.argmax(-1)
            self._move(ids, targets, parents, tree_mask)
            self._tell(batch, width, logits, targets)

    def _move(self, ids: Any, targets: Any, parents: Any, tree_mask: Any) -> None:
        """Walks the trees and moves the states of what was accepted together, behind the committed ones."""
        right = (targets.gather(1, parents.clamp(min=0)) == ids) & (parents >= 0)
        right[:, 0] = True
        # an entry is accepted if it and all its ancestors are what the target chose
        accepted = ~(tree_mask & ~right[:, None]).any(-1)
        origin = self._slots.gather(1, (~accepted).byte().argsort(dim=1, stable=True))
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[self._rows, :, self._slots] = buffer[self._rows, :, origin]

    def _tell(self, batch: int, width: int, logits: Any, targets: Any) -> None:
        values, ids = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
        probs = (values.float() - logits.float().logsumexp(-1, keepdim=True)).exp().clamp(max=1.0)
        probs = probs / probs.sum(-1, keepdim=True).clamp(min=1.0)
        answer = self._answer[:batch, :width]
        answer[..., 0] = targets
        answer[..., 1 : 1 + ids.shape[-1]] = ids
        answer[..., 1 + TOP_K : 1 + TOP_K + ids.shape[-1]] = probs.contiguous().view(torch.int32)

    def _read(self, batch: int, width: int) -> Answer:
        answer = self._answer[:batch, :width].cpu().numpy()
        k = min(TOP_K, self.vocab_size)
        return Answer(
            answer[..., 0].astype(np.int64),
            answer[..., 1 : 1 + k].astype(np.int64),
            np.ascontiguousarray(answer[..., 1 + TOP_K : 1 + TOP_K + k]).view(np.float32),
        )


class StaticCache(TreeCache):
    """A tree cache in the fixed buffers of a store. Rows that leave make room at the front."""

    def __init__(self, store: StaticStore, batch_size: int, padding: Any = None) -> None:
        super().__init__(batch_size, padding, store.capacity, len(store.fast.layers))
        self.fixed, self.stack = store, store.stack[:, :batch_size]
        self.moved = False
        store.set_padding(padding)

    def has_room(self, width: int) -> bool:
        """Whether the fixed buffers hold so many more tokens of each row; longer texts lie elsewhere."""
        if max(self.lengths) + width > self.capacity:
            return False
        return bool(self.stack.data_ptr() == self.fixed.stack.data_ptr())

    def _move(self, moves: Any) -> None:
        """As in :class:`TreeCache`, unless the pass has moved the states itself."""
        if not self.moved:
            super()._move(moves)

    def commit(self, kept: NDArray[np.int64], offsets: NDArray[Any]) -> None:
        """As in :class:`TreeCache`; after a pass that has moved the states itself only the lengths change."""
        super().commit(kept, offsets)
        self.moved = False

    def select(self, rows: list[int]) -> None:
        """As in :class:`TreeCache`: at the front of the fixed buffers."""
        super().select(rows)
        if self.padding is not None:
            self.fixed.set_padding(self.padding)


class Recorder:
    """Records functions as CUDA graphs that share memory: a replay overwrites what the last one gave."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs ``function`` once, records its kernels, and returns their replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay  # type: ignore[no-any-return]


def lease(fast: FastPass, batch: int, capacity: int) -> StaticStore:
    """A store of at least this size that nobody uses, kept from earlier calls if there is one."""
    capacity = span_of(capacity, 1 << 62)
    with _lock:
        idle: list[StaticStore] = [store for store in fast.stores if not store.busy]
        for store in sorted(idle, key=lambda store: store.batch * store.capacity):
            if store.batch >= batch and store.capacity >= capacity:
                break
        else:
            for store in idle[: len(idle) - _KEPT_STORES + 1]:
                # before the new one takes its memory
                fast.stores.remove(store)
            store = StaticStore(fast, batch, capacity)
            fast.stores.append(store)
        store.busy = True
        return store


def give_back(store: StaticStore) -> None:
    """Lets the next call have a store; the one used last is kept longest."""
    with _lock:
        store.busy = False
        if store in store.fast.stores:
            store.fast.stores.remove(store)
            store.fast.stores.append(store)
