"""Ids as small codes: lossless for any ids, the same on every machine, bounded."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stillroom.cache import zarr_id_groups
from stillroom.cache.errors import ShapeError
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.zarr_id_groups import (
    MAX_GROUPS,
    MAX_LOOKUP,
    GroupedIds,
    IdLookup,
    group_ids,
)
from tests.cache.conftest import QUICK
from tests.cache.fakes import same_bits


def decode(coded: GroupedIds) -> np.ndarray:
    """The ids, one by one."""
    width, common = coded.group_width, coded.id_list[coded.groups * coded.group_width :]
    rows = [
        [coded.id_list[g * width + c] if c < width else common[c - width] for c in row.tolist()]
        for g, row in zip(coded.group.tolist(), coded.code, strict=True)
    ]
    return np.array(rows, np.uint32).reshape(coded.code.shape)


def quick_decode(coded: GroupedIds) -> np.ndarray:
    """The same, at once, as a reader does."""
    lookup = IdLookup(coded.id_list, coded.groups, coded.group_width)
    out, index = (np.empty(coded.code.shape, dtype) for dtype in (np.uint32, np.int64))
    assert lookup.look_up(coded.code.copy(), coded.group[:, None], out, index)
    return out


def zipf(seed: int, positions: int, topk: int, vocab_size: int, topics: int) -> np.ndarray:
    """Ids of positions that have topics, the rare ones of which are not frequent elsewhere."""
    rng = np.random.default_rng(seed)
    rank = (vocab_size * rng.random((positions, topk)) ** 6).astype(np.int64)
    topic = rng.integers(0, topics, positions)[:, None]
    return ((rank * 7 + topic * 101) % vocab_size).astype(np.uint32)


def bits(codes: np.ndarray) -> float:
    """Entropy of a code, bits."""
    count = np.bincount(codes.ravel())
    share = count[count > 0] / codes.size
    return float(-(share * np.log2(share)).sum())


@QUICK
@given(
    hnp.arrays(
        np.uint32,
        st.tuples(st.integers(0, 30), st.integers(1, 12)),
        elements=st.one_of(
            st.integers(0, 9), st.integers(0, UNUSED_ID), st.just(UNUSED_ID), st.just(UNUSED_ID - 1)
        ),
    )
)
def test_any_ids_come_back(ids: np.ndarray) -> None:
    assert same_bits(decode(group_ids(ids)), ids)


@settings(QUICK, max_examples=15)
@given(
    st.integers(0, 2**32),
    st.integers(640, 3000),
    st.integers(1, 20),
    st.integers(2, 5000),
    st.integers(1, 9),
    st.booleans(),
)
def test_grouped_ids_come_back(
    seed: int, positions: int, topk: int, vocab_size: int, topics: int, cut: bool
) -> None:
    ids = zipf(seed, positions, topk, vocab_size, topics)
    if cut:
        count = np.random.default_rng(seed).integers(1, topk + 1, positions)
        ids[np.arange(topk) >= count[:, None]] = UNUSED_ID
    coded = group_ids(ids)
    assert same_bits(quick_decode(coded), ids)
    assert coded.groups * (coded.group_width + len(np.unique(ids))) <= MAX_LOOKUP
    assert coded.groups <= MAX_GROUPS
    assert same_bits(quick_decode(coded)[:40], decode(coded)[:40])


def test_positions_are_told_apart_by_their_ids() -> None:
    ids = zipf(0, 4000, 8, 3000, topics=4)
    coded = group_ids(ids)
    assert coded.groups > 1
    alone = group_ids(ids[:600])
    assert (alone.groups, alone.group_width) == (1, 0)
    in_one_list = np.unique(ids, return_inverse=True)[1]
    assert bits(coded.code) < bits(in_one_list) - 0.8


@pytest.mark.parametrize(("groups", "width"), [(1, 0), (3, 4)])
def test_what_lies_outside_the_lists_is_not_looked_up(groups: int, width: int) -> None:
    id_list = np.arange(100, 105 + groups * width, dtype=np.uint32)
    lookup = IdLookup(id_list, groups, width)
    every = np.arange(width + 5, dtype=np.uint32)[None].repeat(groups, axis=0)
    out, index = (np.zeros(every.shape, dtype) for dtype in (np.uint32, np.int64))
    group = np.arange(groups, dtype=np.uint16)[:, None]
    assert lookup.look_up(every.copy(), group, out, index)
    common = range(100 + groups * width, 105 + groups * width)
    own = [range(100 + g * width, 100 + (g + 1) * width) for g in range(groups)]
    assert out.tolist() == [[*ids, *common] for ids in own]
    for larger in (np.uint32(width + 5), np.uint32(2**32 - 1)):
        code = every.copy()
        code[-1, 0] = larger
        assert not lookup.look_up(code, group, out, index)
    group[0] = groups
    assert not lookup.look_up(every.copy(), group, out, index)


def test_lists_stand_by_frequency() -> None:
    ids = np.array([[7, 9], [7, 9], [7, 3], [UNUSED_ID - 1, 5]], np.uint32)
    coded = group_ids(ids)
    assert coded.id_list.tolist() == [7, 9, 3, 5, UNUSED_ID - 1]
    assert coded.code.tolist() == [[0, 1], [0, 1], [0, 2], [4, 3]]
    many = group_ids(zipf(1, 2000, 6, 900, topics=2))
    own = many.id_list[many.groups * many.group_width :]
    seen = Counter(zipf(1, 2000, 6, 900, topics=2).ravel().tolist())
    counts = [seen[i] for i in own.tolist()]
    assert counts == sorted(counts, reverse=True)
    assert len(own) == len(seen)


def test_equal_ids_give_equal_codes() -> None:
    ids = zipf(2, 3000, 8, 2000, topics=3)
    first, second = group_ids(ids), group_ids(np.asfortranarray(ids))
    for name in ("code", "group", "id_list"):
        assert same_bits(getattr(first, name), getattr(second, name))
    assert first.group_width == second.group_width


def test_ids_too_large_to_count_are_coded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = zipf(3, 2000, 8, 500, topics=3)
    counted = group_ids(ids)
    monkeypatch.setattr(zarr_id_groups, "MAX_LOOKUP", 499)
    with pytest.raises(ShapeError, match="at most 499 ids"):
        group_ids(np.arange(500, dtype=np.uint32)[:, None])
    few = ids % 400 + 10_000
    coded = group_ids(few)
    assert same_bits(quick_decode(coded), few)
    assert coded.groups * (coded.group_width + 400) <= 499
    monkeypatch.undo()
    moved = group_ids(ids + np.uint32(MAX_LOOKUP))
    assert same_bits(moved.code, counted.code)
    assert same_bits(moved.group, counted.group)


@pytest.mark.parametrize("topk", [1, 5])
def test_no_positions_are_no_codes(topk: int) -> None:
    coded = group_ids(np.zeros((0, topk), np.uint32))
    assert (coded.code.shape, len(coded.id_list), coded.groups) == ((0, topk), 0, 1)


def test_groups_are_bounded() -> None:
    coded = group_ids(zipf(4, 120_000, 2, 300, topics=90))
    assert coded.groups <= MAX_GROUPS
    assert coded.group.max() == coded.groups - 1
    large = np.arange(200_000, dtype=np.uint32).reshape(-1, 4) + np.arange(4, dtype=np.uint32)
    coded = group_ids(large)
    assert coded.groups * (coded.group_width + len(np.unique(large))) <= MAX_LOOKUP
    assert same_bits(quick_decode(coded), large)
