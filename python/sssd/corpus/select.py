"""Which documents to keep where not all can be: evenly by source or cluster, or what helps given traffic."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sssd.datastore import Reading, as_items, no_document
from sssd.errors import InvalidArgumentError, InvalidTokenError
from sssd.reading.inputs import Input, find_inputs
from sssd.reading.options import ReadOptions, ReadReport
from sssd.reading.records import Content
from sssd.reading.tokenizer import load_tokenizer
from sssd.replay import read_trace

By = Literal["source", "cluster", "traffic"]
WAYS: tuple[By, ...] = ("source", "cluster", "traffic")
"""How documents can be selected."""

_CLUSTERS = 16
_ROUNDS = 20
_BUCKETS = 256
_ORDER = 3
"""Tokens of the n-grams by which traffic is covered."""
_MULTIPLIER = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: multiples of it are spread evenly (Knuth, volume 3, section 6.4)."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """A document that can be selected.

    Attributes:
        source: name of the input that it comes from.
        ids: its tokens, int32 [n], the end token included if one was given.
        text: its text, None where it was read as tokens.
    """

    source: str
    ids: Ids
    text: str | None


def select(
    inputs: Any,
    take: int,
    *,
    by: By = "source",
    traffic: Any = (),
    tokenizer: Any = None,
    chat_template: str | None = None,
    vocab_size: int | None = None,
    end_token_id: int | None = None,
    options: ReadOptions | None = None,
    report: ReadReport | None = None,
) -> list[Document]:
    """The documents of a corpus that are worth most for their number of tokens.

    All documents are held in memory meanwhile, 4 bytes a token and their text. The result depends on the
    inputs alone.

    Args:
        inputs: as for :func:`sssd.datastore.build`.
        take: the most tokens of the selection.
        by: ``"source"`` or ``"cluster"``: equal shares of the inputs, or of clusters of documents with like
            tokens, and where one has less than its share the others have more; ``"traffic"``: documents with
            most of the n-grams of what was answered in ``traffic``.
        traffic: recorded requests, as for ``replay``; needed by ``"traffic"`` alone.
        tokenizer, chat_template, vocab_size, end_token_id, options: as for :func:`sssd.datastore.build`.
        report: takes note of what is skipped.

    Returns:
        Documents in the order of the inputs.

    Raises:
        InvalidArgumentError: an argument is out of range or missing.
        CorpusError: an input cannot be read.
        EmptyCorpusError: there is no document.
        OSError: a file cannot be read.
    """
    if take < 1:
        raise InvalidArgumentError(f"the tokens to take must be at least 1, not {take}")
    if by not in WAYS:
        raise InvalidArgumentError(f"documents are selected by {', '.join(WAYS)}, not by {by!r}")
    items = list(as_items(traffic))
    if (by == "traffic") != bool(items):
        raise InvalidArgumentError(
            "selecting by traffic needs recorded requests, and nothing else takes them"
        )
    options, report = options or ReadOptions(), report or ReadReport()
    loaded = None if tokenizer is None else load_tokenizer(tokenizer, chat_template)
    if vocab_size is None:
        if loaded is None:
            raise InvalidArgumentError("give --vocab-size or --tokenizer")
        vocab_size = loaded.vocab_size
    found = find_inputs(as_items(inputs), options, report)
    gathered = _Gathered(vocab_size)
    _Gathering(gathered, loaded, vocab_size, end_token_id, options, report).read(
        found, lambda *_: None, gathered.start
    )
    documents = gathered.documents
    if not documents:
        raise no_document(len(found), report)
    sizes = np.array([len(document.ids) for document in documents])
    if by == "traffic":
        asked = [request.response_ids for item in items for request in read_trace(item, loaded)]
        chosen = most_useful([document.ids for document in documents], asked, take)
    else:
        groups = sources(documents) if by == "source" else clusters([document.ids for document in documents])
        chosen = evenly(sizes, groups, take)
    return [documents[place] for place in chosen.tolist()]


class _Gathered:
    """A sink that keeps all documents."""

    def __init__(self, vocab_size: int) -> None:
        self.documents: list[Document] = []
        self._vocab_size, self._source = vocab_size, ""
        self._open: list[NDArray[np.int64]] = []

    def start(self, input: Input) -> None:
        self._source = input.name

    def add(self, ids: Any, text: str | None = None) -> None:
        held = np.asarray(ids, np.int64)
        wrong = held[(held < 0) | (held >= self._vocab_size)]
        if len(wrong):
            raise InvalidTokenError(f"token {wrong[0]} is outside 0..{self._vocab_size - 1}")
        if len(held):
            self.documents.append(Document(self._source, held.astype(np.int32), text))

    def add_stream(self, ids: Any, end_token_id: int) -> None:
        held = np.asarray(ids, np.int64)
        *whole, rest = np.split(held, np.flatnonzero(held == end_token_id) + 1)
        for piece in whole:
            self._open.append(piece)
            self.end_stream()
        self._open.append(rest)

    def end_stream(self) -> None:
        pieces, self._open = self._open, []
        if pieces:
            self.add(np.concatenate(pieces))


class _Gathering(Reading):
    """Hands texts on beside their tokens."""

    def _documents(self, record: Any, place: str) -> list[tuple[Content, tuple[str | int, ...]]]:
        found = self.records.documents(record, place)
        return [(document, (document,) if isinstance(document, str) else ()) for document in found]


def sources(documents: Sequence[Document]) -> NDArray[np.int64]:
    """The number of each document's source, int64 [n]."""
    names = {name: number for number, name in enumerate(dict.fromkeys(d.source for d in documents))}
    return np.array([names[document.source] for document in documents], np.int64)


