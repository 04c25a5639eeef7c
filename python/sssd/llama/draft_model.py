"""What llama-cpp-python takes for a draft model: chains in its own loop."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel
from numpy.typing import NDArray

from sssd._core import Drafter, Sequence, SizingRule
from sssd.errors import SssdError
from sssd.hardware import CostCurve
from sssd.mini import MINI, new_drafter

logger = logging.getLogger("llama_cpp.sssd")

_TAKEN_BACK = 8
"""Tokens that a text may lose at its end and still be the same one: turns of a chat are tokenized anew."""


def linear(slope: float) -> CostCurve:
    """A curve by which each further token of a pass takes ``slope`` of what the first takes.

    Args:
        slope: 0.3 is a small quantised model on a few cores, 0.02 a GPU. The rule corrects it by the times of
            passes.
    """
    seconds = np.array([[[1.0], [1.0 + 128 * slope]]])
    return CostCurve(np.array([1.0]), np.array([1.0, 129.0]), np.array([0.0]), seconds)


class DraftModel(LlamaDraftModel):  # type: ignore[misc]
    """Drafts chains for ``Llama``, as long as they pay by the times of its own passes.

    llama-cpp-python hands over all tokens in each call, and no ends of requests: what is new is appended, a
    few tokens at the end may be taken back, and a text that goes another way ends the one before, which is
    learned. One model drafts for one ``Llama``.

    llama.cpp's passes over several tokens round otherwise than those over one: each token is the one that the
    pass which verified it gives, as for every other speculation there, and need not be plain decoding's.

    Args:
        end_token_ids: tokens that end a text.
        vocab_size: number of token ids; any if None.
        max_tokens: the longest draft.
        datastore: as in ``Drafter``; by default the mini store (``docs/mini.md``) of ``tokenizer``.
        tokenizer: the model's, for the mini store alone: a tokenizer.json or its folder, or a call that loads
            a tokenizer. There is no mini store without.
        drafter: a drafter of one's own; the arguments before are then its affair.
        learn: whether later texts learn from earlier ones.
        curve: cost of a pass by its tokens, to begin with.
        namespace: of the drafter.

    Attributes:
        drafter: the ``Drafter``.
        drafted: tokens drafted so far.
        accepted: of these, those that came true.
        failed: calls that met an error, and drafted nothing.

    Raises:
        What ``Drafter`` raises.
    """

    def __init__(
        self,
        *,
        end_token_ids: Any = None,
        vocab_size: int | None = None,
        max_tokens: int = 24,
        datastore: Any = MINI,
        tokenizer: str | Path | Callable[[], Any] | None = None,
        drafter: Drafter | None = None,
        learn: bool = True,
        curve: CostCurve | None = None,
        namespace: str = "",
    ) -> None:
        self.drafter = drafter or new_drafter(
            datastore, tokenizer, vocab_size=vocab_size, end_token_ids=end_token_ids, threads=1
        )
        self.max_tokens, self.learn, self.namespace = max_tokens, learn, namespace
        self.drafted = self.accepted = self.failed = 0
        self._rule = SizingRule(curve or linear(0.3), max_nodes=max_tokens)
        self._sequence: Sequence | None = None
        self._returned: float | None = None
        self._size = 0
        self._draft_seconds = 0.0

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: Any) -> NDArray[np.intc]:
        """Drafts what may follow.

        Args:
            input_ids: all tokens so far, intc [n].
            kwargs: not looked at.

        Returns:
            intc [at most ``max_tokens``].
        """
        del kwargs
        started = time.perf_counter()
        try:
            self._follow(input_ids, started)
            ids = self._draft()
        except SssdError as problem:
            if self.failed == 0:
                logger.warning("sssd: a step goes without drafts; later failures are counted: %s", problem)
            self.failed += 1
            self._drop(learn=False)
            ids = np.empty(0, np.intc)
        self._size = len(ids)
        self.drafted += len(ids)
        self._returned = time.perf_counter()
        self._draft_seconds = self._returned - started
        return ids

    def end(self) -> None:
        """Ends the text: later ones learn from it at once, not only when the next begins."""
        self._drop(learn=self.learn)

    def _follow(self, ids: NDArray[np.intc], now: float) -> None:
        sequence = self._sequence
        if sequence is not None:
            held = sequence.token_ids
            shared = min(len(held), len(ids))
            same = held[:shared] == ids[:shared]
            common = shared if same.all() else int(same.argmin())
            if common > 0 and common >= len(held) - _TAKEN_BACK:
                new = len(ids) - len(held)
                if common == len(held) and 0 < new <= self._size + 1:
                    self._observe(new, len(ids), now)
                self.accepted += sequence.follow(ids)
                return
            self.end()
        self._sequence = self.drafter.begin(ids, namespace=self.namespace)

    def _observe(self, new: int, length: int, now: float) -> None:
        """Tells the rule what the pass between two calls has cost, and what it brought."""
        if self._returned is not None:
            self._rule.observe(
                batch=1,
                size=self._size,
                context=float(length),
                seconds=now - self._returned,
                tokens=new,
                draft_seconds=self._draft_seconds,
            )

    def _draft(self) -> NDArray[np.intc]:
        if self._sequence is None:
            return np.empty(0, np.intc)
        chain = self._sequence.draft(self.max_tokens, shape="chain", rule=self._rule)
        return chain.token_ids.astype(np.intc)

    def _drop(self, *, learn: bool) -> None:
        sequence, self._sequence = self._sequence, None
        self._returned = None
        if sequence is not None:
            (sequence.finish if learn else sequence.close)()
