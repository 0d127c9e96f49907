"""Shares of caches: every draw from one, counts close to exact, closed in n."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.errors import ConfigError
from stillroom.replay.mix import SCALE, drawn, shares, shares_of_units

share_lists = st.lists(st.integers(1, 2**33), min_size=1, max_size=6)


@given(share_lists, st.integers(0, 10**12))
def test_every_draw_comes_from_one_cache(share: list[int], draws: int) -> None:
    before, after = drawn(draws, share), drawn(draws + 1, share)
    assert sum(before) == draws
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(share) - 1) + [1]


@given(share_lists, st.integers(0, 10**12))
def test_counts_are_close_to_their_exact_shares(share: list[int], draws: int) -> None:
    exact = [Fraction(draws * own, sum(share)) for own in share]
    counts = drawn(draws, share)
    assert all(abs(c - e) <= len(share) for c, e in zip(counts, exact, strict=True))
    assert abs(counts[0] - exact[0]) < 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 60))
def test_the_closed_form_is_draw_after_draw(share: list[int], draws: int) -> None:
    counts = [0] * len(share)
    for n in range(draws):
        for cache in range(len(share)):
            left = n + 1 - sum(counts[:cache])
            if cache == len(share) - 1 or left * share[cache] // sum(share[cache:]) > counts[cache]:
                counts[cache] += 1
                break
    assert counts == drawn(draws, share)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5))
def test_shares_are_in_the_proportions_of_the_weights(weights: list[float]) -> None:
    found = shares(weights)
    for own, weight in zip(found, weights, strict=True):
        assert abs(own / SCALE - weight / math.fsum(weights)) < 2**-32
    assert shares([2 * weight for weight in weights]) == found


@pytest.mark.parametrize("scale", [1e-300, 5e-324, 1.0, 1e300])
def test_weights_may_be_of_any_size(scale: float) -> None:
    assert shares([scale]) == [SCALE]
    assert shares([scale, scale]) == [SCALE // 2] * 2
    assert shares([1.7e308] * 4) == [SCALE // 4] * 4


@given(share_lists, st.data())
def test_units_of_several_rows_are_drawn_less_often(share: list[int], data: st.DataObject) -> None:
    sizes = st.fractions(min_value=1, max_value=9, max_denominator=50)
    rows = [data.draw(sizes) for _ in share]
    found = shares_of_units(share, rows)
    of_rows = [own * size for own, size in zip(found, rows, strict=True)]
    assert [own * sum(share) for own in of_rows] == [own * sum(of_rows) for own in share]


@given(share_lists, st.integers(0, 10**12))
def test_units_of_one_row_are_drawn_as_rows(share: list[int], draws: int) -> None:
    assert shares_of_units(share, [Fraction(1)] * len(share)) == share
    equal = shares_of_units(share, [Fraction(7, 2)] * len(share))
    assert drawn(draws, equal) == drawn(draws, share)


def test_three_to_one_is_exact_over_every_four() -> None:
    share = shares([3, 1])
    assert [drawn(n, share) for n in range(5)] == [[0, 0], [0, 1], [1, 1], [2, 1], [3, 1]]
    assert drawn(4 * 10**12, share) == [3 * 10**12, 10**12]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_what_is_no_weight_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="weights of caches: expected finite numbers above 0"):
        shares([1.0, wrong])


@pytest.mark.parametrize("weights", [[1e-300, 1e300], [1.0, 1e-10], [5e-324, 1.0]])
def test_a_share_of_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"shares of 2\^-32 or more"):
        shares(weights)


def test_the_smallest_share_comes() -> None:
    share = shares([2.0**32, 1.0])
    assert share == [SCALE - 1, 1]
    assert drawn(SCALE, share) == [SCALE - 1, 1]
