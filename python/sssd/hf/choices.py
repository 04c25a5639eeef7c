"""What the target chooses from its logits: the most probable tokens, and samples."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd._core import TOP_K
from sssd._core import top_k as most_probable_tokens

_PIECE = 64
"""Tokens of the vocabulary that are looked at together."""
_KEPT_BYTES = 1 << 27
"""Random numbers that are kept for rows that lag behind; more are drawn again when they are needed."""


def choices(logits: Any) -> NDArray[np.int64]:
    """The most probable token at every position, the first of equals; int64 [B, T]."""
    if logits.dtype == torch.float64:
        # transformers compares in float32, where others may be equal
        logits = logits.float()
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # ten times as fast as torch's
        return np.asarray(logits.numpy().argmax(-1))
    return np.asarray(logits.argmax(-1).cpu().numpy())


def most_probable(
    logits: Any, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """What :func:`choices` gives, and :func:`top_k` of the first ``vocab_size`` tokens."""
    if logits.device.type == "cpu" and logits.shape[-1] <= vocab_size:
        # the first of equals is the first of the most probable ones
        ids, probs = top_k(logits)
        return ids[..., 0], ids, probs
    # padding of the vocabulary may be chosen
    return choices(logits), *top_k(logits[..., :vocab_size])


def top_k(logits: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The target's most probable tokens, int64 [B, T, k], and their probabilities, float32 [B, T, k]."""
    if logits.device.type == "cpu":
        return most_probable_tokens(logits.float().numpy(), TOP_K)
    ids = _largest(logits, min(TOP_K, logits.shape[-1]))
    probs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, ids).exp_().clamp_(max=1.0)
    # rounding may lift a sum above 1
    probs /= probs.sum(-1, keepdim=True).clamp_(min=1.0)
    both = torch.cat([ids.double(), probs.double()], dim=-1).cpu().numpy()
    k = ids.shape[-1]
    return both[..., :k].astype(np.int64), both[..., k:].astype(np.float32)


def _largest(logits: Any, k: int) -> Any:
    """As ``logits.topk(k).indices``, but for the order of equals.

    The k largest lie in those k pieces of the vocabulary whose maxima are largest: reading every number once
    is faster than selecting among all.
    """
    size = logits.shape[-1]
    if size % _PIECE or size < 2 * k * _PIECE:
        return logits.topk(k, dim=-1).indices
    pieces = logits.unflatten(-1, (-1, _PIECE))
    best = pieces.amax(-1).topk(k, dim=-1).indices
    found = pieces.gather(-2, best[..., None].expand(*best.shape, _PIECE)).flatten(-2)
    places = found.topk(k, dim=-1).indices
    return best.gather(-1, places // _PIECE) * _PIECE + places % _PIECE


class BatchSampler:
    """Samples of several rows that advance at different speeds, as ``model.generate`` would draw them.

    ``torch.multinomial`` chooses the largest of p / q, q drawn from an exponential distribution for every row
    and token, whatever p is. So the numbers of a step depend on the generator alone: they are drawn step by
    step, and each row takes its own of the step that it has reached.

    Args:
        batch: Rows of the call, those that have stopped included.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._drawn: dict[int, Any] = {}
        self._states: dict[int, Any] = {}
        self._next = 0

    def pick(self, probs: Any, row: int, step: int) -> int:
        """A token from the distribution ``probs``, float32 [V], of a row at its output token ``step``."""
        while self._next <= step:
            self._states[self._next] = _get_state(probs.device)
            self._keep(self._next, self._draw(probs))
            self._next += 1
        if step not in self._drawn:
            latest = _get_state(probs.device)
            _set_state(probs.device, self._states[step])
            self._keep(step, self._draw(probs))
            _set_state(probs.device, latest)
        return int((probs / self._drawn[step][row]).argmax())

    def forget(self, before: int) -> None:
        """Drops what only rows at steps below ``before`` would need."""
        for kept in (self._drawn, self._states):
            for step in [step for step in kept if step < before]:
                del kept[step]

    def _draw(self, probs: Any) -> Any:
        return probs.new_empty(self.batch, *probs.shape).exponential_(1)

    def _keep(self, step: int, numbers: Any) -> None:
        room = max(1, _KEPT_BYTES // (numbers.numel() * numbers.element_size()))
        while len(self._drawn) >= room:
            # the farthest ahead is needed last
            del self._drawn[max(self._drawn)]
        self._drawn[step] = numbers


def _get_state(device: Any) -> Any:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: Any, state: Any) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
