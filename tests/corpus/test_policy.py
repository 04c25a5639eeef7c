"""How much merging writes again, beside the least that is possible."""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd.corpus.policy import MAX_SEGMENTS, merged_from


@dataclass(frozen=True)
class Piece:
    living: int
    written_at: int


def merge_all(sizes: list[int], most: int = MAX_SEGMENTS) -> tuple[int, list[list[Piece]]]:
    """Tokens written when additions of these sizes come one after another, and the segments after each."""
    segments: list[Piece] = []
    written, history = 0, []
    for size in sizes:
        start = merged_from(segments, size, written, most)
        merged = size + sum(piece.living for piece in segments[start:])
        written += merged
        segments = [*segments[:start], Piece(merged, written)]
        history.append(segments)
    return written, history


def least(sizes: list[int], most: int = MAX_SEGMENTS) -> int:
    """The fewest tokens that any merging of neighbours writes, if it knows what is to come."""
    before = [0, *accumulate(sizes)]

    @cache
    def of(start: int, end: int, left: int) -> float:
        """Of the additions in a range, with so many segments for them."""
        if start == end:
            return 0
        if not left:
            return float("inf")
        # the first segment is written for the last time with the addition before `at`
        return min(
            of(start, end, left - 1),
            *(
                of(start, at - 1, left) + before[at] - before[start] + of(at, end, left - 1)
                for at in range(start + 1, end + 1)
            ),
        )

    return int(of(0, len(sizes), most))


def least_of_equal(additions: int) -> int:
    """The same for additions of one token."""
    fewest = [0, *[1 << 60] * additions]
    for _ in range(MAX_SEGMENTS):
        before, fewest = fewest, [0]
        for end in range(1, additions + 1):
            last = (fewest[at - 1] + at + before[end - at] for at in range(1, end + 1))
            fewest.append(min(before[end], *last))
    return fewest[-1]


SIZES = st.lists(st.integers(1, 1 << 30), min_size=1, max_size=200)


@settings(max_examples=50)
@given(SIZES, st.integers(1, 6))
def test_there_are_never_too_many_segments_and_no_token_is_lost(sizes: list[int], most: int) -> None:
    _, history = merge_all(sizes, most)
    for at, segments in enumerate(history):
        assert len(segments) <= most
        assert sum(piece.living for piece in segments) == sum(sizes[: at + 1])


def test_a_year_of_equal_additions_is_written_less_than_six_times() -> None:
    written, _ = merge_all([1] * 365)
    assert written / 365 == pytest.approx(5.88, abs=0.01)
    assert written <= 1.01 * least_of_equal(365)


@pytest.mark.parametrize("additions", [7, 30, 60, 90, 180])
def test_equal_additions_are_written_little_more_than_they_must(additions: int) -> None:
    assert merge_all([1] * additions)[0] <= 1.25 * least_of_equal(additions)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=24))
def test_any_additions_are_written_at_most_twice_as_often_as_they_must(sizes: list[int]) -> None:
    assert merge_all(sizes)[0] <= 2 * least(sizes)


def test_the_two_searches_for_the_least_agree() -> None:
    assert all(least([1] * additions) == least_of_equal(additions) for additions in range(1, 20))
    assert least_of_equal(365) == 2136


def test_the_law_of_growth() -> None:
    """Of C(n, 4) equal additions, each is written about 4/5 n times."""
    for n in (6, 10, 14):
        additions = comb(n, 4)
        assert merge_all([1] * additions)[0] / additions <= 0.8 * n + 0.6


def test_segments_beyond_the_most_are_merged() -> None:
    segments = [
        Piece(100, 100),
        Piece(90, 190),
        Piece(80, 270),
        Piece(70, 340),
        Piece(60, 400),
        Piece(50, 450),
    ]
    assert merged_from(segments, 0, 450) < MAX_SEGMENTS
