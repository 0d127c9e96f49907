"""The hash of a table's content: the same for equal values, another for any difference."""

from typing import Any

import pyarrow as pa
import pytest

from stillroom.cache.content_hash import content_hash

ROWS: list[dict[str, Any]] = [
    {"a": [1, 2], "b": "x", "c": True, "d": 0.5, "e": [[1], None]},
    {"a": None, "b": None, "c": None, "d": None, "e": None},
    {"a": [3], "b": "yz", "c": False, "d": float("nan"), "e": [[], [2, 3]]},
]
SCHEMA = pa.schema(
    {
        "a": pa.list_(pa.uint32()),
        "b": pa.string(),
        "c": pa.bool_(),
        "d": pa.float32(),
        "e": pa.list_(pa.list_(pa.uint32())),
    }
)
TABLE = pa.Table.from_pylist(ROWS, SCHEMA)


def test_it_is_pinned() -> None:
    """The names of imported parts are made of it: they must not change with a library."""
    assert content_hash(TABLE) == "258df38714f10af0eb079fdbde60fb39"


def test_chunks_slices_order_and_empty_columns_do_not_matter() -> None:
    chunked = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    sliced = pa.concat_tables([TABLE, TABLE]).slice(3)
    ordered = TABLE.select(["e", "a", "c", "b", "d"])
    wider = TABLE.append_column("f", pa.nulls(3, pa.string()))
    for other in (chunked, sliced, ordered, wider):
        assert content_hash(other) == content_hash(TABLE)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (0, {"a": [2, 1]}),
        (0, {"a": [1]}),
        (0, {"a": [1, None]}),
        (0, {"a": [0]}),
        (1, {"a": []}),
        (1, {"b": ""}),
        (2, {"b": "y"}),
        (1, {"c": False}),
        (1, {"d": 0.0}),
        (2, {"d": None}),
        (0, {"e": [[1], []]}),
        (2, {"e": [[2], [3]]}),
        (0, {"b": "xy"}),
    ],
)
def test_any_difference_counts(row: int, change: dict[str, object]) -> None:
    rows = [dict(one) for one in ROWS]
    rows[row] |= change
    assert content_hash(pa.Table.from_pylist(rows, SCHEMA)) != content_hash(TABLE)


def test_names_and_moved_text_count() -> None:
    assert content_hash(TABLE.rename_columns(["a", "b", "c", "d", "f"])) != content_hash(TABLE)
    first, second = (pa.table({"a": pa.array(texts)}) for texts in (["xy", "z"], ["x", "yz"]))
    assert content_hash(first) != content_hash(second)
