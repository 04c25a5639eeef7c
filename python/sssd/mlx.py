"""sssd in mlx-lm; ``docs/mlx.md``.

draft_model = sssd.mlx.DraftModel(vocab_size)
mlx_lm.stream_generate(model, tokenizer, prompt, draft_model=draft_model, num_draft_tokens=6)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from sssd._core import Drafter, Sequence
from sssd.errors import InvalidArgumentError, SssdError
from sssd.mini import MINI, new_drafter

_SURE = 1e4
"""The logit of a drafted token; those of the others are 0."""


class Cache:
    """The tokens that a draft model was handed, in place of a cache of keys and values."""

    def __init__(self) -> None:
        self.row: list[int] = []

    @property
    def state(self) -> Any:
        """Nothing to be evaluated."""
        return []

    def is_trimmable(self) -> bool:
        """Tokens can be taken back."""
        return True

    def trim(self, tokens: int) -> int:
        """Takes back the last tokens, and says how many."""
        taken = max(0, min(tokens, len(self.row)))
        if taken:
            del self.row[-taken:]
        return taken


class DraftModel:
    """What mlx-lm takes for a draft model: its logits name the next token of a chain.

    mlx-lm asks for as many tokens in each step as ``num_draft_tokens`` says; where nothing is known the last
    token stands in. It verifies each by sampling from the model, so texts are what they are without. A text
    ends, and is learned, when the next one begins.

    Args:
        vocab_size: width of the model's logits.
        end_token_ids: tokens that end a text.
        datastore: as in ``Drafter``; by default the mini store (``docs/mini.md``) of ``tokenizer``.
        tokenizer: the model's, for the mini store alone: a tokenizer.json or its folder, or a call that loads
            a tokenizer. There is no mini store without.
        drafter: a drafter of one's own, in place of these two.
        learn: whether later texts learn from earlier ones.
        max_tokens: the longest chain.

    Attributes:
        drafter: the ``Drafter``.
        layers: what mlx-lm counts caches by.
        failed: steps that met an error, and drafted nothing.

    Raises:
        InvalidArgumentError: ``vocab_size`` or ``max_tokens`` is less than 1.
        What ``Drafter`` raises.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        end_token_ids: Any = None,
        datastore: Any = MINI,
        tokenizer: str | Path | Callable[[], Any] | None = None,
        drafter: Drafter | None = None,
        learn: bool = True,
        max_tokens: int = 32,
    ) -> None:
        if vocab_size < 1 or max_tokens < 1:
            raise InvalidArgumentError("vocab_size and max_tokens must be at least 1")
        self.drafter = drafter or new_drafter(
            datastore, tokenizer, vocab_size=vocab_size, end_token_ids=end_token_ids, threads=1
        )
        self.vocab_size, self.learn, self.max_tokens = vocab_size, learn, max_tokens
        self.layers = [self]
        self.failed = 0
        self._sequence: Sequence | None = None
        self._begun = 0
        self._chain: list[int] = []

    def make_cache(self) -> list[Cache]:
        """The cache of a text that begins; the one before is over."""
        self.end()
        return [Cache()]

    def end(self) -> None:
        """Ends the text: later ones learn from it."""
        sequence, self._sequence = self._sequence, None
        self._begun, self._chain = 0, []
        if sequence is not None:
            if self.learn:
                sequence.finish()
            else:
                sequence.close()

    def __call__(self, tokens: Any, cache: list[Cache]) -> Any:
        """Logits after the last of some tokens.

        Args:
            tokens: ids [1, n], which the cache does not have yet.
            cache: of :meth:`make_cache`.

        Returns:
            floats [1, 1, vocabulary].
        """
        row = cache[0].row
        row.extend(tokens[0].tolist())
        token = self._next(row)
        logits = mx.zeros((1, 1, self.vocab_size))
        logits[0, 0, token] = _SURE
        return logits

    def _next(self, row: list[int]) -> int:
        """The token that is drafted after a row."""
        place = len(row) - self._begun
        if not (0 <= place <= len(self._chain) and row[self._begun :] == self._chain[:place]):
            place = self._draft(row)
        return self._chain[place] if place < len(self._chain) else row[-1]

    def _draft(self, row: list[int]) -> int:
        self._begun, self._chain = len(row), []
        try:
            if self._sequence is None:
                self._sequence = self.drafter.begin(row)
            else:
                self._sequence.follow(row, learn=self.learn)
            self._chain = self._sequence.draft(self.max_tokens, shape="chain").token_ids.tolist()
        except SssdError:
            self.failed += 1
            if self._sequence is not None:
                self._sequence.close()
                self._sequence = None
        return 0
