"""What lies between the products of a layer, one kernel each, in Triton.

Rounding follows the models' own modules: sums and norms in float32, results of each operation in the weights'
type, so that lower precisions choose the tokens that the modules choose.

Importing this needs triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sssd.hf.kernels.tree import Tree

VOCABULARY_BLOCK = 4096
"""Tokens that one program looks at for the most probable ones."""
_LEAST = tl.constexpr(-3e38)


@triton.jit
def norm_kernel(
    x, residual, weight, hidden, normed, epsilon, size,
    SIZE: tl.constexpr, ADDS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One row: hidden = x + residual, if there is one, and its RMS norm."""
    start = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, SIZE)
    inside = at < size
    h = tl.load(x + start + at, mask=inside, other=0.0)
    if ADDS:
        h = (h.to(tl.float32) + tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)).to(
            h.dtype
        )
        tl.store(hidden + start + at, h, mask=inside)
    wide = h.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + epsilon)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if not PLAIN:
        scaled = scaled.to(h.dtype).to(tl.float32)
    tl.store(normed + start + at, (scaled * w).to(h.dtype), mask=inside)


def add_norm(x: Any, residual: Any, weight: Any, epsilon: float) -> tuple[Any, Any]:
    """``x + residual`` and its RMS norm.

    Args:
        x: [..., size], contiguous.
        residual: Like ``x``, or None for nothing to add.
        weight: [size].
        epsilon: Of the norm.

    Returns:
        Both, like ``x``; the first is ``x`` itself where nothing was added.
    """
    size = x.shape[-1]
    normed = torch.empty_like(x)
    hidden = x if residual is None else torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    norm_kernel[(x.numel() // size,)](
        x, x if residual is None else residual, weight, hidden, normed, epsilon, size,
        SIZE=padded, ADDS=residual is not None, PLAIN=x.dtype == torch.float32, num_warps=norm_warps(padded),
    )  # fmt: skip
    return hidden, normed


def norm_warps(padded: int) -> int:
    """Warps of :func:`norm_kernel`: at most 32 numbers for a thread to hold, as far as warps go."""
    return int(min(16, max(1, padded // 512)))


@triton.jit
def rope_kernel(
    qkv, cos, sin, q_weight, k_weight, lengths, queries, keys, values,
    epsilon, key_batch, key_head, heads, kv_heads, nodes,
    DIM: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, NORMS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Some heads of one entry: queries to their own tensor, keys and values to their slots."""
    place, block = tl.program_id(0), tl.program_id(1)
    b, node = place // nodes, place % nodes
    head, d = block * HEADS + tl.arange(0, HEADS), tl.arange(0, PADDED)
    held = (head < heads + 2 * kv_heads)[:, None] & (d < DIM)[None, :]
    start = qkv + place.to(tl.int64) * ((heads + 2 * kv_heads) * DIM) + head[:, None] * DIM
    other = tl.where(d < DIM // 2, d + DIM // 2, d - DIM // 2)
    raw = tl.load(start + d[None, :], mask=held, other=0.0)
    x, y = raw.to(tl.float32), tl.load(start + other[None, :], mask=held, other=0.0).to(tl.float32)
    is_query, is_value = head < heads, head >= heads + kv_heads
    if NORMS:
        factor = tl.rsqrt(tl.sum(x * x, 1) / DIM + epsilon)[:, None]
        x, y = x * factor, y * factor
        if not PLAIN:
            x, y = x.to(raw.dtype).to(tl.float32), y.to(raw.dtype).to(tl.float32)
        inside = d < DIM
        q_x = tl.load(q_weight + d, mask=inside, other=0.0).to(tl.float32)
        k_x = tl.load(k_weight + d, mask=inside, other=0.0).to(tl.float32)
        q_y = tl.load(q_weight + other, mask=inside, other=0.0).to(tl.float32)
        k_y = tl.load(k_weight + other, mask=inside, other=0.0).to(tl.float32)
        x = (x * tl.where(is_query[:, None], q_x[None, :], k_x[None, :])).to(raw.dtype).to(tl.float32)
        y = (y * tl.where(is_query[:, None], q_y[None, :], k_y[None, :])).to(raw.dtype).to(tl.float32)
    angle = place.to(tl.int64) * DIM + d
    c = tl.load(cos + angle, mask=d < DIM, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=d < DIM, other=0.0).to(tl.float32)
    turned = tl.where((d < DIM // 2)[None, :], -y, y)
    # each product is rounded, as two operations of the model would
    turned = (x * c[None, :]).to(raw.dtype).to(tl.float32) + (turned * s[None, :]).to(raw.dtype).to(
        tl.float32
    )
    turned = turned.to(raw.dtype)
    out = queries + place.to(tl.int64) * (heads * DIM) + head[:, None] * DIM + d[None, :]
    tl.store(out, turned, mask=held & is_query[:, None])
    slot = tl.load(lengths + b).to(tl.int64) + node
    kv_head = tl.where(is_value, head - heads - kv_heads, head - heads).to(tl.int64)
    at = (b.to(tl.int64) * key_batch + kv_head * key_head + slot * DIM)[:, None] + d[None, :]
    tl.store(keys + at, turned, mask=held & ((head >= heads) & (head < heads + kv_heads))[:, None])
    tl.store(values + at, raw, mask=held & is_value[:, None])


def rope_and_write(
    qkv: Any, cos: Any, sin: Any, norms: tuple[Any, Any, float] | None, tree: Tree, keys: Any, values: Any
) -> Any:
    """Turns queries and keys by their positions and writes keys and values behind each row's prefix.

    Args:
        qkv: [B, T, (heads + 2 key heads) * dim], contiguous.
        cos: [B, T, dim], contiguous; ``sin`` alike.
        sin: See above.
        norms: Weights [dim] of the norms of queries and of keys and their epsilon; None without.
        tree: The trees; only lengths are looked at.
        keys: [B, key heads, slots, dim], slots contiguous; ``values`` with the same strides. Both are
            written to.
        values: See above.

    Returns:
        Queries [B, T, heads, dim].
    """
    batch, nodes, width = qkv.shape
    kv_heads, dim = keys.shape[1], keys.shape[3]
    heads = width // dim - 2 * kv_heads
    queries = qkv.new_empty(batch, nodes, heads, dim)
    q_weight, k_weight, epsilon = norms or (qkv, qkv, 0.0)
    padded = triton.next_power_of_2(dim)
    together = max(1, 512 // padded)
    rope_kernel[(batch * nodes, triton.cdiv(heads + 2 * kv_heads, together))](
        qkv, cos, sin, q_weight, k_weight, tree.lengths, queries, keys, values,
        epsilon, *keys.stride()[:2], heads, kv_heads, nodes,
        DIM=dim, PADDED=padded, HEADS=together, NORMS=norms is not None, PLAIN=qkv.dtype == torch.float32,
        num_warps=2,
    )  # fmt: skip
    return queries


@triton.jit
def gate_kernel(gate_up, result, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * (2 * size) + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * (2 * size) + size + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(
        result + row * size + at, (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside
    )


def silu_gate(gate_up: Any) -> Any:
    """``silu(gate) * up`` of [..., 2 * size], contiguous, the gate first; gives [..., size]."""
    size = gate_up.shape[-1] // 2
    result = gate_up.new_empty(*gate_up.shape[:-1], size)
    gate_kernel[(result.numel() // size, triton.cdiv(size, 1024))](
        gate_up, result, size, BLOCK=1024, num_warps=4
    )
    return result


@triton.jit
def walk_kernel(ids, targets, parents, ancestors, origin, counts, nodes, NODES: tl.constexpr):
    """One row: which entries the target's choices lead to, in order."""
    start = tl.program_id(0) * nodes
    entry = tl.arange(0, NODES)
    inside = entry < nodes
    parent = tl.load(parents + start + entry, mask=inside, other=-1)
    wanted = tl.load(targets + start + tl.maximum(parent, 0), mask=inside, other=0)
    token = tl.load(ids + start + entry, mask=inside, other=0)
    right = inside & ((entry == 0) | ((parent >= 0) & (wanted == token)))
    one = tl.full([NODES], 1, tl.int64)
    word = tl.sum(tl.where(right, one << entry.to(tl.int64), 0), 0)
    above = tl.load(ancestors + start + entry, mask=inside, other=0)
    accepted = right & ((above & ~word) == 0)
    rank = tl.cumsum(accepted.to(tl.int32), 0) - 1
    tl.store(origin + start + rank, entry, mask=accepted)
    tl.store(counts + tl.program_id(0), tl.sum(accepted.to(tl.int32), 0))


@triton.jit
def move_kernel(stack, origin, counts, lengths, kv_heads, nodes, part_stride, batch_stride, head_stride,
                DIM: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """The accepted states of one head of one row in one layer, one after the other to the front."""
    place, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part, head = place // kv_heads, place % kv_heads
    start = (
        part * part_stride + b * batch_stride + head * head_stride + tl.load(lengths + b).to(tl.int64) * DIM
    )
    d = tl.arange(0, PADDED)
    # sources rise and none lies before its place, so that none is overwritten before it is read
    for to in range(1, tl.load(counts + b)):
        source = tl.load(origin + b * nodes + to)
        if source != to:
            state = tl.load(stack + start + source * DIM + d, mask=d < DIM, other=0.0)
            tl.store(stack + start + to * DIM + d, state, mask=d < DIM)


def accept_and_move(ids: Any, targets: Any, parents: Any, ancestors: Any, lengths: Any, stack: Any) -> Any:
    """Walks the trees by the target's choices and moves the accepted states together, behind the prefix.

    Args:
        ids: Int64 [B, T], like ``targets``, ``parents`` (-1 for the root) and ``ancestors``, contiguous; at
            most 64 entries.
        targets: The target's choice after each entry.
        parents: The entry before each.
        ancestors: As in :class:`~sssd.hf.kernels.tree.Tree`.
        lengths: [B], slots of the prefix.
        stack: [parts, B or more, key heads, slots, dim], slots contiguous: keys and values of all layers.

    Returns:
        Int32 [B], how many entries are accepted, the root among them.
    """
    batch, nodes = ids.shape
    parts, _, kv_heads, _, dim = stack.shape
    origin = torch.empty(batch, nodes, dtype=torch.int32, device=ids.device)
    counts = torch.empty(batch, dtype=torch.int32, device=ids.device)
    width = max(2, triton.next_power_of_2(nodes))
    walk_kernel[(batch,)](ids, targets, parents, ancestors, origin, counts, nodes, NODES=width, num_warps=1)
    if nodes > 1:
        move_kernel[(parts * kv_heads, batch)](
            stack, origin, counts, lengths, kv_heads, nodes, *stack.stride()[:3],
            DIM=dim, PADDED=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return counts


@triton.jit
def candidates_kernel(logits, best, places, sums, size, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """The most probable tokens of one part of a row's vocabulary, and the part's log-sum-exp."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + at, mask=at < size, other=0.0).to(tl.float32)
    # what is taken falls below everything, and so does what is no token
    left = tl.where(at < size, tl.maximum(x, _LEAST), float("-inf"))
    peak = tl.max(left, 0)
    out = row * tl.num_programs(1) + part
    tl.store(sums + out, peak + tl.log(tl.sum(tl.exp(left - peak), 0)))
    for rank in range(TOP):
        value, index = tl.max(left, 0, return_indices=True)
        tl.store(best + out * TOP + rank, value)
        tl.store(places + out * TOP + rank, part * BLOCK + index)
        left = tl.where(at == part * BLOCK + index, float("-inf"), left)


@triton.jit
def choose_kernel(
    best, places, sums, targets, answer, parts, nodes, batch_stride, node_stride,
    TOP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The most probable tokens of one row, from those of its parts: choice, ids and probabilities."""
    row = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, PARTS), tl.arange(0, PARTS * TOP)
    sums_of = tl.load(sums + row * parts + part, mask=part < parts, other=float("-inf"))
    peak = tl.max(sums_of, 0)
    total = peak + tl.log(tl.sum(tl.exp(sums_of - peak), 0))
    inside = at < parts * TOP
    left = tl.load(best + row * parts * TOP + at, mask=inside, other=float("-inf"))
    place = tl.load(places + row * parts * TOP + at, mask=inside, other=0)
    out = answer + row // nodes * batch_stride + row % nodes * node_stride
    all_of = 0.0
    for rank in range(TOP):
        value, index = tl.max(left, 0, return_indices=True)
        token = tl.sum(tl.where(at == index, place, 0), 0)
        if rank == 0:
            tl.store(targets + row, token.to(tl.int64))
            tl.store(out, token)
        chance = tl.minimum(tl.exp(value - total), 1.0)
        all_of += chance
        tl.store(out + 1 + rank, token)
        left = tl.where(at == index, float("-inf"), left)
    left = tl.load(best + row * parts * TOP + at, mask=inside, other=float("-inf"))
    for rank in range(TOP):
        value, index = tl.max(left, 0, return_indices=True)
        chance = tl.minimum(tl.exp(value - total), 1.0) / tl.maximum(all_of, 1.0)
        tl.store(out + 1 + TOP + rank, chance.to(tl.int32, bitcast=True))
        left = tl.where(at == index, float("-inf"), left)


def tell(logits: Any, answer: Any, top: int) -> Any:
    """The target's choices, its most probable tokens and their probabilities, in two kernels.

    Args:
        logits: [B, T, vocabulary], contiguous, at least ``top`` tokens.
        answer: Int32 [B, T, 1 + 2 * top], written to: the choice, ids, and the bits of float32
            probabilities, the largest first; of equal ones the smallest id is.
        top: How many.

    Returns:
        The choices, int64 [B, T].
    """
    batch, nodes, size = logits.shape
    rows, parts = batch * nodes, triton.cdiv(size, VOCABULARY_BLOCK)
    targets = torch.empty(batch, nodes, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, parts, top, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, parts, top, dtype=torch.int32, device=logits.device)
    sums = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    candidates_kernel[(rows, parts)](
        logits, best, places, sums, size, TOP=top, BLOCK=VOCABULARY_BLOCK, num_warps=4
    )
    choose_kernel[(rows,)](
        best, places, sums, targets, answer, parts, nodes, *answer.stride()[:2],
        TOP=top, PARTS=triton.next_power_of_2(parts), num_warps=2,
    )  # fmt: skip
    return targets
