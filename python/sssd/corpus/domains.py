"""Which documents of a corpus are of one domain: drafts sample each by itself."""

from collections import Counter

from sssd.corpus.manifest import Manifest

MOST = 16
"""Domains that look-ups tell apart."""

Run = tuple[int, int, int]
"""Documents that follow one another, their tokens, and their domain."""


def domains(manifest: Manifest) -> list[list[Run]]:
    """The domains of each segment's documents, in their order.

    They are the sources, the one with most tokens first; where there are more than can be told apart, what
    stands in their names before the last slash; and all one where even these are too many.
    """
    tokens: Counter[str] = Counter()
    for segment in manifest.segments:
        for part in segment.parts:
            tokens[part.source] += part.tokens - part.dead_tokens
    named = {source: source for source, living in tokens.items() if living}
    if len(named) > MOST:
        named = {source: source.rpartition("/")[0] or source for source in named}
    held: Counter[str] = Counter()
    for source, domain in named.items():
        held[domain] += tokens[source]
    order = sorted(held, key=lambda domain: (-held[domain], domain)) if len(held) <= MOST else []
    place = {source: order.index(domain) for source, domain in named.items() if order}
    return [
        [(part.documents, part.tokens, place.get(part.source, 0)) for part in segment.parts]
        for segment in manifest.segments
    ]
