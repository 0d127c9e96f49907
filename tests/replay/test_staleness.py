"""Weighting by lag: seeded, the same everywhere, each row decided alone, and in right numbers."""

import math
from decimal import Inexact, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.errors import ConfigError, ShapeError
from stillroom.replay.staleness import expected_rows, kept_rows, mean_of_kept

ROWS = 20_000
POLICIES = st.lists(st.integers(-1, 6), min_size=1, max_size=60).map(np.array)


def kept(
    policy: Any,
    key: Any = None,
    *,
    seed: int = 3,
    epoch: int = 0,
    half: Any = 2.0,
    newest: int | None = None,
) -> Any:
    """Indices, as a list; lags are counted from the newest policy given, unless one is named."""
    policy = np.asarray(policy)
    key = np.arange(len(policy)) if key is None else np.asarray(key)
    newest = int(policy.max()) if newest is None else newest
    return kept_rows(policy, seed, epoch, half, key, newest).tolist()


def test_without_a_half_life_all_come() -> None:
    assert kept([0, 5, -1], half=None) == [0, 1, 2]


@pytest.mark.parametrize("lag", [1, 2, 3, 7])
@pytest.mark.parametrize("half_life", [0.5, 1.0, 3.0])
def test_half_come_at_each_half_life(lag: int, half_life: float) -> None:
    """Within five standard deviations of the binomial's mean."""
    policy = np.full(ROWS + 1, 9 - lag)
    policy[0] = 9
    share = 2 ** (-lag / half_life)
    count = len(kept(policy, half=half_life)) - 1
    assert abs(count - ROWS * share) <= 5 * math.sqrt(ROWS * share * (1 - share)) + 1


def test_epochs_and_seeds_choose_apart() -> None:
    """Two choices of half of the rows share a quarter of them."""
    policy = np.concatenate([[1], np.zeros(ROWS, int)])
    chosen = [
        set(kept(policy, half=1.0, seed=seed, epoch=epoch)) - {0}
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 0)]
    ]
    for i, one in enumerate(chosen):
        for other in chosen[:i]:
            assert abs(len(one & other) - ROWS / 4) <= 5 * math.sqrt(ROWS * 3 / 16)


@given(POLICIES, st.integers(0, 2**64 - 1), st.integers(0, 9), st.floats(0.01, 100))
def test_the_newest_always_come(
    policy: np.ndarray, seed: int, epoch: int, half_life: float
) -> None:
    found = kept(policy, seed=seed, epoch=epoch, half=half_life)
    assert found == sorted(set(found))
    assert set(np.flatnonzero(policy == policy.max())) <= set(found)


@given(POLICIES, st.integers(0, 9), st.data())
def test_a_row_is_decided_alone(policy: np.ndarray, epoch: int, data: st.DataObject) -> None:
    """Whatever rows are beside it and wherever it stands, as long as the newest policy is there."""
    key = np.arange(len(policy)) * 7 + 5
    all_kept = {int(key[i]) for i in kept(policy, key, epoch=epoch)}
    order = data.draw(st.permutations(range(len(policy))))
    some = np.array(order[: data.draw(st.integers(1, len(order)))])
    some = np.append(some, policy.argmax())
    found = kept(policy[some], key[some], epoch=epoch)
    assert {int(key[some][i]) for i in found} == all_kept & set(key[some].tolist())


@given(POLICIES, st.floats(0.01, 50), st.floats(0.01, 50))
def test_a_longer_half_life_only_adds(policy: np.ndarray, one: float, other: float) -> None:
    short, long = sorted([one, other])
    assert set(kept(policy, half=short)) <= set(kept(policy, half=long))


@given(POLICIES, st.integers(0, 9), st.integers(0, 5))
def test_lags_are_counted_from_the_newest_policy(policy: np.ndarray, epoch: int, more: int) -> None:
    """A row of that policy, which is not among them, changes nothing for the others."""
    newest = int(policy.max()) + more
    beside = set(kept(np.append(policy, newest), epoch=epoch)) - {len(policy)}
    found = kept(policy, epoch=epoch, newest=newest)
    if beside:
        assert set(found) == beside
    else:
        (only,) = found
        assert policy[only] == policy.max()


