"""What is written in Thrift's compact protocol is read back, by our reader and by the book."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.thrift_reader import BINARY, I32, I64, LIST, STRUCT, read_struct
from stillroom.cache.thrift_writer import (
    Value,
    i32,
    i64,
    list_of,
    struct,
    text,
    varint,
    write_struct,
)
from tests.cache.conftest import QUICK

SCALARS = st.one_of(
    st.integers(-(2**31), 2**31 - 1).map(i32),
    st.integers(-(2**63), 2**63 - 1).map(i64),
    st.text(max_size=200).map(text),
)


def structs(values: st.SearchStrategy[Value]) -> st.SearchStrategy[Value]:
    """Structs of some values."""
    return st.dictionaries(st.integers(1, 15), values, max_size=4).map(struct)


def lists(values: st.SearchStrategy[Value]) -> st.SearchStrategy[Value]:
    """Lists of one value, short and long."""
    return st.tuples(values, st.integers(1, 40)).map(lambda pair: list_of([pair[0]] * pair[1]))


VALUES = st.recursive(SCALARS, lambda inner: structs(inner) | lists(inner), max_leaves=8)


def plain(value: Value) -> Any:
    """A value as the reader gives it."""
    kind, held = value
    if kind == STRUCT:
        return {number: plain(inner) for number, inner in held.items()}
    return [plain(inner) for inner in held] if kind == LIST else held


@QUICK
@given(st.dictionaries(st.integers(1, 15), VALUES, max_size=6))
def test_structs_are_read_back(fields: dict[int, Value]) -> None:
    data = write_struct(fields)
    found, end = read_struct(data + b"more")
    assert found == {number: plain(value) for number, value in fields.items()}
    assert end == len(data)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "00"),
        ({1: i32(0), 3: i32(-1)}, "15 00 25 01 00"),
        ({2: i64(300)}, "26 d8 04 00"),
        ({1: text("ab")}, "18 02 61 62 00"),
        ({5: struct({1: i32(1)})}, "5c 15 02 00 00"),
        ({1: list_of([i32(1), i32(2)])}, "19 25 02 04 00"),
        ({1: list_of([i32(0)] * 15)}, "19 f5 0f" + " 00" * 15 + " 00"),
    ],
)
def test_bytes_by_hand(fields: dict[int, Value], expected: str) -> None:
    assert write_struct(fields) == bytes.fromhex(expected)


def test_the_order_of_fields_does_not_matter() -> None:
    assert write_struct({3: i32(1), 1: i32(2)}) == write_struct({1: i32(2), 3: i32(1)})


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "00"), (127, "7f"), (128, "8001"), (2**32, "8080808010")]
)
def test_varints_by_hand(number: int, expected: str) -> None:
    assert varint(number) == bytes.fromhex(expected)


def test_kinds_are_those_of_the_protocol() -> None:
    assert (I32, I64, BINARY, LIST, STRUCT) == (5, 6, 8, 9, 12)
