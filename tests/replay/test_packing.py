"""Packing: a partition into bounded bins, and the same number of them on every rank."""

from hypothesis import given
from hypothesis import strategies as st

from stillroom.replay.packing import num_micro_batches, pack

MAX_TOKENS = 40
lengths = st.lists(st.integers(1, MAX_TOKENS), max_size=40)


@given(lengths)
def test_every_row_once_in_order_and_within_the_bound(lengths: list[int]) -> None:
    bins = pack(lengths, MAX_TOKENS)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) and rows for rows in bins)
    assert all(sum(lengths[row] for row in rows) <= MAX_TOKENS for rows in bins)


@given(lengths)
def test_bins_are_few(lengths: list[int]) -> None:
    """First fit: at most one bin is half empty, so there are at most twice as many as needed."""
    bins = pack(lengths, MAX_TOKENS)
    half_empty = [rows for rows in bins if 2 * sum(lengths[row] for row in rows) <= MAX_TOKENS]
    assert len(bins) <= len(lengths)
    assert len(half_empty) <= 1


@given(lengths)
def test_packing_depends_on_nothing_else(lengths: list[int]) -> None:
    assert pack(lengths, MAX_TOKENS) == pack(tuple(lengths), MAX_TOKENS)


def test_first_fit_decreasing_by_hand() -> None:
    assert pack([3, 7, 5, 5, 2, 8], 10) == [[4, 5], [0, 1], [2, 3]]
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([], 10) == []


@given(st.lists(lengths, min_size=1, max_size=8))
def test_every_rank_has_room_for_its_own(ranks: list[list[int]]) -> None:
    count = num_micro_batches(ranks, MAX_TOKENS)
    own = [len(pack(lengths, MAX_TOKENS)) for lengths in ranks]
    assert count == max(own)
    assert count == num_micro_batches(ranks[::-1], MAX_TOKENS), "ranks know one another's rows"
