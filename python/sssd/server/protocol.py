"""OpenAI's interface: what bodies may hold, and what is answered."""

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sssd.hf.text import Piece
from sssd.server.errors import bad_request
from sssd.server.request import Usage

_HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""Fields that change no token."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are not supported, and what they may say because it asks for nothing."""

_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[_Part] | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": _text(self.content)}


class _Prediction(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["content"]
    content: str | list[_Part]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Body(BaseModel):
    """What both kinds of completions take."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    prediction: _Prediction | None = None
    speculate: bool | None = None
    """Our own: false decodes without drafts."""
    return_accepted: bool | None = None
    """Our own: tell which tokens had been drafted, and how long it took."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the output may have at most, if that was said."""
        return self.max_tokens

    @property
    def count_logprobs(self) -> int | None:
        """How many log probabilities are asked for beside that of each token; None for none at all."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuses what is not supported.

        Raises:
            ApiError: The body holds such a field.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
                continue
            only = _NEUTRAL.get(name)
            hint = f"only {json.dumps(only[0])} is" if only else "leave it out"
            raise bad_request(
                f"{name[:64]!r} is not supported here; {hint}", name[:64], "unsupported_parameter"
            )
        if self.temperature is not None and 0 < self.temperature < 0.01:
            raise bad_request("temperature must be 0 or at least 0.01", "temperature")

    def options(self, vocab_size: int, default_top_k: int | None) -> dict[str, Any]:
        """The arguments for ``model.generate``, but for ``max_new_tokens``.

        Raises:
            ApiError: ``logit_bias`` names no token.
        """
        options: dict[str, Any] = {}
        if self.temperature == 0:
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        elif self.temperature is not None:
            options = {"do_sample": True, "temperature": self.temperature, "top_k": default_top_k or 0}
        if self.temperature != 0:
            names = ("top_p", "top_k", "min_p")
            options |= {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.logit_bias:
            for token in self.logit_bias:
                if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
                    raise bad_request(f"{token[:32]!r} is no token id below {vocab_size}", "logit_bias")
            options["sequence_bias"] = [[[int(token)], bias] for token, bias in self.logit_bias.items()]
        return options


class ChatBody(_Body):
    """A body of ``/v1/chat/completions``."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the output may have at most, if that was said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def count_logprobs(self) -> int | None:
        """How many log probabilities are asked for beside that of each token; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Refuses what is not supported.

        Raises:
            ApiError: The body holds such a field.
        """
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        for i, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if value and name not in ("name", "refusal", "annotations"):
                    place = f"messages.{i}.{name[:64]}"
                    raise bad_request(f"{place!r} is not supported here", place, "unsupported_parameter")


class CompletionBody(_Body):
    """A body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[
            list[str | Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=1)
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int:
        """How many tokens the output may have at most: 16 unless said, as OpenAI has it."""
        return self.max_tokens or 16

    @property
    def count_logprobs(self) -> int | None:
        """How many log probabilities are asked for beside that of each token; None for none at all."""
        return self.logprobs

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt, in whatever it was wrapped."""
        prompt: Any = self.prompt
        nested = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return prompt[0] if nested else prompt  # type: ignore[no-any-return]


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], data: bytes) -> Body:
    """Reads a body.

    Raises:
        ApiError: It is no JSON, or not what the interface knows.
    """
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # of alternatives, that of the right type tells what is wrong
        first = min(errors, key=lambda one: one["type"].endswith("_type"))
        names = [str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
        place = ".".join(name[:64] for name in names[:4] if name not in ("str", "int")) or None
        raise bad_request(f"{place}: {first['msg']}" if place else first["msg"], place) from None
    body.check()
    return body


def _text(content: str | list[_Part] | None) -> str:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def predicted(body: _Body) -> str | None:
    """The text that the output is expected to resemble."""
    return None if body.prediction is None else _text(body.prediction.content)


@dataclass
class Answer:
    """Makes the objects that answer one request.

    Args:
        body: What was asked.
        model: Name of the model.
        spell: Gives the text of one token.
    """

    body: _Body
    model: str
    spell: Any

    def __post_init__(self) -> None:
        self.is_chat = isinstance(self.body, ChatBody)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.offset = 0
        """Characters before the pieces to come, for ``text_offset``."""

    def whole(self, pieces: list[Piece], finish: str, usage: Usage) -> dict[str, Any]:
        """The answer in one."""
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": self._logprobs(pieces)}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._object(kind, [choice], usage=usage_of(usage), sssd=self._own(pieces, usage))

    def opening(self) -> dict[str, Any] | None:
        """The first object of a stream, if there is one before the text."""
        if not self.is_chat:
            return None
        return self._chunk({"role": "assistant", "content": "", "refusal": None}, None, None)

    def part(self, pieces: list[Piece], finish: str | None, usage: Usage) -> dict[str, Any]:
        """A further object of a stream."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs(pieces) if pieces else None
        delta = {"content": text} if text else {}
        return self._chunk(delta if self.is_chat else text, finish, logprobs, self._own(pieces, usage))

    def closing(self, usage: Usage) -> dict[str, Any] | None:
        """The last object of a stream, if it was asked for."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return None
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._object(kind, [], usage=usage_of(usage))

    def _chunk(self, delta: Any, finish: str | None, logprobs: Any, own: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish, "logprobs": logprobs}
        choice["delta" if self.is_chat else "text"] = delta
        return self._object(
            "chat.completion.chunk" if self.is_chat else "text_completion", [choice], sssd=own
        )

    def _object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {
            **about,
            "choices": choices,
            **{key: value for key, value in more.items() if value is not None},
        }

    def _own(self, pieces: list[Piece], usage: Usage) -> dict[str, Any] | None:
        """What only this server tells: which tokens had been drafted, and how long it took."""
        if not self.body.return_accepted:
            return None
        return {
            "tokens": [{"text": piece.text, "accepted": piece.accepted} for piece in pieces],
            "passes": usage.passes,
            "drafted": usage.drafted,
            "accepted": usage.accepted,
            "output": usage.output,
            "seconds": round(usage.seconds, 6),
            "waited_seconds": round(usage.waited, 6),
        }

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        if self.body.count_logprobs is None:
            return None
        pieces = list(pieces)
        if self.is_chat:
            content = [
                {
                    **self._entry(piece.token, piece.logprob),
                    "top_logprobs": [self._entry(*one) for one in piece.alternatives],
                }
                for piece in pieces
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for piece in pieces:
            offsets.append(self.offset)
            self.offset += len(piece.text)
        return {
            "tokens": [self.spell(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [
                {
                    self.spell(token): value
                    for token, value in [*piece.alternatives, (piece.token, piece.logprob)]
                }
                for piece in pieces
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.spell(token)
        # a part of a character has no text of its own
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def usage_of(usage: Usage) -> dict[str, Any]:
    """The counts of a request, in OpenAI's words; what was drafted is told as a prediction is."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.drafted - usage.accepted,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
    }


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
