"""A request on its way through the engine: what it asks for, and where it stands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from sssd._core import Sequence
from sssd.hf.contract import Call
from sssd.hf.text import Piece, TextStream
from sssd.server.errors import ApiError

_LEAST = -9999.0
"""The log probability of what cannot be."""


@dataclass
class Usage:
    """What a request has cost so far.

    Attributes:
        prompt: Tokens of the prompt.
        output: Tokens of the output, the end token and those of a stop string included.
        drafted: Nodes of draft trees that were verified.
        accepted: Nodes that became output.
        passes: Verify passes.
        waited: Seconds in the queue.
        seconds: Seconds from the first token to the latest.
    """

    prompt: int
    output: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    waited: float = 0.0
    seconds: float = 0.0


@dataclass
class Update:
    """News of a request: further text, and its end if ``finish`` or ``error`` says so."""

    pieces: list[Piece]
    usage: Usage
    finish: str | None = None
    error: ApiError | None = None


@dataclass
class Request:
    """What is asked of the engine.

    Attributes:
        call: What ``model.generate`` would decode, prepared by it; see :func:`prepare`.
        deliver: Called in the decoding thread with each :class:`Update`; must not block.
        seed: Of the random numbers, as ``torch.manual_seed`` takes it.
        stops: Strings that end the text and are not part of it.
        top_logprobs: How many log probabilities to give beside that of each token; None for none at all.
        prediction: Tokens that the output is expected to resemble.
        namespace: Whose texts to learn from and to teach.
        speculate: Whether to draft.
        deadline: When to give up, in seconds of ``time.monotonic``.
        cancelled: Set to drop the request at the next pass.
    """

    call: Call
    deliver: Callable[[Update], None]
    seed: int = 0
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    prediction: list[int] | None = None
    namespace: str = ""
    speculate: bool = True
    deadline: float = float("inf")
    cancelled: bool = False
    submitted: float = field(default_factory=monotonic)

    @property
    def prompt(self) -> list[int]:
        """Its tokens."""
        return self.call.input_ids[0].tolist()  # type: ignore[no-any-return]


def prepare(model: Any, prompt: list[int], options: dict[str, Any]) -> Call:
    """What ``model.generate`` makes of its arguments: settings, processors and criteria.

    Args:
        model: The model.
        prompt: Token ids.
        options: As for ``model.generate``.

    Raises:
        ValueError: The options do not go together.
    """
    calls: list[Call] = []

    def keep(
        model: Any,
        input_ids: Any,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **inputs: Any,
    ) -> Any:
        calls.append(
            Call(model, input_ids, generation_config, logits_processor, stopping_criteria, inputs=inputs)
        )
        return input_ids

    ids = torch.tensor([prompt], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=keep, **options)
    return calls[0]


class Running:
    """A request that is being prefilled or decoded.

    Args:
        request: What is asked.
        tokenizer: For the text.
    """

    def __init__(self, request: Request, tokenizer: Any) -> None:
        call = request.call
        self.request, self.call = request, call
        self.prompt = request.prompt
        self.usage = Usage(len(self.prompt), waited=monotonic() - request.submitted)
        self.text = TextStream(tokenizer, request.stops)
        self.tokens: list[int] = []
        self.news: list[int] = []
        """Tokens that the drafter has not seen."""
        self.feedback: tuple[Any, Any] | None = None
        """What the target held most probable at each entry of the last pass, ids and probabilities [T, k]."""
        self.sequence: Sequence | None = None
        self.prefilled: Any = None
        """Cache of the part of the prompt that was read."""
        self.finish: str | None = None
        self.first = 0.0
        self.max_length = call.criteria.max_length
        self.end_ids = call.end_ids
        self._others = call.other_criteria
        self._picks = bool(call.processors) or call.config.do_sample
        self._generator: Any = None
        if call.config.do_sample:
            self._generator = torch.Generator(device=call.input_ids.device).manual_seed(request.seed)
        self._ids: Any = None
        if self._picks or self._others:
            self._ids = call.input_ids.new_zeros(1, self.max_length)
            self._ids[:, : len(self.prompt)] = call.input_ids

    def choose(self, logits: Any, target: int) -> int:
        """The model's next token, as ``model.generate`` would choose it.

        Args:
            logits: [V] after the present text.
            target: The most probable token.
        """
        if not self._picks:
            return target
        length = len(self.prompt) + len(self.tokens)
        scores = self.call.processors(
            self._ids[:, :length], logits[None].to(device=self._ids.device, dtype=torch.float32, copy=True)
        )
        if self._generator is None:
            return int(scores.argmax(-1))
        probs = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probs, num_samples=1, generator=self._generator))

    def append(self, token: int, accepted: bool, logits: Any) -> list[Piece]:
        """Adds a token to the output; gives the text that is certain. Sets ``finish`` at the last."""
        if self._ids is not None:
            self._ids[0, len(self.prompt) + len(self.tokens)] = token
        self.tokens.append(token)
        self.news.append(token)
        now = monotonic()
        self.first = self.first or now
        self.usage.output += 1
        self.usage.accepted += accepted
        self.usage.seconds = now - self.first
        length = len(self.prompt) + len(self.tokens)
        if token in self.end_ids:
            self.finish = "stop"
        elif length >= self.max_length:
            self.finish = "length"
        elif self._others and any(bool(one(self._ids[:, :length], None).any()) for one in self._others):
            self.finish = "stop"
        piece = Piece(token, "", accepted)
        if self.request.top_logprobs is not None:
            piece.logprob, piece.alternatives = _logprobs(logits, token, self.request.top_logprobs)
        pieces = self.text.add(piece, last=self.finish is not None)
        if self.text.stopped:
            self.finish = "stop"
        return [one for one in pieces if one.text or one.token not in self.end_ids]

    def walk(
        self, logits: Any, targets: list[int], ids: list[int], child: list[int], sibling: list[int]
    ) -> tuple[list[int], list[Piece]]:
        """Follows the tree as far as the model chooses its tokens.

        Args:
            logits: [T, V] after the root and each node.
            targets: The most probable token after each.
            ids: Token of each entry.
            child: Entry of each one's first child, -1 for none.
            sibling: Entry of the next child of the same parent, -1 for none.

        Returns:
            The entries to keep, and the text that is certain.
        """
        kept: list[int] = []
        pieces: list[Piece] = []
        for entry, token, accepted in self._path(logits, targets, ids, child, sibling):
            kept.append(entry)
            pieces += self.append(token, accepted, logits[entry])
            if self.finish is not None:
                break
        return kept, pieces

    def _path(
        self, logits: Any, targets: list[int], ids: list[int], child: list[int], sibling: list[int]
    ) -> Iterator[tuple[int, int, bool]]:
        entry = 0
        while entry >= 0:
            token = self.choose(logits[entry], targets[entry])
            below = child[entry]
            while below >= 0 and ids[below] != token:
                below = sibling[below]
            yield entry, token, below >= 0
            entry = below


def _logprobs(logits: Any, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    # as OpenAI tells the impossible: JSON has no infinity
    values = torch.log_softmax(logits.float(), dim=-1).nan_to_num(nan=_LEAST).clamp(min=_LEAST)
    best = values.topk(min(count, len(values)))
    return float(values[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