def test_one_row_comes_where_chance_leaves_none() -> None:
    policy = np.repeat([3, 5], 10)
    found = [kept(policy, epoch=epoch, half=1.0, newest=60) for epoch in range(40)]
    assert {len(one) for one in found} == {1}
    assert {one for (one,) in found} <= set(range(10, 20)), "of the least lag"
    assert len({one for (one,) in found}) > 5, "another one every time"
    assert kept([], half=1.0, newest=60) == []


def test_a_mean_over_what_comes_is_that_of_many_epochs() -> None:
    rng = np.random.default_rng(1)
    policy, value = rng.integers(-1, 5, 400), rng.integers(1, 5, 400)
    value[(policy >= 0) & (policy < 2)] += 7
    counted = [value[kept(policy, epoch=e, half=1.5, newest=6)] for e in range(60)]
    exact = mean_of_kept(value, policy, 1.5, 6)
    assert abs(np.concatenate(counted).mean() / exact - 1) < 0.02
    assert abs(value.mean() / exact - 1) > 0.1
    assert mean_of_kept(np.ones(400, int), policy, 1.5, 6) == 1


def test_rows_of_an_unknown_policy_always_come() -> None:
    """And change nothing for the others."""
    policy = np.arange(300) % 5
    unknown = np.where(policy == 0, -1, policy)
    comes = set(kept(policy))
    assert set(kept(unknown)) == comes | set(np.flatnonzero(policy == 0)) != comes
    assert kept([-1, 0, -1], newest=500) == [0, 2]
    assert kept([-1, -1]) == [0, 1]


def test_so_many_rows_come_on_average() -> None:
    policy = np.random.default_rng(1).integers(-1, 5, 400)
    counts = [len(kept(policy, epoch=epoch, half=1.5, newest=6)) for epoch in range(60)]
    assert abs(float(np.mean(counts)) / float(expected_rows(policy, 1.5, 6)) - 1) < 0.02
    assert expected_rows(np.array([5, 3, 1]), 2.0, 5) == 1.75
    assert expected_rows(np.zeros(300, int), 1.0, 60) < 1e-12


def test_a_mean_counts_the_row_that_comes_where_chance_leaves_none() -> None:
    policy, value = np.array([1, *[0] * 30]), np.array([1, *[4] * 30])
    counted = [value[kept(policy, epoch=e, half=1.0, newest=5)] for e in range(3000)]
    exact = mean_of_kept(value, policy, 1.0, 5)
    assert sum(len(one) == 1 and one[0] == 1 for one in counted) > 600
    assert abs(np.concatenate(counted).mean() / exact - 1) < 0.02


def test_the_choice_never_changes_with_a_release() -> None:
    assert kept(np.arange(40) % 4, seed=7, epoch=2) == [
        3,
        6,
        7,
        8,
        9,
        11,
        12,
        13,
        14,
        15,
        17,
        18,
        19,
        21,
        22,
        23,
        24,
        26,
        27,
        29,
        30,
        31,
        33,
        34,
        35,
        38,
        39,
    ]
    assert kept(np.arange(40) % 4, seed=2**64 - 1, epoch=0, half=0.75) == [
        2,
        3,
        7,
        11,
        12,
        15,
        19,
        22,
        23,
        25,
        26,
        27,
        29,
        31,
        33,
        34,
        35,
        39,
    ]
    assert kept([1] + [0] * 9, np.array([2**64 - 10 + i for i in range(10)], np.uint64)) == [
        0,
        2,
        3,
        5,
        7,
        8,
        9,
    ]


def test_the_caller_s_decimal_settings_do_not_matter() -> None:
    policy = np.arange(200) % 9
    expected = kept(policy, half=1.7)
    with localcontext() as context:
        context.prec = 2
        context.traps[Inexact] = True
        assert kept(policy, half=1.7) == expected


@pytest.mark.parametrize("half_life", [5e-324, 1e300])
def test_extreme_half_lives(half_life: float) -> None:
    policy = [2**31 - 1, *range(50)]
    assert kept(policy, half=half_life) == ([0] if half_life < 1 else list(range(51)))


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_half_life(half_life: float) -> None:
    with pytest.raises(ConfigError, match=r"lag_half_life.*above 0"):
        kept([0, 1], half=half_life)


def test_a_key_for_each_row() -> None:
    with pytest.raises(ShapeError, match=r"\(2,\) and \(3,\)"):
        kept([0, 1], [0, 1, 2])
