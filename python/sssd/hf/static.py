"""Verify passes without allocation: fixed buffers, a few fixed shapes, CUDA graphs of each.

Keys and values lie in buffers of fixed capacity, the pass's inputs in tensors that are written in place, and
the rows' lengths on the device. So a pass of one width and number of rows is always the same sequence of
kernels, which a CUDA graph replays with one launch. The pass ends on the device: it chooses the target's
tokens, walks the trees, moves the accepted path's keys and values together, and hands the host one small
tensor.

A shape that comes up for the first time runs kernel by kernel, and is recorded when it has come up again:
what is rare is not worth a recording, which takes as long as some passes. :meth:`StaticStore.warm_up`
records ahead.

On a CPU the same code runs without graphs; tests do so.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sssd._core import TOP_K, DraftBatch, PassBlock
from sssd.hf.kernels import on
from sssd.hf.kernels.tree import Tree
from sssd.hf.verify import AttentionMasks, TreeCache

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of each row that passes are prepared for."""
_SMALLEST_SPAN = 256
_KEPT_STORES = 2
"""Idle stores of a model: calls of two shapes may take turns."""
_UNRECORDED_USES = 2
"""Passes of a shape that run kernel by kernel before it is recorded."""
_lock = Lock()
_recording = Lock()
"""One recording at a time; of other threads it bears everything but another one."""

_logger = logging.getLogger(__name__)


def bucket_of(rows: int) -> int:
    """The number of rows that a pass over so many has: the next power of two."""
    return 1 << (rows - 1).bit_length()


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


class Shape(NamedTuple):
    """What passes have in common that one recording serves.

    Attributes:
        batch: Rows, a :func:`bucket_of`; the last ones may be dead.
        width: Tokens of each row.
        span: Slots that are looked at; 0 where kernels read the lengths themselves.
        accept: Whether the pass ends with the walk.
    """

    batch: int
    width: int
    span: int
    accept: bool


