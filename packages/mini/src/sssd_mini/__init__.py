"""The text of sssd's mini store: answers of language models to many kinds of questions. SOURCES.md says where
each is from and under which licence.
"""

import hashlib
import lzma
from collections.abc import Iterator
from importlib.resources import files

__version__ = "1.0.0"

_DATA = files(__name__).joinpath("texts.jsonl.xz")

DIGEST = hashlib.sha256(_DATA.read_bytes()).hexdigest()
"""SHA-256 of the packed text, in hexadecimal."""


def lines() -> Iterator[str]:
    """The documents, each a JSON object with the members ``text`` and ``source``."""
    with _DATA.open("rb") as packed, lzma.open(packed, "rt", encoding="utf-8") as text:
        yield from text
