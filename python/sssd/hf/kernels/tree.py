"""Draft trees as the kernels read them, and what the kernels compute, in plain PyTorch."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Tree:
    """The trees of a pass: T entries a row, the root among them. All tensors of integers, on the device.

    Attributes:
        ancestors: Int64 [B, T], or [B, T, words] for more than 64 entries: bit j of word w is set where the
            entry sees entry 64 w + j.
        depths: [B, T], 0 for the root.
        lengths: [B], slots of the prefix.
        starts: [B], slots of padding in front of it.
    """

    ancestors: Any
    depths: Any
    lengths: Any
    starts: Any


def mask_of(tree: Tree, slots: int, window: int | None = None) -> Any:
    """The tree as a mask: bool [B, T, slots], True where an entry sees a slot."""
    device = tree.ancestors.device
    batch, nodes = tree.ancestors.shape[:2]
    words = tree.ancestors.reshape(batch, nodes, -1)
    bits = (words[..., None] >> torch.arange(64, device=device)) & 1
    seen = bits.bool().reshape(batch, nodes, -1)[..., :nodes]
    depths, lengths, starts = tree.depths.long(), tree.lengths.long(), tree.starts.long()
    slot = torch.arange(slots, device=device).expand(batch, slots)
    entry = slot - lengths[:, None]
    within = (entry >= 0) & (entry < nodes)
    entry = entry.clamp(0, nodes - 1)
    mask = seen.gather(2, entry[:, None].expand(-1, nodes, -1)) & within[:, None]
    mask |= ((slot >= starts[:, None]) & (slot < lengths[:, None]))[:, None]
    if window is not None:
        key = torch.where(within, lengths[:, None] + depths.gather(1, entry), slot)
        mask &= (lengths[:, None] + depths)[:, :, None] - key[:, None] < window
    return mask


def tree_attention(
    queries: Any,
    keys: Any,
    values: Any,
    tree: Tree,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
) -> Any:
    """See :func:`sssd.hf.kernels.attention.tree_attention`."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, 1) for states in (keys, values))
    scores = queries @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = mask_of(tree, keys.shape[2], window)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        sunk = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sunk], dim=-1)
    chances = scores.softmax(-1)[..., : keys.shape[2]]
    # slots beyond the tree may hold anything
    values = values.masked_fill(~mask.any(1)[:, None, :, None], 0.0)
    return (chances @ values).transpose(1, 2)


def add_norm(x: Any, residual: Any, weight: Any, epsilon: float) -> tuple[Any, Any]:
    """See :func:`sssd.hf.kernels.layers.add_norm`."""
    hidden = x if residual is None else x + residual
    wide = hidden.float() if hidden.dtype != torch.float64 else hidden
    scaled = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return hidden, weight * scaled.to(hidden.dtype)


def rope_and_write(
    qkv: Any, cos: Any, sin: Any, norms: tuple[Any, Any, float] | None, tree: Tree, keys: Any, values: Any
) -> Any:
    """See :func:`sssd.hf.kernels.layers.rope_and_write`."""
    batch, nodes, _ = qkv.shape
    kv_heads, dim = keys.shape[1], keys.shape[3]
    states = qkv.view(batch, nodes, -1, dim)
    heads = states.shape[2] - 2 * kv_heads
    queries, new_keys, new_values = states.split([heads, kv_heads, kv_heads], dim=2)
    if norms is not None:
        queries = add_norm(queries, None, norms[0], norms[2])[1]
        new_keys = add_norm(new_keys, None, norms[1], norms[2])[1]

    def turned(x: Any) -> Any:
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, :, None] + torch.cat([-high, low], dim=-1) * sin[:, :, None]

    rows = torch.arange(batch, device=qkv.device)[:, None]
    slots = tree.lengths.long()[:, None] + torch.arange(nodes, device=qkv.device)
    keys[rows, :, slots] = turned(new_keys)
    values[rows, :, slots] = new_values
    return turned(queries)


def silu_gate(gate_up: Any) -> Any:
    """See :func:`sssd.hf.kernels.layers.silu_gate`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def accept_and_move(ids: Any, targets: Any, parents: Any, ancestors: Any, lengths: Any, stack: Any) -> Any:
    """See :func:`sssd.hf.kernels.layers.accept_and_move`."""
    counts = []
    for row, length in enumerate(lengths.tolist()):
        path = [0]
        while True:
            wanted = targets[row, path[-1]]
            children = (parents[row] == path[-1]) & (ids[row] == wanted)
            children[0] = False
            if not children.any():
                break
            path.append(int(children.int().argmax()))
        states = stack[:, row, :, [length + entry for entry in path]].clone()
        stack[:, row, :, length : length + len(path)] = states
        counts.append(len(path))
    return torch.tensor(counts, dtype=torch.int32)


def tell(logits: Any, answer: Any, top: int) -> Any:
    """See :func:`sssd.hf.kernels.layers.tell`."""
    # in the order of ids where they are equal
    values, ids = (part[..., :top] for part in logits.float().sort(dim=-1, descending=True, stable=True))
    probs = (values - logits.float().logsumexp(-1, keepdim=True)).exp().clamp(max=1.0)
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1.0)
    answer[..., 0] = ids[..., 0]
    answer[..., 1 : 1 + top] = ids
    answer[..., 1 + top :] = probs.contiguous().view(torch.int32)
    return ids[..., 0]
