"""What a corpus holds: its manifest, a small file that is replaced whole."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sssd.errors import CorpusError, CorruptCorpusError, DatastoreVersionError
from sssd.reading.options import shown

T = TypeVar("T")

NAME = "manifest.json"
VERSION = 1
MAX_BYTES = 64 << 20
"""The longest manifest that is written and read."""

_LARGEST = (1 << 63) - 1
_MAX_METADATA = 64


@dataclass(frozen=True)
class Part:
    """Documents of a segment that came together, from one source.

    Attributes:
        source: the label they were added with.
        added: when, in seconds since 1970 (UTC).
        documents: how many, deleted ones included.
        tokens: of all of them.
        dead_documents: how many of them are deleted.
        dead_tokens: theirs.
        digest: of the documents as they were added; None once some are gone.
        metadata: what else the caller said about them.
    """

    source: str
    added: int
    documents: int
    tokens: int
    dead_documents: int = 0
    dead_tokens: int = 0
    digest: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dead:
    """Deleted documents of a segment, by the names of two files.

    Attributes:
        flags: which documents.
        tombstones: the same for look-ups.
    """

    flags: str
    tombstones: str


@dataclass(frozen=True)
class Segment:
    """A datastore file of a corpus, with what is known of its documents.

    Attributes:
        uuid: the file's, which is also its name.
        tokens: deleted ones included.
        documents: likewise.
        bytes: of the file.
        written_at: the manifest's ``written`` when the segment had been written.
        table: name of the file that has a row for each document.
        parts: in the order of the documents.
        dead: deleted documents, None without any.
    """

    uuid: str
    tokens: int
    documents: int
    bytes: int
    written_at: int
    table: str
    parts: tuple[Part, ...]
    dead: Dead | None = None

    @property
    def file(self) -> str:
        """Name of the datastore file."""
        return f"{self.uuid}.sssd"

    @property
    def dead_documents(self) -> int:
        """Documents that are deleted but still in the file."""
        return sum(part.dead_documents for part in self.parts)

    @property
    def dead_tokens(self) -> int:
        """Their tokens."""
        return sum(part.dead_tokens for part in self.parts)

    @property
    def living(self) -> int:
        """Tokens that are not deleted."""
        return self.tokens - self.dead_tokens

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all its files."""
        rest = () if self.dead is None else (self.dead.flags, self.dead.tombstones)
        return (self.file, self.table, *rest)


