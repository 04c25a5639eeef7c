"""What a caller can say about inputs, and what reading says about them in turn."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from sssd.errors import CorpusError, InvalidArgumentError

FORMATS = ("json", "jsonl", "parquet", "arrow", "csv", "tsv", "text", "npy", "bin")
"""Formats of inputs. "json" and "jsonl" are one: objects, one a line, in an array or over several lines."""

DTYPES = ("uint16", "uint32", "int32", "int64")
"""Types of token ids in .bin files."""

MAX_RECORD_BYTES = 256 << 20
"""The longest JSON record or table row that is read; plain text of any length is."""

MAX_SHARDS = 100_000
"""The most shares that inputs are cut into."""

Bad = Callable[[CorpusError], None]
"""What is told of a bad record: raises, or takes note so that reading goes on with the next."""


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read. Everything has a default that suits inputs in common forms.

    Attributes:
        format: one of :data:`FORMATS`, for all inputs; by name and contents if None.
        field: member or column that holds the document, in any form: text, token ids, or a chat.
        text_field: the same, and it must be text.
        ids_field: the same, and it must be token ids.
        messages_field: the same, and it must be a chat (a list of messages).
        prompt_field: with ``response_field``: the two that make a request. Text, ids or messages.
        response_field: see ``prompt_field``; documents are made of the response.
        answer_roles: names of roles whose messages are the model's; by default all but those known as the
            user's, the system's and tools'.
        chats: "answers": each message of the model is a document, with the end of turn that the chat
            template writes; "whole": each chat is one, as the template writes it.
        dtype: type of the ids in .bin files, one of :data:`DTYPES`; by the vocabulary's size if None.
        encoding: of text, JSON and CSV; UTF-8 if None.
        include: patterns of names (``*.jsonl``) or paths below a folder, of which a file must match one.
        exclude: patterns of what is left out of folders.
        skip_bad: leave out what cannot be read, and count it, instead of raising.
        shard: (i, n): read only the share i, from 0 on, of n. Shares are of files; of records where there are
            fewer files than shares.
    """

    format: str | None = None
    field: str | None = None
    text_field: str | None = None
    ids_field: str | None = None
    messages_field: str | None = None
    prompt_field: str | None = None
    response_field: str | None = None
    answer_roles: tuple[str, ...] = ()
    chats: Literal["answers", "whole"] = "answers"
    dtype: str | None = None
    encoding: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_bad: bool = False
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("answer_roles", "include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise InvalidArgumentError(
                    f"{name} must be several strings, not one: ({getattr(self, name)!r},)"
                )
        for name, known in (("format", FORMATS), ("dtype", DTYPES), ("chats", ("answers", "whole"))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InvalidArgumentError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        chosen = [
            name for name in ("field", "text_field", "ids_field", "messages_field") if getattr(self, name)
        ]
        chosen += ["response_field"] if self.response_field or self.prompt_field else []
        if len(chosen) > 1:
            raise InvalidArgumentError(f"give one of {' and '.join(chosen)}, not both")
        if self.prompt_field and not self.response_field:
            raise InvalidArgumentError("prompt_field needs response_field")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1] <= MAX_SHARDS:
            raise InvalidArgumentError(
                f"a shard must be (i, n) with 0 <= i < n <= {MAX_SHARDS}, not {self.shard}"
            )
        if self.encoding is not None:
            try:
                "a".encode(self.encoding)
            except LookupError:
                raise InvalidArgumentError(f"unknown encoding {self.encoding!r}") from None


@dataclass
class ReadReport:
    """What reading has seen, apart from the documents.

    Attributes:
        documents: documents or requests read.
        empty: records that hold no text: null, blank, or a chat without an answer.
        bad: records or rests of files that could not be read and were skipped; ``errors`` has the first few.
        left_out: inputs that were not read, each with the reason.
        replaced: texts in which half of a surrogate pair became U+FFFD.
        roles: messages taken as the model's although their role is not a known name of it, by role.
    """

    documents: int = 0
    empty: int = 0
    bad: int = 0
    errors: list[CorpusError] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    replaced: int = 0
    roles: dict[str, int] = field(default_factory=dict)

    def bad_record(self, options: ReadOptions) -> Bad:
        """What to call with a bad record: raises it, or counts it if these are to be skipped."""

        def note(error: CorpusError) -> None:
            if not options.skip_bad:
                raise error
            self.bad += 1
            if len(self.errors) < 10:
                self.errors.append(error)

        return note

    def notes(self, most: int = 10) -> list[str]:
        """Lines for people: what was left out, skipped or changed; at most ``most`` of each kind by name."""
        lines = [f"left out {name}: {reason}" for name, reason in self.left_out[:most]]
        if len(self.left_out) > most:
            lines.append(f"left out {len(self.left_out) - most:,} more files")
        lines += [f"skipped {error}" for error in self.errors[:most]]
        if self.bad:
            lines.append(f"skipped {self.bad:,} bad records in all")
        if self.empty:
            lines.append(f"{self.empty:,} records without text")
        if self.replaced:
            lines.append(f"{self.replaced:,} texts had half a surrogate pair, which became U+FFFD")
        if self.roles:
            counts = ", ".join(f"{shown(role)} ({count:,})" for role, count in [*self.roles.items()][:most])
            lines.append(f"taken as the model's answers by role: {counts}; --answer-role chooses")
        return lines


def shown(name: object) -> str:
    """A file's name for messages: on one line and in valid Unicode, whatever its bytes are."""
    text = (
        os.fsencode(name).decode("utf-8", "backslashreplace") if isinstance(name, os.PathLike) else str(name)
    )
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
