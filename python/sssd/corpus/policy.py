"""Which segments are merged when documents come: few segments, and few tokens written again."""

from collections.abc import Sequence
from typing import Protocol

MAX_SEGMENTS = 4
"""The most segments that a look-up searches after an addition, apart from full ones."""

FULL = 1 << 30
"""Tokens from which on a segment is full: it is left alone, as the sorted parts of a file end at 2^31."""


class Sized(Protocol):
    """What the policy looks at of a segment."""

    @property
    def living(self) -> int:
        """Tokens that a merge would write."""

    @property
    def written_at(self) -> int:
        """How many tokens had been written to the corpus when the segment had been."""


def merged_from(segments: Sequence[Sized], tokens: int, written: int, most: int = MAX_SEGMENTS) -> int:
    """Index of the first segment that is merged with all later ones and with ``tokens`` new ones.

    Each segment may have ``r`` others after it, ``most - 1`` the first. It is merged as soon as the tokens
    that were written after it reach ``r`` times its own: what avoiding the merge has cost by then is what
    makes the merge worth its cost. For additions of equal sizes these are the binomial merges, which are
    optimal but for terms of lower order (Mathieu, Rajaraman, Young and Yousefi, "Competitive data-structure
    dynamization", SODA 2021, study both): a segment ``i`` of ``k`` holds C(n, k - i) additions.

    Args:
        segments: oldest first.
        tokens: of the addition.
        written: tokens written to the corpus so far.
        most: segments that there may be afterwards.

    Returns:
        0 to ``len(segments)``; the latter merges nothing.
    """
    cost = [tokens] * (len(segments) + 1)
    for at in reversed(range(len(segments))):
        cost[at] = cost[at + 1] + segments[at].living
    start = min(len(segments), most - 1)
    for at in reversed(range(start)):
        later = most - 1 - at
        if written - segments[at].written_at + cost[start] >= later * segments[at].living:
            start = at
    return start
