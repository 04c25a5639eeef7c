"""Tree attention in Triton: the nodes of draft trees against a cached prefix and their own ancestors.

The prefix takes no mask and the tree one word a node, so nothing is read but queries, keys and values. The
context of a row is divided among a number of programs that depends on shapes alone, each of which reads the
row's length on the device: one CUDA graph serves every length. Their results are merged by log-sum-exp.

Importing this needs triton.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sssd.hf.kernels.tree import Tree

_MOST_SPLITS = 64
_LOG2E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e30)
"""The score of what may not be seen: finite, so that a difference of two is no NaN."""


class Tiles(NamedTuple):
    """How the kernel is launched."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles_of(rows: int, dim: int, item_bytes: int) -> Tiles:
    """The launch for ``rows`` queries of a key head; none spills registers, as ``test_kernels.py`` holds."""
    block = min(64, max(16, triton.next_power_of_2(rows)))
    padded = triton.next_power_of_2(dim)
    if item_bytes == 4:
        # three products of a shorter format instead of one
        block = min(block, 32 if padded <= 64 else 16)
        return Tiles(block, 32 if padded <= 128 else 16, 4 if block == 16 and padded <= 64 else 8, 2)
    if padded > 128:
        return Tiles(block, 32, 8, 2)
    return Tiles(block, 32 if block == 32 and padded == 128 else 64, 8 if block == 64 else 4, 2)


