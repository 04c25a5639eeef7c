"""What a record holds: documents for a datastore, requests for a replay."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd.errors import CorpusError
from sssd.reading.json_rows import is_chat
from sssd.reading.options import ReadOptions, ReadReport, shown
from sssd.reading.template import ChatTemplate

Content = str | NDArray[np.int64]
"""A text, or token ids, int64 [n]."""

TEXT_FIELDS = ("text",)
MESSAGES_FIELDS = ("messages", "conversations", "conversation", "turns")
IDS_FIELDS = ("input_ids", "token_ids", "ids")
PAIRS = (
    ("prompt_ids", "response_ids"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
LAST_FIELDS = ("content",)
TRACE_FIELDS = ("topk_ids", "topk_probs", "prediction_ids")
FIELDS = {
    *(*TEXT_FIELDS, *MESSAGES_FIELDS, *IDS_FIELDS, *LAST_FIELDS, *TRACE_FIELDS, "chosen", "role", "from"),
    *(name for pair in PAIRS for name in pair),
}
"""Fields that are looked for where the caller names none."""

_ROLES = ("role", "from")
_CONTENTS = ("content", "value")
_ANSWER_ROLES = {"assistant", "gpt", "model"}
_OTHER_ROLES = {
    *("user", "human", "prompter", "customer", "client", "question", "instruction", "input"),
    *("system", "developer", "context", "environment", "critic"),
    *("tool", "function", "observation", "ipython", "tool_response", "tool_result", "function_response"),
}
_TEMPLATE_ROLES = {"human": "user", "prompter": "user", "observation": "tool", "function_response": "tool"}


@dataclass(frozen=True)
class Exchange:
    """A prompt and the response to it. ``fields`` is the record, where it holds ids."""

    prompt: Content
    response: Content
    fields: Mapping[str, Any] | None = None


class Records:
    """Takes records apart.

    Args:
        options: which fields hold what.
        report: counts what is met on the way.
        template: the model's chat template, if it has one.
    """

    def __init__(
        self, options: ReadOptions, report: ReadReport, template: ChatTemplate | None = None
    ) -> None:
        self.options, self.report, self.template = options, report, template
        self._answers = {role.lower() for role in options.answer_roles}

    @property
    def wanted(self) -> set[str]:
        """The fields that may be looked at."""
        options = self.options
        named = [options.field, options.text_field, options.ids_field, options.messages_field]
        named += [options.prompt_field, options.response_field]
        chosen = {name for name in named if name}
        return chosen | set(TRACE_FIELDS) if chosen else FIELDS

    def documents(self, record: Any, place: str) -> list[Content]:
        """The documents of a record, none if it has no text.

        Raises:
            CorpusError: no field holds a document, or one does not hold what it should.
        """
        row = _Row(record, place, self.report)
        whole = self.options.chats == "whole"
        kind, names = self._choose(row, ("text", "messages", "pair", "ids", "content"))
        if kind == "none":
            found: list[Content] = []
        elif kind == "messages":
            found = self._chat_documents(row.messages(names[0]), row)
        elif kind == "pair":
            found = [
                _joined(exchange) if whole else exchange.response
                for exchange in self._pair(row, *names, alone=not whole)
            ]
        elif kind == "ids":
            found = [row.ids(names[0])]
        else:
            found = [row.text(names[0])]
        found = [item for item in found if (item.strip() if isinstance(item, str) else len(item))]
        self.report.empty += not found
        return found

    def exchanges(self, record: Any, place: str) -> list[Exchange]:
        """The requests of a record: one, or of a chat one for each message of the model.

        Raises:
            CorpusError: it holds no request, or a field does not hold what it should.
        """
        row = _Row(record, place, self.report)
        kind, names = self._choose(row, ("ids_pair", "messages", "pair"))
        if kind == "none":
            found: list[Exchange] = []
        elif kind == "messages":
            messages = row.messages(names[0])
            found = [Exchange(*texts) for texts in self._turns(messages, row)]
        elif kind == "pair":
            found = list(self._pair(row, *names))
        else:
            raise row.wrong(names[0], "a prompt and a response, or a chat")
        self.report.empty += not found
        return found

    def _choose(self, row: "_Row", order: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """What kind of record it is, and in which fields; "none" if there is nothing in them."""
        options = self.options
        if options.response_field:
            pair = (options.prompt_field or options.response_field, options.response_field)
            return row.present("pair", pair)
        if options.field:
            return row.present(row.kind_of(options.field), (options.field,))
        for kind in ("text", "messages", "ids"):
            if name := getattr(options, f"{kind}_field"):
                return row.present(kind, (name,))
        null = False
        for kind in order:
            for names in _candidates(kind):
                if all(name in row.fields for name in names):
                    null = True
                    value = row.fields[names[-1]]
                    if value is not None if kind == "ids_pair" else not _is_void(value):
                        return "pair" if kind == "ids_pair" else kind, names
        if null:
            return "none", ()
        raise row.missing(None, "a document" if "ids" in order else "a request")

    def _chat_documents(self, messages: list[dict[str, Any]], row: "_Row") -> list[Content]:
        if self.options.chats == "answers":
            return [answer for _, answer in self._turns(messages, row)]
        plain = [self._message(message, row) for message in messages]
        return [self._render(plain, row, start=False)] if plain else []

    def _pair(self, row: "_Row", prompt: str, response: str, *, alone: bool = False) -> Iterator[Exchange]:
        """The requests of two fields. If the response is wanted ``alone``, there need be no prompt."""
        if alone and row.fields[prompt] is None:
            prompt = response
        before, after = row.fields[prompt], row.fields[response]
        if is_chat(after):
            messages = row.checked_messages(after, response)
            if isinstance(before, str):
                before = [{"role": "user", "content": row.text(prompt)}]
            before = [] if prompt == response else row.checked_messages(before, prompt)
            if messages[: len(before)] != before:  # preferences often have the prompt in both
                messages = [*before, *messages]
            yield from (Exchange(*texts) for texts in self._turns(messages, row, len(before)))
            return
        if is_ids(after) or is_ids(before) or response.endswith("_ids"):
            yield Exchange(row.ids(prompt) if prompt != response else NO_IDS, row.ids(response), row.fields)
            return
        if is_chat(before):
            messages = [self._message(message, row) for message in row.checked_messages(before, prompt)]
            yield Exchange(self._render(messages, row, start=True), row.text(response))
            return
        texts = [row.text(prompt)] if prompt != response else []
        if (prompt, response) == ("instruction", "output") and row.fields.get("input"):
            texts.append(row.text("input"))
        yield Exchange("\n\n".join(texts), row.text(response))

    def _turns(
        self, messages: list[dict[str, Any]], row: "_Row", first: int = 0
    ) -> Iterator[tuple[str, str]]:
        """What precedes each message of the model, from message ``first`` on, and the message."""
        plain = [self._message(message, row) for message in messages]
        for at, message in enumerate(plain):
            if at < first or not self._is_answer(messages[at], count=True):
                continue
            content = message["content"] or ""
            if self.template is not None and (content or message.get("tool_calls")):
                yield self._rendered_turn(plain, at, row)
            elif content:
                yield self._render(plain[:at], row, start=True), content

    def _rendered_turn(self, messages: list[dict[str, Any]], at: int, row: "_Row") -> tuple[str, str]:
        """The prompt that the template makes for a message, and what the model answers with, its end of
        turn included.
        """
        until = self._render(messages[: at + 1], row, start=False)
        content = str(messages[at]["content"] or "")
        for start in (True, False):
            before = self._render(messages[:at], row, start=start) if at or start else ""
            if until.startswith(before):
                answer = until[len(before) :]
                # white space after the end of turn is not the model's
                return before, answer if answer.rstrip().endswith(content.rstrip()) else answer.rstrip()
        return self._render(messages[:at], row, start=True), content

    def _render(self, messages: list[dict[str, Any]], row: "_Row", *, start: bool) -> str:
        if self.template is None:
            texts = (f"<{message['role']}>\n{message['content'] or ''}\n" for message in messages)
            return row.clean("".join(texts))
        try:
            return row.clean(self.template.render(messages, add_generation_prompt=start))
        except CorpusError as error:
            raise CorpusError(f"{row.place}: {error}") from None

    def _message(self, message: dict[str, Any], row: "_Row") -> dict[str, Any]:
        """A message with ``role`` and ``content``, as templates take it."""
        role = _role(message)
        content = message.get("content")
        if content is None:
            content = message.get("value")
        if isinstance(content, list):  # parts, of which some may be pictures
            parts = (part.get("text") if isinstance(part, dict) else part for part in content)
            content = "".join(part for part in parts if isinstance(part, str))
        if content is not None and not isinstance(content, str):
            raise CorpusError(
                f"{row.place}: the content of a message of {role!r} must be text, not {kind(content)}"
            )
        if content is not None:
            content = row.clean(content)
        known = _TEMPLATE_ROLES.get(role.lower(), role)
        if self._is_answer(message):
            known = "assistant"
        elif role.lower() in _OTHER_ROLES and role.lower() not in _TEMPLATE_ROLES:
            known = role.lower()
        if self.template is None:
            known = role
        # tables have every key in every message
        others = {
            name: value
            for name, value in message.items()
            if name not in (*_ROLES, *_CONTENTS) and value is not None
        }
        return {**others, "role": known, "content": content}

    def _is_answer(self, message: dict[str, Any], count: bool = False) -> bool:
        role = _role(message)
        if self._answers:
            return role.lower() in self._answers
        if role.lower() in _ANSWER_ROLES:
            return True
        if role.lower() in _OTHER_ROLES:
            return False
        if count:
            self.report.roles[role] = self.report.roles.get(role, 0) + 1
        return True


class _Row:
    """The fields of a record, and errors that name its place."""

    def __init__(self, record: Any, place: str, report: ReadReport) -> None:
        self.place, self.report = place, report
        if isinstance(record, Mapping):
            self.fields: Mapping[str, Any] = record
            if is_chat([record]):  # a file with a message a line
                self.fields = {"messages": [record]}
        elif isinstance(record, str):
            self.fields = {"text": record}
        elif is_chat(record):
            self.fields = {"messages": record}
        elif isinstance(record, list | np.ndarray) and len(record) and is_ids(record):
            self.fields = {"ids": record}
        else:
            raise CorpusError(f"{place}: expected an object, not {kind(record)}")

    def text(self, name: str) -> str:
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        return self.clean(value)

    def clean(self, text: str) -> str:
        """The text in valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.report.replaced += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def ids(self, name: str) -> NDArray[np.int64]:
        value = self.fields[name]
        if not is_ids(value):
            raise self.wrong(name, "a list of token ids (integers from 0 on)")
        return np.asarray(value, np.int64)

    def messages(self, name: str) -> list[dict[str, Any]]:
        return self.checked_messages(self.fields[name], name)

    def checked_messages(self, value: Any, name: str) -> list[dict[str, Any]]:
        if isinstance(value, list | tuple) and not len(value):
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "a list of messages")
        for number, message in enumerate(value):
            if not isinstance(message, dict) or not isinstance(_role(message), str):
                raise CorpusError(f"{self.place}: field {name!r}: message {number + 1} has no role")
        return value

    def kind_of(self, name: str) -> str:
        """What a field of any form holds."""
        value = self.fields.get(name)
        if isinstance(value, str) or value is None:
            return "text"
        if is_ids(value):
            return "ids"
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return "messages"
        raise self.wrong(name, "text, token ids or a list of messages")

    def present(self, found: str, names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        for name in names:
            if name not in self.fields:
                raise self.missing(name)
        return ("none" if self.fields[names[-1]] is None else found), names

    def missing(self, name: str | None, what: str = "") -> CorpusError:
        wanted = f"no field {name!r}"
        if name is None:
            wanted = f"no field that is known to hold {what}; --text-field and the like choose one"
        there = ", ".join(map(shown, list(self.fields)[:20])) or "none"
        return CorpusError(f"{self.place}: {wanted} (fields: {there})")

    def wrong(self, name: str, wanted: str) -> CorpusError:
        return CorpusError(f"{self.place}: field {name!r} must be {wanted}, not {kind(self.fields[name])}")


NO_IDS = np.zeros(0, np.int64)


def is_ids(value: Any) -> bool:
    """Whether a value is a list of integers from 0 to 2^31, or an array of them."""
    if isinstance(value, np.ndarray):
        return (
            value.ndim == 1
            and value.dtype.kind in "iu"
            and (not len(value) or 0 <= value.min() <= value.max() < 2**31)
        )
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list | tuple | np.ndarray):
        if not len(value):
            return "an empty list"
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | np.integer):
                return f"a list with {kind(item)} in it"
        return f"a list of integers from {_short(min(value))} to {_short(max(value))}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {_short(value)}"
    names = {str: "text", dict: "an object", type(None): "null", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def _short(number: Any) -> str:
    text = str(number)
    return text if len(text) <= 24 else f"{text[:8]}... ({len(text)} digits)"


def _role(message: dict[str, Any]) -> Any:
    role = message.get("role")
    return message.get("from") if role is None else role


def _joined(exchange: Exchange) -> Content:
    prompt, response = exchange.prompt, exchange.response
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt + response
    return np.concatenate([prompt, response])


def _is_void(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | np.ndarray) and not len(value))


def _candidates(kind: str) -> tuple[tuple[str, ...], ...]:
    if kind == "pair":
        return PAIRS
    if kind == "ids_pair":
        return PAIRS[:1]
    names = {"text": TEXT_FIELDS, "messages": MESSAGES_FIELDS, "ids": IDS_FIELDS, "content": LAST_FIELDS}[
        kind
    ]
    return tuple((name,) for name in names)
