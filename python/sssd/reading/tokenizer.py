"""Tokenizers: loaded whole, without truncation and padding, and told apart by fingerprints."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, cast

from sssd.errors import InvalidArgumentError
from sssd.reading.options import shown
from sssd.reading.template import ChatTemplate, template_of_folder, template_text, template_tokens, tokens_of

_PROBE = "The quick brown fox jumps over the lazy dog. HELLO, World: 1234567890 don't naïve café 東京 привет"
"""A text of one line and single spaces, of which tokenizers of one kind make the same ids however they are
loaded.
"""


class VocabularyOwner(Protocol):
    """What a fingerprint needs of a tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""


def vocabulary_fingerprint(tokenizer: VocabularyOwner) -> bytes:
    """SHA-256 of the vocabulary in the order of the ids, 32 bytes."""
    return cast(bytes, _vocabulary(tokenizer).digest())


def tokenizer_fingerprint(tokenizer: VocabularyOwner) -> bytes:
    """SHA-256 of the vocabulary, added tokens included, and of how a text is split into it, 32 bytes.

    Equal for a tokenizer wherever it was loaded from and whether it is one of tokenizers or of transformers;
    truncation, padding and special tokens around a text make no difference. Other tokens, other ids, other
    merges, another normalisation make another one.
    """
    digest = _vocabulary(tokenizer)
    if hasattr(tokenizer, "encode"):
        loaded = tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer(tokenizer, "")
        digest.update(repr(loaded.encode(_PROBE)).encode())
    return cast(bytes, digest.digest())


def _vocabulary(tokenizer: VocabularyOwner) -> Any:
    tokens = sorted(tokenizer.get_vocab().items(), key=itemgetter(1, 0))
    text = "".join(f"{token_id}\t{len(token)}\t{token}\n" for token, token_id in tokens)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass"))


class LoadedTokenizer:
    """A tokenizer that takes every text whole.

    Args:
        tokenizer: of the library tokenizers or of transformers. It is left as it is: one that truncates or
            pads is copied.
        name: for messages.
        template: the model's chat template, if it has one.
        end_token: the token that ends the model's texts; by default what one of transformers says.

    Raises:
        InvalidArgumentError: it is no such tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        template: ChatTemplate | None = None,
        end_token: str | None = None,
    ) -> None:
        for method in ("encode", "decode", "get_vocab"):
            if not hasattr(tokenizer, method):
                kind = type(tokenizer).__name__
                raise InvalidArgumentError(f"a tokenizer of tokenizers or transformers is needed, not {kind}")
        self.name, self.template = name, template
        self._end_token = end_token or getattr(tokenizer, "eos_token", None)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._fast = hasattr(backend, "encode_batch_fast") or hasattr(backend, "encode_batch")
        if self._fast and (backend.truncation is not None or backend.padding is not None):
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        self._tokenizer = backend if self._fast else tokenizer

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return cast("dict[str, int]", self._tokenizer.get_vocab())

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one."""
        return 1 + max(self.get_vocab().values(), default=0)

    @cached_property
    def end_token_id(self) -> int | None:
        """The id of the token that ends the model's texts, None if that is not known."""
        return None if self._end_token is None else self.get_vocab().get(self._end_token)

    @cached_property
    def fingerprints(self) -> tuple[bytes, bytes]:
        """:func:`tokenizer_fingerprint`, and that of the vocabulary alone, which earlier stores hold."""
        return tokenizer_fingerprint(self), vocabulary_fingerprint(self)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoding.ids if self._fast else encoding)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts."""
        if not self._fast:
            return [self.encode(text) for text in texts]
        encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)  # type: ignore[no-any-return]


def load_tokenizer(source: Any, chat_template: str | None = None) -> LoadedTokenizer:
    """A tokenizer from a tokenizer.json, the folder that holds it, or an object.

    Args:
        source: a path, or a tokenizer of tokenizers or transformers.
        chat_template: file of a chat template, or "none"; by default that of the folder.

    Raises:
        InvalidArgumentError: there is no tokenizer, it cannot be read, or tokenizers is not installed.
    """
    if isinstance(source, LoadedTokenizer):
        return source
    if not isinstance(source, str | Path):
        name = shown(getattr(source, "name_or_path", None) or f"the given {type(source).__name__}")
        return LoadedTokenizer(source, name, _template_of(source, chat_template))
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InvalidArgumentError("--tokenizer needs tokenizers: pip install 'sssd[corpus]'") from None
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        advice = "give a tokenizer.json or a folder with one, such as a downloaded model's"
        raise InvalidArgumentError(f"no tokenizer.json at {shown(path)}; {advice}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no class of its own
        raise InvalidArgumentError(
            f"{shown(file)} is no tokenizer of the library tokenizers ({error})"
        ) from None
    end_token = None
    with suppress(InvalidArgumentError):  # the file beside it that says so cannot be read
        end_token = template_tokens(file.parent).get("eos_token")
    return LoadedTokenizer(tokenizer, shown(path), _template_of(file.parent, chat_template), end_token)


def _template_of(source: Any, chosen: str | None) -> ChatTemplate | None:
    """The chat template that was chosen, or else that of a tokenizer's folder or of one of transformers."""
    if chosen == "none":
        return None
    folder = source if isinstance(source, Path) else None
    if folder is not None and chosen is None:
        return template_of_folder(folder)
    tokens = template_tokens(folder) if folder else tokens_of(getattr(source, "special_tokens_map", {}))
    text = getattr(source, "chat_template", None) if chosen is None else template_text(Path(chosen))
    return ChatTemplate(text, tokens) if isinstance(text, str) else None
