"""Used entries end to end, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.zarr_entries import pack_entries, unpack_entries
from tests.cache.conftest import QUICK


@QUICK
@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 99))
def test_packed_entries_come_back(topk: int, wanted: list[int], seed: int) -> None:
    count = np.minimum(wanted, topk).astype(np.uint16)
    entries = np.random.default_rng(seed).integers(1, 99, (len(count), topk)).astype(np.uint32)
    entries[np.arange(topk) >= count[:, None]] = 7777
    packed = pack_entries(entries, count)
    used = int(count.sum())
    flat = packed.reshape(-1)
    one_by_one = [entries[i, j] for i in range(len(count)) for j in range(count[i])]
    assert flat[:used].tolist() == one_by_one
    assert not flat[used:].any() if used < entries.size else packed is entries
    np.testing.assert_array_equal(unpack_entries(flat[:used], count, topk, 7777), entries)


@pytest.mark.parametrize("positions", [0, 1, 5])
def test_where_all_are_used_nothing_is_copied(positions: int) -> None:
    entries = np.arange(positions * 3).reshape(positions, 3)
    assert pack_entries(entries, np.full(positions, 3)) is entries
