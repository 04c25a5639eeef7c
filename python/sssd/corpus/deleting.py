"""Documents that leave a corpus: by source, age, id, or because it is full."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from sssd.corpus.documents import ID, Table, bounds, id_hash
from sssd.corpus.folder import Folder, load_dead, load_table
from sssd.corpus.manifest import Manifest, Part, Segment
from sssd.corpus.segments import Limits, after, settled, without


@dataclass(frozen=True)
class Removed:
    """What a deletion has done.

    Attributes:
        manifest: of the corpus afterwards.
        documents: that were deleted.
        tokens: of these.
    """

    manifest: Manifest
    documents: int
    tokens: int


Chooses = Callable[[Segment, Callable[[], Table]], NDArray[np.bool_]]
"""Says which documents of a segment are meant, bool [documents]; may ask for its table."""


def of_parts(meant: Callable[[Part], bool]) -> Chooses:
    """The documents of parts."""

    def choose(segment: Segment, _: Callable[[], Table]) -> NDArray[np.bool_]:
        chosen = np.zeros(segment.documents, np.bool_)
        for part, (start, end) in zip(segment.parts, bounds(segment.parts), strict=True):
            chosen[start:end] = meant(part)
        return chosen

    return choose


def of_sources(labels: Sequence[str]) -> Chooses:
    """The documents whose source is one of these, or matches one as a pattern."""
    return of_parts(
        lambda part: any(part.source == label or fnmatchcase(part.source, label) for label in labels)
    )


def of_ids(ids: Iterable[str | int]) -> Chooses:
    """The documents with these ids."""
    hashes = np.array(sorted({id_hash(document_id) for document_id in ids}), np.uint64)
    return lambda _, table: np.isin(table()[:, ID], hashes)


def of_all(choices: Sequence[Chooses]) -> Chooses:
    """The documents that all of these mean."""

    def choose(segment: Segment, table: Callable[[], Table]) -> NDArray[np.bool_]:
        chosen = np.ones(segment.documents, np.bool_)
        for one in choices:
            if chosen.any():
                chosen &= one(segment, table)
        return chosen

    return choose


def oldest(manifest: Manifest, max_tokens: int) -> Callable[[Part], bool]:
    """The parts that came first, as many as must go for at most ``max_tokens`` to stay. Those that came at
    one time go together.
    """
    times: dict[int, int] = {}
    for segment in manifest.segments:
        for part in segment.parts:
            times[part.added] = times.get(part.added, 0) + part.tokens - part.dead_tokens
    left, until = sum(times.values()), -1
    for added in sorted(times):
        if left <= max_tokens:
            break
        left -= times[added]
        until = added
    return lambda part: part.added <= until


def delete(folder: Folder, manifest: Manifest, choose: Chooses, limits: Limits, *, merge: bool) -> Removed:
    """Deletes documents: at once by tombstones, then by merging as the policy says if ``merge``."""
    segments = list(manifest.segments)
    documents = tokens = 0
    for at, segment in enumerate(segments):
        loaded: list[Table] = []

        def table(segment: Segment = segment, loaded: list[Table] = loaded) -> Table:
            loaded[:] = loaded or [load_table(folder.path, segment)]
            return loaded[0]

        chosen = choose(segment, table)
        if not chosen.any():
            continue
        dead = load_dead(folder.path, segment)
        if not (chosen & ~dead).any():
            continue
        segments[at] = without(folder, segment, dead | chosen, table())
        documents += segments[at].dead_documents - segment.dead_documents
        tokens += segments[at].dead_tokens - segment.dead_tokens
    if documents:
        manifest = folder.commit(after(manifest, segments, 0))
    return Removed(settled(folder, manifest, limits) if merge else manifest, documents, tokens)
