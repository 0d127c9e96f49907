"""List columns as arrays: chunks, slices, nulls."""

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.lists import edges, list_column, places
from tests.cache.conftest import QUICK

ROWS = st.lists(st.none() | st.lists(st.none() | st.integers(0, 9), max_size=4), max_size=8)


@QUICK
@given(ROWS, st.integers(0, 8), st.integers(0, 8))
def test_rows_come_back_from_chunks_and_slices(rows: list[Any], cut: int, first: int) -> None:
    kind = pa.list_(pa.uint32())
    column = pa.chunked_array([pa.array(rows[:cut], kind), pa.array(rows[cut:], kind)], kind)
    lists = list_column(column.slice(first))
    rows = rows[first:]
    plain = [row or [] for row in rows]
    assert lists.is_null.tolist() == [row is None for row in rows]
    assert [lists.row(i).tolist() for i in range(len(rows))] == [
        [value or 0 for value in row] for row in plain
    ]
    assert lists.value_is_null.tolist() == [value is None for row in plain for value in row]
    nines = [row.count(9) for row in plain]
    assert lists.count_in_row(lists.values == 9).tolist() == nines
    assert lists.any_in_row(lists.values == 9).tolist() == [count > 0 for count in nines]
    assert lists.lengths.tolist() == [len(row) for row in plain]


def test_a_null_among_floats_is_nan() -> None:
    column = pa.chunked_array([pa.array([[0.5, None], None], pa.list_(pa.float32()))])
    assert repr(list_column(column).values.tolist()) == "[0.5, nan]"


def test_places_lay_rows_out_with_gaps() -> None:
    lists = list_column(pa.chunked_array([pa.array([[1, 2], None, [3]], pa.list_(pa.uint8()))]))
    out = np.zeros(8, int)
    out[places(np.array([1, 4, 6]), lists)] = lists.values
    assert out.tolist() == [0, 1, 2, 0, 0, 0, 3, 0]
    assert edges(lists.lengths).tolist() == lists.start.tolist() == [0, 2, 2, 3]
