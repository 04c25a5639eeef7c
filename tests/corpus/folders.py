"""What the tests of corpora share: small documents, and a corpus as a reader sees it."""

from collections import Counter
from pathlib import Path

from sssd.corpus import Corpus, files
from sssd.datastore import Datastore

VOCABULARY = 12


def document(serial: int, length: int = 5) -> list[int]:
    """Tokens 0 to 5, of which documents have much in common, and then some that tell them apart."""
    body = [(serial * step + step // 2) % 6 for step in range(1, length + 1)]
    return body + [6 + serial // 6**place % 6 for place in (3, 2, 1, 0)]


def records(*serials: int) -> list[list[dict[str, object]]]:
    """An input with these documents, each with its number as its id."""
    return [[{"id": serial, "ids": document(serial)} for serial in serials]]


def opened(folder: Path) -> Datastore:
    """The store that a reader opens."""
    found = files(folder)
    return Datastore.open([path for path, _ in found], tombstones=[dead for _, dead in found])


def held(corpus: Corpus) -> Counter[tuple[int, ...]]:
    """The documents of a corpus, as often as they are in it."""
    return Counter(tuple(found.ids.tolist()) for found in corpus.documents())


def occurrences(documents: list[list[int]], query: list[int]) -> int:
    """How often a query occurs within documents, by looking at every place."""
    return sum(
        document[start : start + len(query)] == query
        for document in documents
        for start in range(len(document) - len(query) + 1)
    )
