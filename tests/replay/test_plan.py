"""The replay order: every row once an epoch, the same rows a step for any world, pinned."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.errors import ConfigError
from stillroom.replay import plan as plan_module
from stillroom.replay.plan import MAX_LANES, Plan, permutation
from tests.replay import order_quality

U64 = 2**64

plans = st.builds(
    Plan,
    rows=st.integers(1, 300),
    seed=st.integers(-(2**63), 2**64 - 1),
    block=st.integers(1, 40),
    window=st.integers(1, 40),
)
epochs = st.integers(0, 3)


def order(plan: Plan, epoch: int) -> list[int]:
    """All rows of an epoch."""
    return [plan.row(epoch, g) for g in range(plan.rows)]


def split_mix(state: int) -> int:
    """One output of Vigna's SplitMix64 generator, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) % U64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % U64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % U64
    return z ^ (z >> 31)


def slow_permutation(size: int, *key: int) -> list[int]:
    state = size
    for word in key:
        state = split_mix(state ^ word % U64)
    hashes = [split_mix((state + i * 0x9E3779B97F4A7C15) % U64) for i in range(1, size + 1)]
    return sorted(range(size), key=lambda i: (hashes[i], i))


def slow_order(plan: Plan, epoch: int) -> list[int]:
    """The module's docstring, sentence by sentence, with lists."""
    blocks = [
        list(range(start, min(start + plan.block, plan.rows)))
        for start in range(0, plan.rows, plan.block)
    ]
    end_to_end = [row for i in slow_permutation(len(blocks), plan.seed, epoch) for row in blocks[i]]
    num_lanes = max(1, min(MAX_LANES, plan.rows // plan.window))
    lanes = []
    for lane in range(num_lanes):
        length = plan.rows // num_lanes + (lane < plan.rows % num_lanes)
        cut, end_to_end = end_to_end[:length], end_to_end[length:]
        early = lane * plan.window // num_lanes if plan.rows >= 4 * num_lanes * plan.window else 0
        starts = [0, *range(plan.window - early, length, plan.window)]
        tiles = [cut[i:j] for i, j in itertools.pairwise([*starts, length])]
        lanes.append(
            [
                tile[i]
                for number, tile in enumerate(tiles)
                for i in slow_permutation(len(tile), plan.seed, epoch, lane, number)
            ]
        )
    assert not end_to_end
    return [lanes[g % num_lanes][g // num_lanes] for g in range(plan.rows)]


@given(plans, epochs)
def test_each_row_comes_once_an_epoch(plan: Plan, epoch: int) -> None:
    assert sorted(order(plan, epoch)) == list(range(plan.rows))


@given(plans, epochs)
def test_the_order_is_what_the_docstring_says(plan: Plan, epoch: int) -> None:
    assert order(plan, epoch) == slow_order(plan, epoch)


@pytest.mark.parametrize("plan", [Plan(5003, 3, 16, 16), Plan(2311, 1, 5, 9)])
def test_the_order_of_long_lanes_is_what_the_docstring_says(plan: Plan) -> None:
    assert order(plan, 2) == slow_order(plan, 2)
    assert sorted(order(plan, 2)) == list(range(plan.rows))


@given(plans, epochs, st.integers(1, 50))
def test_a_step_is_the_next_rows_of_its_epoch(plan: Plan, epoch: int, batch: int) -> None:
    whole = order(plan, epoch)
    for first in range(0, plan.rows, batch):
        step = plan.rows_of(epoch, first, first + batch)
        assert step == whole[first : first + batch]


@given(plans, epochs)
def test_lanes_are_contiguous_and_differ_by_at_most_one_row_the_longer_first(
    plan: Plan, epoch: int
) -> None:
    end_to_end = plan._listed(epoch, np.arange(plan.rows)).tolist()
    bounds = [plan._lane(lane) for lane in range(plan.lanes)]
    lengths = [length for _, length in bounds]
    assert [start for start, _ in bounds] == [sum(lengths[:i]) for i in range(plan.lanes)]
    assert sum(lengths) == plan.rows
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    whole = order(plan, epoch)
    for lane, (start, length) in enumerate(bounds):
        assert set(whole[lane :: plan.lanes]) == set(end_to_end[start:][:length])


@given(st.integers(0, 200), st.lists(st.integers(-U64, U64), max_size=4))
def test_permutation_is_a_bijection_and_split_mix(size: int, key: list[int]) -> None:
    assert sorted(permutation(size, *key).tolist()) == list(range(size))
    assert permutation(size, *key).tolist() == slow_permutation(size, *key)


def test_our_split_mix_is_the_published_one() -> None:
    outputs = [split_mix(i * 0x9E3779B97F4A7C15 % U64) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_permutations_are_evenly_spread() -> None:
    seen = Counter(tuple(permutation(4, key).tolist()) for key in range(4800))
    assert len(seen) == 24
    chi_squared = sum((count - 200) ** 2 / 200 for count in seen.values())
    assert chi_squared < 55, "23 degrees of freedom: exceeded once in 5,000 times by chance"


@pytest.mark.parametrize(
    ("plan", "epoch", "expected"),
    [
        (Plan(10, 0, 2, 3), 0, [2, 9, 1, 3, 8, 4, 6, 0, 5, 7]),
        (Plan(12, 7, 4, 4), 0, [3, 9, 4, 0, 8, 5, 1, 10, 6, 2, 11, 7]),
        (Plan(12, 7, 4, 4), 1, [0, 5, 8, 3, 7, 9, 2, 6, 10, 1, 4, 11]),
        (Plan(9, -1, 1, 100), 0, [1, 2, 3, 5, 6, 7, 8, 4, 0]),
        (Plan(7, 3, 64, 2), 2, [0, 4, 6, 1, 3, 5, 2]),
        (Plan(1, 5, 64, 512), 3, [0]),
    ],
)
def test_no_release_changes_the_order(plan: Plan, epoch: int, expected: list[int]) -> None:
    assert order(plan, epoch) == expected


@pytest.mark.parametrize(
    ("plan", "epoch", "first", "sha256"),
    [
        (Plan(5003, 3, 64, 512), 0, [556, 2227, 490, 3268], "416ae7e6ce2c9e821ee25de158251a16"),
        (Plan(5003, 3, 16, 16), 1, [4374, 1339, 1609, 4130], "393d1110fbeb96f87127863442dd67bc"),
    ],
)
def test_no_release_changes_a_long_order(
    plan: Plan, epoch: int, first: list[int], sha256: str
) -> None:
    rows = order(plan, epoch)
    assert rows[:4] == first
    assert hashlib.sha256(np.array(rows, "<u4").tobytes()).hexdigest()[:32] == sha256


def test_plans_in_turn_permute_each_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are in a process: of several caches, or of several streams."""
    calls: list[tuple[int, ...]] = []

    def counted(size: int, *key: int) -> np.ndarray:
        calls.append((size, *key))
        return permutation(size, *key)

    monkeypatch.setattr(plan_module, "permutation", counted)
    made, tiles = [Plan(64 * 64 * 2, seed, 32, 64) for seed in range(9)], 64 * 2
    for step in range(128):
        for plan in made:
            assert len(plan.rows_of(0, step * 64, (step + 1) * 64)) == 64
    assert len(calls) == len(made) * (1 + tiles)
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("rows", [100, 1000])
def test_another_epoch_or_seed_gives_another_order(rows: int) -> None:
    orders = [order(Plan(rows, seed, 8, 16), epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(rows) for rows in orders}) == 16
    same_place = [
        sum(a == b for a, b in zip(one, other, strict=True)) / rows
        for i, one in enumerate(orders)
        for other in orders[:i]
    ]
    assert max(same_place) < 0.1


@pytest.mark.parametrize(
    ("plan", "num_lanes"), [(Plan(5000, 0, 16, 64), 64), (Plan(4096, 1, 64, 512), 8)]
)
def test_neighbours_on_disk_end_up_far_apart(plan: Plan, num_lanes: int) -> None:
    """A full permutation has a mean distance of a third of the rows."""
    assert plan.lanes == num_lanes
    place = np.argsort(order(plan, 0))
    distance = np.abs(np.diff(place))
    assert distance.mean() > 0.7 * plan.rows / 3
    assert (distance < 64).mean() < 1.5 * 2 * 64 / plan.rows
    assert abs(np.corrcoef(place, np.arange(plan.rows))[0, 1]) < 0.1


def test_a_batch_is_as_mixed_as_one_of_a_full_permutation() -> None:
    plan = Plan(4096, 0, 64, 512)
    rows = np.array(order(plan, 0)).reshape(-1, 64)
    shuffled = np.random.default_rng(0).permutation(plan.rows).reshape(-1, 64)
    blocks, fair = (
        np.mean([len(np.unique(batch // plan.block)) for batch in batches])
        for batches in (rows, shuffled)
    )
    assert blocks > 0.9 * fair


def test_the_default_order_mixes_steps_and_keeps_little_open() -> None:
    plan, batch = Plan(20_000, 0, 32, 64), 64
    rows = order_quality.order(plan, 0)
    found = order_quality.quality(rows, plan.block, plan.window)
    full = order_quality.quality(order_quality.full_order(plan.rows, 0), plan.block, plan.window)
    assert found.neighbourhoods > full.neighbourhoods
    assert found.same_step < full.same_step
    most_open = plan.lanes * (plan.window + 2 * plan.block)
    assert found.open_rows <= most_open
    assert order_quality.times_read(rows, plan.block, most_open) < 1.1
    blocks_a_step = batch / plan.block
    assert found.most_new < 4 * blocks_a_step, "lanes need new blocks one after another"


@pytest.mark.parametrize("wrong", [(0, 0, 1, 1), (1, 0, 0, 1), (1, 0, 1, 0), (-3, 0, 1, 1)])
def test_sizes_below_one_are_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Plan(*wrong)