@cache
def _processors(device: Any) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def splits_of(tiles: int, processors: int) -> int:
    """How many programs share a context: enough for two on each processor; known before any length is."""
    wanted = max(1, 2 * processors // tiles)
    return int(min(_MOST_SPLITS, 1 << (wanted.bit_length() - 1)))


@triton.jit
def _load(
    start, slot, inside, MASKED: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr
):
    """Columns of keys or values [slots, SIZE], from the given one on."""
    d = FIRST + tl.arange(0, SIZE)
    at = start + (slot[:, None] * DIM + d[None, :])
    if MASKED and FIRST + SIZE <= DIM:
        tile = tl.load(at, mask=inside[:, None], other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
    elif FIRST + SIZE <= DIM:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def _queries(start, valid, FULL: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Queries [rows, PADDED]; wide ones in full precision in two halves."""
    d = tl.arange(0, PADDED // 2 if FULL and PADDED > 128 else PADDED)
    q = tl.load(start + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    q_2 = q
    if FULL and PADDED > 128:
        d += PADDED // 2
        q_2 = tl.load(start + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    return q, q_2


@triton.jit
def _tanh(x):
    tail = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    far = (1.0 - tail) / (1.0 + tail)
    square = x * x
    # 1 - tail cancels near zero
    near = x * (
        1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    )
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _add_tile(
    q, q_2, keys, values, slot, inside, seen, peak, total, mixed, scale, cap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, FULL: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: highest score, sum of exponentials and mixed values so far."""
    if FULL and PADDED > 128:
        # in halves: both parts of whole queries would not fit into the registers
        k = _load(keys, slot, inside, MASKED, DIM, 0, PADDED // 2)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        k = _load(keys, slot, inside, MASKED, DIM, PADDED // 2, PADDED // 2)
        scores = tl.dot(q_2, tl.trans(k), scores, input_precision="tf32x3")
    elif FULL:
        k = _load(keys, slot, inside, MASKED, DIM, 0, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    else:
        k = _load(keys, slot, inside, MASKED, DIM, 0, PADDED)
        scores = tl.dot(q, tl.trans(k))
    if CAPPED:  # noqa: SIM108
        scores = _tanh(scores * (scale / cap)) * (cap * _LOG2E)
    else:
        scores = scores * (scale * _LOG2E)
    if MASKED:
        scores = tl.where(seen, scores, _NOTHING)
    higher = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2(peak - higher)
    chances = tl.exp2(scores - higher[:, None])
    if MASKED:
        chances = tl.where(seen, chances, 0.0)
    v = _load(values, slot, inside, MASKED, DIM, 0, PADDED)
    total = total * shrink + tl.sum(chances, 1)
    mixed = mixed * shrink[:, None]
    if FULL:
        mixed = tl.dot(chances, v, mixed, input_precision="tf32x3")
    else:
        mixed = tl.dot(chances.to(v.dtype), v, mixed)
    return higher, total, mixed


@triton.jit
def _masked_tiles(
    q, q_2, keys, values, ancestors, depths, nodes, node, valid, depth, low, end, length, window, at_first,
    stop, peak, total, mixed, scale, cap,
    WORDS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, FULL: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """What needs a mask: prefixes of windows, the end of other ones, and the tree behind them."""
    word = tl.load(ancestors + node * WORDS, mask=valid, other=0)
    word_2 = word
    if WORDS == 2:
        word_2 = tl.load(ancestors + node * WORDS + 1, mask=valid, other=0)
    for at_slot in range(at_first, stop, KEYS):
        slot = at_slot + tl.arange(0, KEYS)
        entry = slot - length
        bits = word[:, None]
        if WORDS == 2:
            bits = tl.where((entry < 64)[None, :], bits, word_2[:, None])
        linked = (entry >= 0)[None, :] & (((bits >> (entry & 63).to(tl.int64)[None, :]) & 1) != 0)
        seen = (slot < end)[None, :] & (slot[None, :] >= low[:, None])
        inside = slot < stop
        if WINDOWED:
            deep = tl.load(depths + entry, mask=(entry >= 0) & inside, other=0).to(tl.int32)
            linked = linked & (depth[:, None] - deep[None, :] < window)
        seen = (seen | linked) & inside[None, :]
        peak, total, mixed = _add_tile(
            q, q_2, keys, values, slot, inside, seen, peak, total, mixed, scale, cap,
            True, CAPPED, FULL, DIM, PADDED,
        )  # fmt: skip
    return peak, total, mixed


@triton.jit
def _store(
    parts, sums, result, peak, total, mixed, b, head, node, group, kv_heads, nodes, valid, held, split,
    SPLITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED)
    mixed = mixed / tl.maximum(total, 1e-37)[:, None]
    out = (b * nodes + node).to(tl.int64) * (kv_heads * group) + head
    if SPLITS == 1:
        tl.store(result + out[:, None] * DIM + d[None, :], mixed.to(result.dtype.element_ty), mask=held)
    else:
        out = out * SPLITS + split
        sums_of = tl.where(total > 0, peak + tl.log2(tl.maximum(total, 1e-37)), _NOTHING)
        tl.store(sums + out, sums_of, mask=valid)
        # an empty share is not read again
        tl.store(parts + out[:, None] * DIM + d[None, :], mixed, mask=held & (total > 0)[:, None])


@triton.jit
def split_kernel(
    queries, keys, values, ancestors, depths, lengths, starts, sinks, parts, sums, result,
    scale, cap, window, query_batch, query_head, query_token, key_batch, key_head, kv_heads, group, nodes,
    SPLITS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, FULL: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """Some of the queries of one key head, [head of the group, node], against one share of its prefix.

    The last share has the tree too, and the sink. Alone it writes the result, else all write parts of it.
    """
    block, place, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, kv_head = place // kv_heads, place % kv_heads
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < group * nodes
    head, node = kv_head * group + row // nodes, row % nodes
    d = tl.arange(0, PADDED)
    held = valid[:, None] & (d < DIM)[None, :]
    at = b.to(tl.int64) * query_batch + head.to(tl.int64) * query_head + node.to(tl.int64) * query_token
    q, q_2 = _queries(queries + at[:, None], valid, FULL, DIM, PADDED)
    length, begin = tl.load(lengths + b).to(tl.int32), tl.load(starts + b).to(tl.int32)
    low, depth = begin + tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    if WINDOWED:
        # positions count depths: the deeper a node, the later its window begins
        depth = tl.load(depths + b * nodes + node, mask=valid, other=0).to(tl.int32)
        low = tl.maximum(low, length + depth - window + 1)
        begin = tl.maximum(begin, length - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), SPLITS), KEYS) * KEYS
    first = begin + split * share
    end = tl.minimum(first + share, length)
    base = b.to(tl.int64) * key_batch + kv_head.to(tl.int64) * key_head
    keys += base
    values += base
    peak, total = tl.full([ROWS], _NOTHING, tl.float32), tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    whole = first
    if not WINDOWED:
        whole += tl.maximum(end - first, 0) // KEYS * KEYS
        for at_slot in range(first, whole, KEYS):
            slot = at_slot + tl.arange(0, KEYS)
            peak, total, mixed = _add_tile(
                q, q_2, keys, values, slot, slot >= 0, slot[None, :] >= 0, peak, total, mixed, scale, cap,
                False, CAPPED, FULL, DIM, PADDED,
            )  # fmt: skip
    stop = tl.where(split == SPLITS - 1, length + nodes, end)
    peak, total, mixed = _masked_tiles(
        q, q_2, keys, values, ancestors + b * nodes * WORDS, depths + b * nodes, nodes, node, valid, depth,
        low, end, length, window, tl.minimum(whole, length), stop, peak, total, mixed, scale, cap,
        WORDS, KEYS, CAPPED, WINDOWED, FULL, DIM, PADDED,
    )  # fmt: skip
    if SUNK and split == SPLITS - 1:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * _LOG2E
        higher = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - higher)
        total, mixed = total * shrink + tl.exp2(sink - higher), mixed * shrink[:, None]
        peak = higher
    _store(
        parts, sums, result, peak, total, mixed, b, head, node, group, kv_heads, nodes, valid, held, split,
        SPLITS, DIM, PADDED,
    )  # fmt: skip


@triton.jit
def merge_kernel(parts, sums, result, SPLITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The parts of one query."""
    at = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    sums_of = tl.load(sums + at * SPLITS + split)
    weight = tl.exp2(sums_of - tl.max(sums_of, 0))
    there = (sums_of > 0.5 * _NOTHING)[:, None] & (d < DIM)[None, :]
    part = tl.load(parts + (at * SPLITS + split)[:, None] * DIM + d[None, :], mask=there, other=0.0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(result + at * DIM + d, mixed.to(result.dtype.element_ty), mask=d < DIM)


def tree_attention(
    queries: Any,
    keys: Any,
    values: Any,
    tree: Tree,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    splits: int | None = None,
) -> Any:
    """Attention of the nodes of each row's tree to the row's prefix and to their ancestors.

    Args:
        queries: [B, heads, T, dim] of any strides whose last is 1; float32, float16 or bfloat16.
        keys: [B, key heads, slots, dim] of the same type, slots contiguous; those of the tree's entries come
            right behind the prefix.
        values: Like ``keys``, with the same strides.
        tree: The trees, T entries each.
        scale: Factor of the scores.
        window: Positions that a query sees, its own included; None for all.
        softcap: Scores are bent to lie below this; None leaves them.
        sinks: [heads], scores that take part in the softmax and bring no value; None without.
        splits: Programs that share a context, a power of two; by default what fills the device.

    Returns:
        [B, T, heads, dim].
    """
    batch, heads, nodes, dim = queries.shape
    kv_heads = keys.shape[1]
    group, words = heads // kv_heads, -(-nodes // 64)
    tiles = tiles_of(group * nodes, dim, queries.element_size())
    blocks = triton.cdiv(group * nodes, tiles.rows)
    if splits is None:
        splits = splits_of(blocks * batch * kv_heads, _processors(queries.device))
    result = queries.new_empty(batch, nodes, heads, dim)
    sums = parts = result
    if splits > 1:
        sums = queries.new_empty(batch * heads * nodes, splits, dtype=torch.float32)
        parts = queries.new_empty(batch * heads * nodes, splits, dim, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(dim))
    split_kernel[(blocks, batch * kv_heads, splits)](
        queries, keys, values, tree.ancestors, tree.depths, tree.lengths, tree.starts,
        queries if sinks is None else sinks, parts, sums, result,
        scale, softcap or 1.0, window or 0, *queries.stride()[:3], *keys.stride()[:2], kv_heads, group, nodes,
        SPLITS=splits, WORDS=words, ROWS=tiles.rows, KEYS=tiles.keys,
        DIM=dim, PADDED=padded, FULL=queries.element_size() == 4,
        CAPPED=softcap is not None, WINDOWED=window is not None, SUNK=sinks is not None,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * heads * nodes,)](
            parts, sums, result, SPLITS=splits, DIM=dim, PADDED=padded, num_warps=merge_warps(splits, padded),
        )  # fmt: skip
    return result


def merge_warps(splits: int, padded: int) -> int:
    """Warps of :func:`merge_kernel`: at most 32 numbers for a thread to hold."""
    return int(min(8, max(1, splits * padded // 1024)))
