"""Rows of tables and of mappings, in batches, come out as one table with a part's types."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache.errors import ShapeError
from stillroom.cache.foreign_rows import ForeignRows, Rows, Unreadable, read_rows

ROW = {"prompt": [1], "completion": [2, 3]}


def read(*batches: Rows) -> ForeignRows:
    """Read batches whose rows are numbered from 10."""
    numbers = np.cumsum([10, *(len(rows) for rows in batches)])
    return read_rows(
        ((rows, np.arange(n, n + len(rows))) for rows, n in zip(batches, numbers, strict=False)),
        "here",
    )


def test_tables_and_mappings_give_the_same() -> None:
    rows: list[dict[str, Any]] = [ROW | {"x_a": 1.0}, ROW | {"group": 5}]
    from_rows = read(rows)
    from_table = read(pa.Table.from_pylist([{"group": None} | rows[0], rows[1]]))
    assert from_rows.table.column_names == ["group", "prompt", "completion", "x_a"]
    assert from_rows.table.equals(from_table.table)
    assert from_rows.table["x_a"].to_pylist() == [1.0, None]
    assert from_rows.number.tolist() == [10, 11]
    assert from_rows.bad == []


def test_batches_may_differ_in_columns_and_form() -> None:
    whole = {"token": [1, 2, 3], "scored": [0, 1, 1], "x_b": [0.0, 1.0, 2.0]}
    read_in = read([ROW | {"x_b": None}], [whole], pa.Table.from_pylist([ROW | {"x_a": 1}]))
    assert read_in.table.to_pylist() == [
        ROW | {"scored": None, "x_a": None, "x_b": None},
        {"prompt": [1], "completion": [2, 3], "scored": [1, 1], "x_a": None, "x_b": [1.0, 2.0]},
        ROW | {"scored": None, "x_a": 1.0, "x_b": None},
    ]
    assert read_in.number.tolist() == [10, 11, 12]


def test_what_is_no_row_is_named_and_the_others_are_read() -> None:
    wrong: list[Any] = [ROW, Unreadable("no JSON"), [1], None, ROW | {"prompt": "a"}, ROW]
    read_in = read(wrong[:2], wrong[2:])
    assert read_in.number.tolist() == [10, 15]
    assert read_in.table.to_pylist() == [ROW, ROW]
    assert read_in.bad == [
        (11, "no JSON"),
        (12, "list, not a mapping"),
        (13, "NoneType, not a mapping"),
        (14, "'prompt' is 'a', not a list of token ids"),
    ]


def test_a_user_column_keeps_its_form_over_batches() -> None:
    read_in = read([ROW | {"x_a": 1.0}], [ROW | {"x_a": [1.0, 2.0]}, ROW])
    assert read_in.bad == [(11, "'x_a' is [1.0, 2.0], not a number")]
    assert read_in.number.tolist() == [10, 12]


def test_a_conversation_that_cannot_be_cut_is_named() -> None:
    rows = [{"token": [1, 2], "scored": [0, 1]}, {"token": [1, 2], "scored": [1, 1]}]
    read_in = read(rows)
    assert read_in.bad == [(11, "'token' whose first id is scored: no prompt comes before it")]
    assert read_in.table.to_pylist() == [{"prompt": [1], "completion": [2], "scored": [1]}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"reward": 1.0}], r"got \['reward'\]"),
        ([ROW | {"x_a b": 1.0}], r"got \['x_a b'\]"),
        ([{"prompt": [1]}], r"got no \['completion'\]"),
        ([{"scored": [1]}], r"got no \['completion', 'prompt'\]"),
        ([ROW | {"token": [1], "scored": [1]}], r"'token' and \['completion', 'prompt'\]"),
        ([{"token": [1, 2]}], "'token' without 'scored'"),
        (pa.table([[[1]], [[1]], [[2]]], ["prompt", "prompt", "completion"]), "twice"),
    ],
)
def test_columns_that_are_no_part_s_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        read(rows)


def test_no_rows_at_all() -> None:
    assert read().table.num_rows == 0
    assert read(pa.table({"prompt": [], "completion": []})).number.tolist() == []
