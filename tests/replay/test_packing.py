"""Packing: a partition into bounded bins, the same number of them on every rank, and even ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.replay.packing import balance, deal, imbalance, num_micro_batches, pack

MAX_TOKENS = 40
lengths = st.lists(st.integers(1, MAX_TOKENS), max_size=40)
limits = st.none() | st.integers(1, 5)


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


@given(lengths, st.integers(1, 5))
def test_items_of_a_bin_are_bounded(lengths: list[int], most: int) -> None:
    bins = pack(lengths, MAX_TOKENS, most)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(0 < len(rows) <= most for rows in bins)
    if most == 1:
        assert len(bins) == len(lengths)


@given(lengths)
def test_packing_depends_on_nothing_else(lengths: list[int]) -> None:
    assert pack(lengths, MAX_TOKENS) == pack(tuple(lengths), MAX_TOKENS)


class Compared(int):
    """Counts comparisons with room that is left."""

    count = 0

    def __le__(self, other: int) -> bool:
        """Count."""
        Compared.count += 1
        return int(self) <= other


@pytest.mark.parametrize("most", [1, 4])
def test_full_bins_are_not_looked_at(most: int) -> None:
    assert len(pack([Compared(1)] * 1000, 10_000, most)) == 1000 // most
    assert Compared.count <= 1000
    Compared.count = 0


def test_first_fit_decreasing_by_hand() -> None:
    assert pack([3, 7, 5, 5, 2, 8], 10) == [[4, 5], [0, 1], [2, 3]]
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([], 10) == []


@given(st.lists(lengths, min_size=1, max_size=8), limits)
def test_every_rank_has_room_for_its_own(ranks: list[list[int]], most: int | None) -> None:
    count = num_micro_batches(ranks, MAX_TOKENS, most)
    own = [len(pack(lengths, MAX_TOKENS, most)) for lengths in ranks]
    assert count == max(own)
    assert count == num_micro_batches(ranks[::-1], MAX_TOKENS, most), "ranks know one another's"


@given(st.lists(lengths, min_size=1, max_size=8), limits)
def test_balanced_ranks_run_as_many_and_lose_nothing(
    ranks: list[list[int]], most: int | None
) -> None:
    count = num_micro_batches(ranks, MAX_TOKENS, most)
    for lengths in ranks:
        bins = balance(lengths, count, MAX_TOKENS, most)
        assert bins == balance(tuple(lengths), count, MAX_TOKENS, most)
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert all(rows == sorted(rows) and rows for rows in bins)
        assert len(bins) <= count
        assert all(sum(lengths[row] for row in rows) <= MAX_TOKENS for rows in bins)
        assert all(most is None or len(rows) <= most for rows in bins)


@given(lengths, st.integers(0, 10))
def test_balance_fills_evenly_or_packs(lengths: list[int], more: int) -> None:
    """Longest first: the fullest is within its last item of the mean, or the fallback was taken."""
    fewest = pack(lengths, MAX_TOKENS)
    count = len(fewest) + more
    bins = balance(lengths, count, MAX_TOKENS)
    if len(bins) == min(count, len(lengths)) and bins != fewest:
        filled = [sum(lengths[row] for row in rows) for rows in bins]
        for rows, tokens in zip(bins, filled, strict=True):
            assert tokens - min(lengths[row] for row in rows) <= sum(filled) / len(filled)
    else:
        assert bins == fewest


def test_balance_by_hand() -> None:
    assert pack([6, 4, 3, 3, 2, 2], 10) == [[0, 1], [2, 3, 4, 5]]
    assert pack([9, 1, 1, 1, 1, 1], 10) == [[0, 1], [2, 3, 4, 5]]
    assert balance([9, 1, 1, 1, 1, 1], 2, 10) == [[0], [1, 2, 3, 4, 5]]
    assert balance([5, 1, 1, 1, 1, 1], 4, 10) == [[0], [1, 4], [2, 5], [3]]
    assert balance([2, 2, 2, 2], 2, 10, 2) == [[0, 2], [1, 3]]
    assert balance([9, 2, 2, 2], 2, 10, 3) == [[0], [1, 2, 3]]
    assert balance([3], 4, 10) == [[0]]
    assert balance([], 4, 10) == []


def test_balance_falls_back_where_the_longest_first_overflow() -> None:
    lengths = [5, 5, 4, 3, 3]  # longest first: 5 + 4 and 5 + 3, and no room for 3
    assert pack(lengths, 10) == [[0, 1], [2, 3, 4]]
    assert balance(lengths, 2, 10) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("tokens", "ratio"), [([4, 4], 1), ([6, 2], 1.5), ([9, 0, 0], 3)])
def test_imbalance_is_the_largest_by_the_mean(tokens: list[int], ratio: float) -> None:
    assert imbalance(tokens) == ratio


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_dealing_gives_every_item_once_and_as_many_to_each_rank(
    tokens: list[int], ranks: int
) -> None:
    hands = deal(tokens, ranks)
    assert sorted(i for hand in hands for i in hand) == list(range(len(tokens)))
    assert len(hands) == ranks
    assert max(map(len, hands)) <= -(-len(tokens) // ranks)
    assert all(hand == sorted(hand) for hand in hands)


def test_ranks_that_are_dealt_to_by_length_are_nearly_even() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(50):
        tokens = rng.lognormal(6, 0.8, 64).astype(int).tolist()
        dealt = [sum(tokens[i] for i in hand) for hand in deal(tokens, 8)]
        in_turn = [sum(tokens[rank::8]) for rank in range(8)]
        found.append((imbalance(dealt), imbalance(in_turn)))
    even, uneven = np.mean(found, axis=0)
    assert even < 1.05 < 1.3 < uneven