class StaticStore:
    """Fixed buffers of one batch size and capacity, and the passes recorded on them.

    Args:
        fast: What runs the model over them: a :class:`sssd.hf.fast.FastPass` or a
            :class:`sssd.hf.interface.ModelPass`.
        batch: Most rows; there is room for its :func:`bucket_of`.
        capacity: Slots of each row, a multiple of 16.
        record: Makes of a function one that repeats what it did, given the same tensors; by default a CUDA
            graph on a CUDA device, and elsewhere nothing is recorded.

    Attributes:
        block: What the next pass verifies, in memory from which a device copies by itself.
        settled: Whether the last pass ran as all later ones of its shape will, so that its time tells theirs.
    """

    def __init__(
        self,
        fast: Any,
        batch: int,
        capacity: int,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        batch = bucket_of(batch)
        self.fast, self.batch, self.capacity = fast, batch, capacity
        self.busy = False
        self.settled = True
        self.masks = AttentionMasks(fast.model)
        device = fast.device
        shape = (batch, fast.kv_heads, capacity, fast.head_dim)
        pin = device.type == "cuda"
        most = WIDTHS[-1]
        # whoever made them, later calls write to them, which inference tensors would not allow
        with torch.inference_mode(False), on(device):
            self.stack = torch.zeros(2 * fast.layer_count, *shape, dtype=fast.dtype, device=device)
            self.buffers = [list(self.stack[i : i + 2]) for i in range(0, len(self.stack), 2)]
            # ids, depths, positions, parents and ancestors of every entry, end to end; and each row's length,
            # then how much of it is padding
            self._host = torch.zeros(6, batch * most, dtype=torch.long, pin_memory=pin)
            self._device = self._host.to(device)
            self._answer = torch.zeros(batch, most, 1 + 2 * TOP_K, dtype=torch.int32, device=device)
            self._keep = torch.ones(batch, capacity, dtype=torch.bool, device=device)
            # of all shapes: a replay overwrites what the last one gave
            self._logits = torch.empty(batch * most, fast.vocab_size, dtype=fast.dtype, device=device)
            self._copied = torch.cuda.Event() if pin else None
            if record is None and device.type == "cuda":
                record = Recorder(device)
        ids, depths, positions, parents, ancestors, _ = self._host.numpy()
        self.block = PassBlock(
            ids=ids, depths=depths, positions=positions, parents=parents, ancestors=ancestors.view(np.uint64)
        )
        self._record = record
        self._uses: Counter[Shape] = Counter()
        self._recorded: dict[Shape, Callable[[], None]] = {}
        self.vocab_size = fast.vocab_size
        self.set_padding(None)

    def set_padding(self, padding: Any) -> None:
        """Takes over what is padding: bool [B, prompt length], False there, or None."""
        self._keep.fill_(True)
        self._starts = torch.zeros(self.batch, dtype=torch.long)
        self._by_kernels = bool(self.fast.by_kernels)
        if padding is not None:
            rows, width = padding.shape
            self._keep[:rows, :width] = padding
            counts = (~padding).sum(1)
            # kernels know of padding in front only
            self._by_kernels &= bool((padding.long().cummax(1).values == padding).all())
            self._starts[:rows] = counts.cpu()

    def begin(self, lengths: Any, width: int, span: int) -> None:
        """Says behind how many slots, int64 [B], :meth:`update` writes, and how many slots it returns."""
        self._rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        self._slots = lengths[:, None] + torch.arange(width, device=lengths.device)
        self._span = span

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
        live, width = self.block.ids.shape
        batch = bucket_of(live)
        span = 0 if self._by_kernels else span_of(max(lengths) + width, self.capacity)
        shape = Shape(batch, width, span, accept)
        if batch > live:
            for column, value in enumerate((0, 0, 0, -1, 1)):
                # dead rows: roots that see themselves
                self._host[column, live * width : batch * width] = value
            self._host[-1, : 2 * batch] = 0
        self._host[-1, :live] = torch.tensor(lengths)
        self._host[-1, batch : batch + live] = self._starts[:live]
        with on(self.fast.device):
            self._device.copy_(self._host, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._run(shape)
        logits = self._logits[: batch * width].view(batch, width, -1)[:live]
        return lambda: (logits, self._read(live, width) if accept else None)

    def warm_up(self, rows: int, widths: Iterable[int], accept: bool) -> int:
        """Records the passes over so many rows and these widths that are not recorded yet.

        To be called while the last ``max(widths)`` slots of each row are free.

        Args:
            rows: Rows of the passes.
            widths: Of :data:`WIDTHS`.
            accept: As in :meth:`launch`.

        Returns:
            How many were recorded.
        """
        before = len(self._recorded)
        batch, span = bucket_of(rows), 0 if self._by_kernels else self.capacity
        for width in widths:
            shape = Shape(batch, width, span, accept)
            if self._record is None or shape in self._recorded or width > self.capacity:
                continue
            self._device.zero_()
            self._device[3, : batch * width] = -1
            self._device[4, : batch * width] = 1
            self._device[-1, :batch] = self.capacity - width
            self._uses[shape] = _UNRECORDED_USES
            with on(self.fast.device):
                self._run(shape)
        return len(self._recorded) - before

    def _run(self, shape: Shape) -> None:
        """A pass: as a replay, or kernel by kernel for as long as its shape is not recorded."""
        run = self._recorded.get(shape, partial(self._pass, shape))
        self.settled = self._record is None or shape in self._recorded
        if not self.settled:
            self._uses[shape] += 1
            if self._record is not None and self._uses[shape] > _UNRECORDED_USES:
                try:
                    with _recording:
                        run = self._record(run)
                except Exception as error:
                    name = type(self.fast.model).__name__
                    _logger.info("%s: %s runs kernel by kernel, recording failed: %s", name, shape, error)
                self._recorded[shape] = run
        run()

    def _pass(self, shape: Shape) -> None:
        batch, width, span, accept = shape
        device = self.fast.device
        entries = self._device[:-1, : batch * width].view(-1, batch, width)
        ids, depths, positions, parents, ancestors = entries
        lengths, starts = self._device[-1, : 2 * batch].view(2, batch)
        self.begin(lengths, width, span or self.capacity)
        out = self._logits[: batch * width]
        if not span:
            logits = self.fast.tree_pass(ids, positions, Tree(ancestors, depths, lengths, starts), self, out)
        else:
            tree_mask = (ancestors[..., None] >> torch.arange(width, device=device) & 1).bool()
            mask = self.masks.assemble(span, lengths, tree_mask, depths, self._keep[:batch, :span])
            out.copy_(self.fast(ids, positions, self, mask).flatten(0, 1))
            logits = out.view(batch, width, -1)
        if accept and not span:
            self._answer_by_kernels(ids, logits, parents, ancestors, lengths)
        elif accept:
            targets = logits.argmax(-1)
            self._move(ids, targets, parents, tree_mask)
            self._tell(batch, width, logits, targets)

    def _answer_by_kernels(self, ids: Any, logits: Any, parents: Any, ancestors: Any, lengths: Any) -> None:
        from sssd.hf.kernels.layers import accept_and_move, tell

        batch, width = ids.shape
        if self.vocab_size < TOP_K:
            targets = logits.argmax(-1)
            self._tell(batch, width, logits, targets)
        else:
            targets = tell(logits, self._answer[:batch, :width], TOP_K)
        accept_and_move(ids, targets, parents, ancestors, lengths, self.stack)

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
        super().__init__(batch_size, padding, store.capacity, store.fast.layer_count)
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
    """Records functions as CUDA graphs that share memory: a replay overwrites what the last one gave.

    Args:
        device: Of the graphs, whichever is the current one.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs ``function`` once, records its kernels, and returns their replay."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on allocating
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        return graph.replay  # type: ignore[no-any-return]


def lease(fast: Any, batch: int, capacity: int) -> StaticStore:
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
