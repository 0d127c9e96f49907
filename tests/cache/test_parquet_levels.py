"""Levels of lists: against a twin that writes them one by one, and read back or refused."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.parquet_levels import (
    list_levels,
    nested_levels,
    read_list_levels,
    read_nested_levels,
)
from tests.cache.conftest import QUICK

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=30)
ROWS = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=12)


def runs(levels: list[int], width: int) -> bytes:
    """One run of the RLE hybrid, behind its length, bit by bit."""
    if len(set(levels)) == 1:
        run = number(2 * len(levels)) + bytes(levels[:1])
    else:
        levels = levels + [0] * (-len(levels) % 8)
        bits = sum(level << width * i for i, level in enumerate(levels))
        run = number(2 * (len(levels) // 8) + 1) + bits.to_bytes(len(levels) * width // 8, "little")
    return len(run).to_bytes(4, "little") + run


def number(value: int) -> bytes:
    """A varint."""
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value // 128)


def twin(rows: list[list[int]]) -> tuple[bytes, int]:
    """Levels of lists of lists, given the lengths of the inner ones."""
    repetition, definition = [], []
    for row in rows:
        for i, length in enumerate(row or [-1]):
            for k in range(max(1, length)):
                repetition.append(2 if k else 1 if i else 0)
                definition.append(2 if length > 0 else 1 if length == 0 else 0)
    return runs(repetition, 2) + runs(definition, 2), len(repetition)


def lengths(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Inner lists of each row, and their lengths."""
    return np.array([len(row) for row in rows]), np.array(list(chain(*rows)), np.int64)


@QUICK
@given(LENGTHS)
def test_levels_of_lists(length: list[int]) -> None:
    levels = list_levels(np.array(length))
    repetition = list(chain(*([0, *[1] * (n - 1)] for n in length)))
    definition = list(chain(*([1] * n or [0] for n in length)))
    assert levels.data == runs(repetition, 1) + runs(definition, 1)
    assert (levels.entries, levels.values) == (len(repetition), sum(length))
    found, end = read_list_levels(levels.data + b"values", levels.entries)
    assert found.tolist() == length
    assert end == len(levels.data)


@QUICK
@given(ROWS)
def test_levels_of_lists_of_lists(rows: list[list[int]]) -> None:
    outer, inner = lengths(rows)
    levels = nested_levels(outer, inner)
    assert (levels.data, levels.entries) == twin(rows)
    assert levels.values == inner.sum()
    for width in {1, *inner.tolist()}:
        found, end = read_nested_levels(levels.data + b"values", levels.entries, outer, width)
        assert found.tolist() == inner.tolist()
        assert end == len(levels.data)


def test_most_lists_are_full() -> None:
    outer, inner = np.array([3, 2]), np.full(5, 64)
    levels = nested_levels(outer, inner)
    assert (levels.data, levels.entries) == twin([[64] * 3, [64] * 2])
    assert read_nested_levels(levels.data, levels.entries, outer, 64)[0].tolist() == [64] * 5


@QUICK
@given(ROWS, st.integers(0, 2**20), st.data())
def test_changed_levels_are_refused_or_others(
    rows: list[list[int]], noise: int, data: st.DataObject
) -> None:
    """Whatever is read is what the bytes say."""
    outer, inner = lengths(rows)
    levels = nested_levels(outer, inner)
    changed = bytearray(levels.data)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 + noise % 255
    entries = levels.entries + data.draw(st.sampled_from([0, 0, -1, 1]))
    try:
        found, end = read_nested_levels(bytes(changed), entries, outer, 9)
    except ValueError:
        return
    again = nested_levels(outer, found)
    assert (again.data, again.entries) == (bytes(changed[:end]), entries)


@QUICK
@given(st.binary(max_size=40), st.integers(0, 200))
def test_any_bytes_are_lists_or_refused(raw: bytes, entries: int) -> None:
    try:
        length, end = read_list_levels(raw, entries)
    except ValueError:
        return
    assert (list_levels(length).data, list_levels(length).entries) == (raw[:end], entries)


@pytest.mark.parametrize(
    ("repetition", "definition"),
    [
        ([1, 0], [1, 1]),  # begins within a list
        ([0, 1], [1, 0]),  # an empty list with a value before
        ([0, 1], [0, 1]),
    ],
)
def test_levels_that_no_lists_have_are_refused(
    repetition: list[int], definition: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"within a list|fit no lists"):
        read_list_levels(runs(repetition, 1) + runs(definition, 1), len(repetition))


def test_a_run_of_other_than_levels_is_refused() -> None:
    run = number(2 * 3) + b"\x02"
    raw = len(run).to_bytes(4, "little") + run
    with pytest.raises(ValueError, match="one run"):
        read_list_levels(raw + raw, 3)
