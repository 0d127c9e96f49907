"""Coalescing: every range lies in one request, and there are no more requests than needed."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.ranges import GAP_BYTES, SPAN_BYTES, Span, coalesce
from tests.cache.conftest import QUICK

MIB = 1 << 20
RANGES = st.lists(st.tuples(st.integers(0, 200 * MIB), st.integers(0, 40 * MIB)), max_size=20)


@QUICK
@given(RANGES)
def test_every_range_lies_whole_in_one_span(ranges: list[tuple[int, int]]) -> None:
    spans = coalesce([start for start, _ in ranges], [length for _, length in ranges])
    members = sorted(member for span in spans for member in span.members)
    assert members == [i for i, (_, length) in enumerate(ranges) if length]
    for span in spans:
        covered = [(ranges[m][0], sum(ranges[m])) for m in span.members]
        assert span.start == min(start for start, _ in covered)
        assert span.stop == max(stop for _, stop in covered)
        assert span.stop - span.start <= SPAN_BYTES or len(span.members) == 1


@QUICK
@given(RANGES)
def test_no_two_neighbours_could_share_a_request(ranges: list[tuple[int, int]]) -> None:
    spans = coalesce([start for start, _ in ranges], [length for _, length in ranges])
    for left, right in itertools.pairwise(spans):
        first = ranges[right.members[0]]
        too_far = first[0] - left.stop > GAP_BYTES
        assert too_far or max(left.stop, sum(first)) - left.start > SPAN_BYTES


def test_a_gap_is_read_if_it_is_small() -> None:
    assert coalesce([0, 10 + GAP_BYTES], [10, 5]) == [Span(0, GAP_BYTES + 15, [0, 1])]
    apart = [Span(0, 10, [0]), Span(11 + GAP_BYTES, 16 + GAP_BYTES, [1])]
    assert coalesce([0, 11 + GAP_BYTES], [10, 5]) == apart


def test_order_and_overlaps_do_not_matter() -> None:
    assert coalesce([50, 0, 5, 7], [10, 20, 2, 0]) == [Span(0, 60, [1, 2, 0])]
    assert coalesce([], []) == []


def test_a_large_read_is_cut_between_ranges() -> None:
    starts = [i * MIB for i in range(100)]
    spans = coalesce(starts, [MIB] * 100)
    assert [span.stop - span.start for span in spans] == [32 * MIB, 32 * MIB, 32 * MIB, 4 * MIB]
