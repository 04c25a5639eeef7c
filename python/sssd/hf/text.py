"""Tokens into text as they come: whole characters, and nothing that a stop string may still take."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or not yet."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


@dataclass
class Piece:
    """A token of the output and the text that it completed."""

    token: int
    text: str
    accepted: bool
    """Whether it had been drafted."""
    logprob: float | None = None
    """Of the model's own distribution, before temperature and the like; None if not asked for."""
    alternatives: Sequence[tuple[int, float]] = ()
    """The most probable tokens there and their log probabilities."""


class _Characters:
    """Turns tokens into text, character by character.

    Args:
        decode: Gives the text of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.context: list[int] = []
        """Tokens whose text is out, in front of the pending ones: first tokens are treated differently."""
        self.pending: list[int] = []
        self.shown = ""
        """What is out of the text of both."""

    def add(self, token: int, last: bool = False) -> str:
        """The text that a token completes; with ``last`` also what would have waited for others."""
        self.pending.append(token)
        text = self.decode(self.context + self.pending)
        if not text.startswith(self.shown):
            # some tokenizers judge bytes by all around them: these are no character yet, or never will be
            if not last and len(self.pending) < _LONGEST_CHARACTER:
                return ""
            self.context, self.shown, text = [], "", self.decode(self.pending)
        # of many broken bytes, only the last can belong to a character that is not over
        whole = max(len(text.rstrip(_UNFINISHED)), len(text) - _LONGEST_CHARACTER + 1)
        end = max(len(self.shown), len(text) if last else whole)
        new = text[len(self.shown) : end]
        self.shown = text[:end]
        # a context without text, of special tokens, would leave the next token in front
        if end == len(text) and (alone := self.decode(self.pending)):
            self.context, self.pending, self.shown = self.pending, [], alone
        return new


class TextStream:
    """The output of one request as pieces of text.

    Joined, they are the tokenizer's text of all tokens, special ones left out, up to the first stop string.
    Where a tokenizer falls back to bytes that make no character, the characters around them stay whole.

    Args:
        tokenizer: The model's; not in use by other threads.
        stops: Strings that end the text and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._characters = _Characters(
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        self._stops = stops
        self._held: deque[Piece] = deque()
        self._text = ""
        """The text of the held pieces."""
        self.stopped = False

    def add(self, piece: Piece, last: bool = False) -> list[Piece]:
        """Takes the next token (``text`` is filled in) and gives the pieces that are certain now."""
        piece.text = self._characters.add(piece.token, last)
        self._held.append(piece)
        self._text += piece.text
        found = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), cut=True)
        return self._release(len(self._text) if last else self._certain())

    def _certain(self) -> int:
        """Characters of the held text that no stop string can begin in."""
        longest = max(map(len, self._stops), default=1) - 1
        for place in range(max(0, len(self._text) - longest), len(self._text)):
            if any(stop.startswith(self._text[place:]) for stop in self._stops):
                return place
        return len(self._text)

    def _release(self, count: int, cut: bool = False) -> list[Piece]:
        """Gives the pieces that lie in the first characters; with ``cut`` the last one as far as it does."""
        pieces = []
        while self._held and len(self._held[0].text) <= count:
            # where the text ends in front of a stop string, the string's own tokens go with it
            if cut and count == 0:
                break
            piece = self._held.popleft()
            count -= len(piece.text)
            self._text = self._text[len(piece.text) :]
            pieces.append(piece)
        if cut:
            if count:
                self._held[0].text = self._held[0].text[:count]
                pieces.append(self._held[0])
            self._held.clear()
            self._text = ""
        return pieces