def evenly(sizes: NDArray[np.int64], groups: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Documents in equal shares of their groups, spread evenly over each.

    Args:
        sizes: tokens of each document, int64 [n].
        groups: number of the group of each, int64 [n].
        total: the most tokens.

    Returns:
        Places of the documents, int64, rising.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    members.sort(key=lambda places: int(sizes[places].sum()))
    chosen: list[NDArray[np.int64]] = []
    left = total
    for number, places in enumerate(members):
        share = left // (len(members) - number)
        order = places[np.argsort(_spread(len(places)), kind="stable")]
        taken = order[np.cumsum(sizes[order]) <= share]
        chosen.append(taken)
        left -= int(sizes[taken].sum())
    return np.sort(np.concatenate(chosen))


def _spread(count: int) -> NDArray[np.uint64]:
    """Keys: of ``count`` things in their order any first part is spread evenly; uint64 [count]."""
    return np.arange(count, dtype=np.uint64) * np.uint64(_MULTIPLIER)


def clusters(documents: Sequence[Ids], count: int = _CLUSTERS) -> NDArray[np.int64]:
    """Clusters of documents with like tokens: spherical k-means over sketches (Dhillon and Modha, 2001).

    Args:
        documents: tokens, int32 [m] each.
        count: the most clusters.

    Returns:
        The number of each document's cluster, int64 [n].
    """
    points = _sketches(documents)
    centres = points[[0]]
    nearest = points @ centres[0]
    while len(centres) < min(count, len(points)):  # the farthest from those before
        far = int(nearest.argmin())
        centres = np.vstack([centres, points[far]])
        nearest = np.maximum(nearest, points @ points[far])
    labels: NDArray[np.int64] = (points @ centres.T).argmax(1)
    for _ in range(_ROUNDS):
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, points)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-9), centres)
        before, labels = labels, (points @ centres.T).argmax(1)
        if (labels == before).all():
            break
    return labels


def _sketches(documents: Sequence[Ids]) -> NDArray[np.float32]:
    """Of each document a vector of unit length, float32 [n, buckets]: how often tokens of each bucket come,
    less for buckets that many documents have.
    """
    counts = np.zeros((len(documents), _BUCKETS), np.float32)
    for row, ids in zip(counts, documents, strict=True):
        buckets = (ids.astype(np.uint64) * np.uint64(_MULTIPLIER)) >> np.uint64(56)
        row += np.bincount(buckets.astype(np.int64), minlength=_BUCKETS)
    np.sqrt(counts, out=counts)
    mean = counts.mean(0)
    counts /= np.where(mean > 0, mean, 1)
    norms = np.linalg.norm(counts, axis=1, keepdims=True)
    counts /= np.where(norms > 0, norms, 1)
    return counts


def most_useful(documents: Sequence[Ids], traffic: Iterable[Ids], total: int) -> NDArray[np.int64]:
    """Documents that have most of the n-grams of given traffic for their tokens, taken greedily; an n-gram
    counts half as much each time that it has been taken. (Greedy choice is within 1 - 1/e of the best where
    gains fall so: Nemhauser, Wolsey and Fisher, 1978.)

    Args:
        documents: tokens, int32 [m] each.
        traffic: likewise.
        total: the most tokens.

    Returns:
        Places of the documents, int64, rising. What has none of these n-grams comes last, spread evenly.
    """
    wanted, counts = np.unique(
        np.concatenate([np.empty(0, np.uint64), *map(_ngrams, traffic)]), return_counts=True
    )
    worth = counts.astype(np.float64)
    held = [_places(_ngrams(ids), wanted) for ids in documents]
    order = _spread(len(documents)).tolist()
    heap = [
        (-worth[places].sum() / max(1, len(ids)), order[number], number)
        for number, (ids, places) in enumerate(zip(documents, held, strict=True))
    ]
    heapq.heapify(heap)
    chosen: list[int] = []
    left = total
    while heap and left > 0:
        _, tie, number = heapq.heappop(heap)
        size = len(documents[number])
        now = -worth[held[number]].sum() / max(1, size)
        if heap and (now, tie) > heap[0][:2]:
            heapq.heappush(heap, (now, tie, number))
        elif size <= left:
            chosen.append(number)
            worth[held[number]] /= 2
            left -= size
    return np.sort(np.array(chosen, np.int64))


def _ngrams(ids: Ids) -> NDArray[np.uint64]:
    """Hashes of the n-grams of a text, uint64 [m - n + 1]."""
    length = max(0, len(ids) - _ORDER + 1)
    hashes = np.zeros(length, np.uint64)
    for start in range(_ORDER):
        hashes = (hashes + ids[start : start + length].astype(np.uint64) + np.uint64(1)) * np.uint64(
            _MULTIPLIER
        )
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _places(hashes: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where the hashes are among the wanted ones, each once, int64."""
    if not len(wanted):
        return np.empty(0, np.int64)
    places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    return np.unique(places[wanted[places] == hashes]).astype(np.int64)
