"""Tree attention as one Triton kernel: a candidate for the fast path, measured by ``measure.py``.

The prefix needs no mask and the tree a small one, so no mask over the whole context is read or written. The
query heads that share a key head form the rows of one product, so keys and values are read once. The context
is split among programs, and their results are merged by log-sum-exp (flash decoding).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _partial(
    queries, keys, values, tree, lengths, sums, peaks, mixed, scale,
    key_row, key_head, rows, kv_heads, nodes, splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of rows (node-major within a query head) against one share of the keys of one key head."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = head // kv_heads
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node = row % nodes
    dims = tl.arange(0, DIM)
    valid = row < rows
    q = tl.load(queries + (head * rows + row)[:, None] * DIM + dims[None, :], mask=valid[:, None], other=0.0)
    length = tl.load(lengths + batch)
    total = length + nodes
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_KEYS) * BLOCK_KEYS
    start, stop = split * share, tl.minimum((split + 1) * share, total)
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    result = tl.zeros([BLOCK_ROWS, DIM], tl.float32)
    base = batch * key_row + (head % kv_heads) * key_head
    for at in range(start, stop, BLOCK_KEYS):
        slot = at + tl.arange(0, BLOCK_KEYS)
        inside = slot < stop
        where = base + slot[:, None] * DIM + dims[None, :]
        k = tl.load(keys + where, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # slots behind the prefix are the tree's: who may attend to whom
        entry = slot - length
        seen = tl.load(
            tree + batch * nodes * nodes + node[:, None] * nodes + entry[None, :],
            mask=(entry >= 0)[None, :] & inside[None, :] & valid[:, None],
            other=0,
        )
        allowed = inside[None, :] & ((entry < 0)[None, :] | (seen != 0))
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # a row that has seen nothing yet has no peak to subtract
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, chances = tl.exp(peak - anchor), tl.exp(scores - anchor[:, None])
        v = tl.load(values + where, mask=inside[:, None], other=0.0)
        weight = weight * shrink + tl.sum(chances, 1)
        result = result * shrink[:, None] + tl.dot(chances.to(v.dtype), v, input_precision="ieee")
        peak = higher
    out = (head * rows + row) * splits + split
    tl.store(peaks + out, peak, mask=valid)
    tl.store(sums + out, weight, mask=valid)
    tl.store(mixed + out[:, None] * DIM + dims[None, :], result, mask=valid[:, None])


def tree_attention(queries, keys, values, tree, lengths, scale, splits=16):
    """Attention of a tree's nodes to a prefix and to their ancestors.

    Args:
        queries: [B, key heads, group * T, dim], T nodes of each query head of the group, one head after the
            other.
        keys: [B, key heads, slots, dim], contiguous from the slots on; values alike.
        values: See above.
        tree: Uint8 [B, T, T], not 0 where node i may attend to entry j.
        lengths: Int32 [B], slots of the prefix; the T entries come behind it.
        scale: Factor of the scores.
        splits: Shares of the context.

    Returns:
        [B, key heads, group * T, dim].
    """
    batch, heads, rows, dim = queries.shape
    shape = (batch * heads, rows, splits)
    peaks, sums = (queries.new_empty(shape, dtype=torch.float32) for _ in range(2))
    mixed = queries.new_empty((*shape, dim), dtype=torch.float32)
    block = min(64, max(16, triton.next_power_of_2(rows)))
    _partial[(triton.cdiv(rows, block), batch * heads, splits)](
        queries.contiguous(), keys, values, tree, lengths, sums, peaks, mixed, scale,
        keys.stride(0), keys.stride(1), rows, heads, tree.shape[1], splits,
        BLOCK_ROWS=block, BLOCK_KEYS=64, DIM=dim,
    )  # fmt: skip
    factors = torch.exp(peaks - peaks.amax(-1, keepdim=True))
    total = (sums * factors).sum(-1, keepdim=True)
    merged = (mixed * factors[..., None]).sum(-2) / total
    return merged.view(batch, heads, rows, dim).to(queries.dtype)