@dataclass(frozen=True)
class Manifest:
    """The state of a corpus. One is never changed: the next takes its place.

    Attributes:
        corpus: a random name that tells corpora apart.
        generation: how often the manifest has been replaced.
        vocab_size: number of token ids.
        fingerprint: of the tokenizer, in hexadecimal; None if unknown.
        written: tokens written to segments so far, those of merges included.
        segments: oldest first; never none.
        retired: files that only readers of earlier manifests may still need, and since when (seconds since
            1970).
    """

    corpus: str
    generation: int
    vocab_size: int
    fingerprint: str | None
    written: int
    segments: tuple[Segment, ...]
    retired: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that are not deleted."""
        return sum(segment.living for segment in self.segments)

    @property
    def files(self) -> set[str]:
        """Names of the files that are part of the corpus."""
        return {name for segment in self.segments for name in segment.files}

    @property
    def version(self) -> str:
        """SHA-256 of all that readers go by: of everything but ``retired``."""
        return _checksum(asdict(replace(self, retired={})))

    def after(self, segments: tuple[Segment, ...], written: int, now: int) -> "Manifest":
        """The next manifest, with these segments after ``written`` more tokens."""
        new = replace(self, segments=segments, generation=self.generation + 1, written=self.written + written)
        gone = self.files - new.files
        kept = {name: since for name, since in self.retired.items() if name not in new.files}
        return replace(new, retired={**dict.fromkeys(sorted(gone), now), **kept})

    def to_bytes(self) -> bytes:
        """The file's contents.

        Raises:
            CorpusError: it would be too long.
        """
        content = asdict(self)
        whole = {"format": "sssd corpus", "version": VERSION, "checksum": _checksum(content), **content}
        data = (json.dumps(whole, indent=1) + "\n").encode()
        if len(data) > MAX_BYTES:
            parts = sum(len(segment.parts) for segment in self.segments)
            raise CorpusError(
                f"{parts:,} sources are more than a manifest holds; give those that are deleted together one "
                "--source"
            )
        return data


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a corpus.

    Raises:
        CorpusError: the folder is no corpus.
        CorruptCorpusError: the manifest is damaged.
        DatastoreVersionError: another release wrote it.
        OSError: it cannot be read.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(
            f"{shown(folder)} is no corpus: it has no {NAME}; `python -m sssd corpus add` makes one"
        ) from None
    return manifest_from_bytes(data, shown(path))


def manifest_from_bytes(data: bytes, name: str) -> Manifest:
    """Reads what :meth:`Manifest.to_bytes` wrote.

    Raises:
        As load_manifest.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is longer than {MAX_BYTES} bytes")
        content = json.loads(data, parse_constant=refuse)
        if content.pop("format") != "sssd corpus":
            raise ValueError("it is none")
        version = content.pop("version")
        if version != VERSION:
            raise DatastoreVersionError(
                f"{name} has version {version!r}, and this release reads version {VERSION} only"
            )
        if content.pop("checksum") != _checksum(content):
            raise ValueError("its checksum is wrong")
        return _manifest(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCorpusError(
            f"{name} is damaged ({error}); put back a copy, or pull the corpus again"
        ) from None


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the contents in one form, whatever the file's layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _manifest(content: Any) -> Manifest:
    found = _Fields(content)
    manifest = Manifest(
        corpus=found.name("corpus", _HEX),
        generation=found.number("generation"),
        vocab_size=found.number("vocab_size", least=1, most=1 << 24),
        fingerprint=found.optional("fingerprint", lambda name: found.name(name, _FINGERPRINT)),
        written=found.number("written"),
        segments=tuple(map(_segment, found.items("segments"))),
        retired={
            _matched(name, _FILE): _number(since, name) for name, since in found.mapping("retired").items()
        },
    )
    found.end()
    if not manifest.segments or len(manifest.files & manifest.retired.keys()):
        raise ValueError("its segments cannot be right")
    if len({segment.uuid for segment in manifest.segments}) < len(manifest.segments):
        raise ValueError("a segment is named twice")
    return manifest


def _segment(content: Any) -> Segment:
    found = _Fields(content)
    segment = Segment(
        uuid=found.name("uuid", _UUID),
        tokens=found.number("tokens"),
        documents=found.number("documents"),
        bytes=found.number("bytes"),
        written_at=found.number("written_at"),
        table=found.name("table", _TABLE),
        parts=tuple(map(_part, found.items("parts"))),
        dead=found.optional("dead", lambda name: _dead(found.take(name))),
    )
    found.end()
    totals = sum(part.documents for part in segment.parts), sum(part.tokens for part in segment.parts)
    if totals != (segment.documents, segment.tokens):
        raise ValueError(f"the parts of segment {segment.uuid} do not add up")
    if bool(segment.dead_documents) != (segment.dead is not None):
        raise ValueError(f"segment {segment.uuid}: deleted documents without a list of them, or the reverse")
    return segment


def _dead(content: Any) -> Dead:
    found = _Fields(content)
    dead = Dead(found.name("flags", _FLAGS), found.name("tombstones", _TOMBSTONES))
    found.end()
    return dead


def _part(content: Any) -> Part:
    found = _Fields(content)
    part = Part(
        source=found.text("source"),
        added=found.number("added"),
        documents=found.number("documents"),
        tokens=found.number("tokens"),
        dead_documents=found.number("dead_documents"),
        dead_tokens=found.number("dead_tokens"),
        digest=found.optional("digest", lambda name: found.name(name, _HEX)),
        metadata=check_metadata(found.mapping("metadata")),
    )
    found.end()
    if part.dead_documents > part.documents or part.dead_tokens > part.tokens:
        raise ValueError(f"more is deleted of {part.source!r} than there is")
    return part


def check_metadata(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """A caller's metadata.

    Raises:
        ValueError: it is more than a few short texts.
    """
    if len(metadata) > _MAX_METADATA:
        raise ValueError(f"at most {_MAX_METADATA} items of metadata, not {len(metadata)}")
    return {_text(name, "metadata"): _text(value, f"metadata {name!r}") for name, value in metadata.items()}


_HEX = re.compile("[0-9a-f]{32}")
_FINGERPRINT = re.compile("[0-9a-f]{64}")
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TABLE = re.compile(rf"{_HEX.pattern}\.documents\.npy")
_FLAGS = re.compile(rf"{_HEX.pattern}\.dead\.npy")
_TOMBSTONES = re.compile(rf"{_HEX.pattern}\.tombstones")
_FILE = re.compile(rf"({_UUID.pattern}\.sssd)|({_TABLE.pattern})|({_FLAGS.pattern})|({_TOMBSTONES.pattern})")


def is_own(name: str) -> bool:
    """Whether a file has a name that only files of a corpus have."""
    return _FILE.fullmatch(name) is not None


def _matched(text: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{str(text)[:80]!r} is no name of a file or corpus")
    return text


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError(f"{name} must be a text of at most 4096 characters")
    value.encode()  # half a surrogate pair is a ValueError
    return value


def _number(value: Any, name: str, least: int = 0, most: int = _LARGEST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}")
    return value


class _Fields:
    """The members of an object, each of which is asked for once."""

    def __init__(self, content: Any) -> None:
        if not isinstance(content, dict):
            raise TypeError("an object is missing")
        self._left = dict(content)

    def take(self, name: str) -> Any:
        return self._left.pop(name)

    def number(self, name: str, least: int = 0, most: int = _LARGEST) -> int:
        return _number(self.take(name), name, least, most)

    def text(self, name: str) -> str:
        return _text(self.take(name), name)

    def name(self, name: str, pattern: re.Pattern[str]) -> str:
        return _matched(self.take(name), pattern)

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        if self._left[name] is None:
            return self.take(name)  # type: ignore[no-any-return]
        return read(name)

    def items(self, name: str) -> Iterator[Any]:
        value = self.take(name)
        if not isinstance(value, list):
            raise TypeError(f"{name} must be a list")
        return iter(value)

    def mapping(self, name: str) -> dict[Any, Any]:
        value = self.take(name)
        if not isinstance(value, dict):
            raise TypeError(f"{name} must be an object")
        return value

    def end(self) -> None:
        if self._left:
            raise ValueError(f"unknown members: {', '.join(sorted(self._left))[:80]}")
