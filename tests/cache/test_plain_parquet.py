"""Plain Parquet is read as pyarrow reads it; whatever else a file says, it is refused in time."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import plain_parquet
from stillroom.cache.plain_parquet import (
    BYTE_ARRAY,
    FLOAT,
    INT32,
    INT64,
    read_footer,
    read_groups,
)
from stillroom.cache.thrift_reader import read_struct
from tests.cache.conftest import QUICK

COLUMNS = {"text": BYTE_ARRAY, "small": INT32, "large": INT64, "real": FLOAT}
SCHEMA = pa.schema(
    [
        pa.field("text", pa.binary(), nullable=False),
        pa.field("small", pa.int32(), nullable=False),
        pa.field("large", pa.int64(), nullable=False),
        pa.field("real", pa.float32(), nullable=False),
    ]
)
ROW = st.fixed_dictionaries(
    {
        "text": st.binary(max_size=30),
        "small": st.integers(-(2**31), 2**31 - 1),
        "large": st.integers(-(2**63), 2**63 - 1),
        "real": st.floats(width=32, allow_nan=False),
    }
)
ROWS = [{"text": b"abc" * i, "small": i, "large": -i, "real": i / 2} for i in range(50)]
LIMIT = 1 << 20


def written(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, **options: Any) -> bytes:
    """A file of rows."""
    sink = io.BytesIO()
    plain = {"use_dictionary": False, "write_statistics": False, "compression": "zstd"}
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, **plain | options)
    return sink.getvalue()


def read(data: bytes, limit: int = LIMIT) -> list[dict[str, Any]]:
    """Rows of a file."""
    groups = list(read_groups(data, COLUMNS, limit))
    return [dict(zip(g, row, strict=True)) for g in groups for row in zip(*g.values(), strict=True)]


DATA = written(ROWS, row_group_size=20, data_page_size=100, write_page_checksum=True)


@QUICK
@given(st.lists(ROW, max_size=30), st.sampled_from(["zstd", "none"]), st.integers(1, 200))
def test_rows_come_back(rows: list[dict[str, Any]], compression: str, page_bytes: int) -> None:
    data = written(
        rows,
        compression=compression,
        data_page_size=page_bytes,
        row_group_size=7,
        write_batch_size=2,
        write_statistics=page_bytes % 2 == 0,
    )
    assert read(data) == rows


def test_there_are_many_pages_and_groups() -> None:
    assert read(DATA) == ROWS
    assert len(list(read_groups(DATA, COLUMNS, LIMIT))) == 3


@settings(QUICK, max_examples=500)
@given(st.data())
def test_changed_bytes_are_refused_or_read(data: st.DataObject) -> None:
    changed = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(DATA) - 1))] = data.draw(st.integers(0, 255))
    try:
        rows = read(bytes(changed), 20_000)
    except (ValueError, OSError):
        return
    assert sum(len(row["text"]) for row in rows) <= 20_000


@pytest.mark.parametrize("length", [0, 3, 8, 11, 12, 100, len(DATA) - 1])
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="no Parquet file"):
        read(DATA[:length])


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_pages_that_become_too_much_are_not_unpacked(
    monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    data = written([{**ROWS[0], "text": b"\0" * 300_000}] * 3, compression=compression)
    raw = 3 * (300_000 + 4 + 4 + 8 + 4)
    assert len(read(data, raw)) == 3
    monkeypatch.setattr(plain_parquet, "_unpack", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="far more than the file"):
        read(data, 3 * 300_004 - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True},
        {"compression": "gzip"},
        {"compression": "snappy"},
        {"data_page_version": "2.0"},
        {"column_encoding": {"large": "DELTA_BINARY_PACKED"}},
        {"column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"column_encoding": {"real": "BYTE_STREAM_SPLIT"}},
    ],
    ids=str,
)
def test_other_encodings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="page"):
        read(written(ROWS, **options))


@pytest.mark.parametrize(
    "field",
    [
        pa.field("large", pa.int64(), nullable=True),
        pa.field("large", pa.int32(), nullable=False),
        pa.field("other", pa.int64(), nullable=False),
        pa.field("large", pa.list_(pa.int64()), nullable=False),
        pa.field("large", pa.struct([("large", pa.int64())]), nullable=False),
    ],
    ids=str,
)
def test_other_columns_are_refused(field: pa.Field) -> None:
    rows = [{**row, field.name: None if field.nullable else 1} for row in ROWS]
    value: Any = {"list": [1], "struc": {"large": 1}}.get(str(field.type)[:5].rstrip("<"), 1)
    rows = [{**row, field.name: value} for row in rows]
    with pytest.raises(ValueError, match="columns"):
        read(written(rows, SCHEMA.set(2, field)))


def varint(value: int) -> bytes:
    """A number of 0 or more as Thrift's compact protocol writes it."""
    value, out = value << 1, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def with_page(header: bytes, page: bytes) -> bytes:
    """A file whose first column of one group is this page, whatever it says."""
    data = written(ROWS[:3])
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    chunk = read_struct(footer)[0][4][0][1][0][3]
    old = b"\x16" + varint(chunk[7]) + b"\x26" + varint(chunk[9])
    assert footer.count(old) == 1
    new = b"\x16" + varint(len(header + page)) + b"\x26" + varint(len(data))
    footer = footer.replace(old, new)
    return data + header + page + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def page_header(raw: int, stored: int, count: int, kind: int = 0, encoding: int = 0) -> bytes:
    """A header of a data page."""
    numbers = b"\x15" + varint(count) + b"\x15" + varint(encoding) + b"\x15\x06\x15\x06\x00"
    sizes = b"\x15" + varint(raw) + b"\x15" + varint(stored)
    return b"\x15" + varint(kind) + sizes + b"\x2c" + numbers + b"\x00"


VALUES = b"\1\0\0\0a\0\0\0\0\2\0\0\0bc"
PACKED = pa.Codec("zstd").compress(VALUES, asbytes=True)
RIGHT = (len(VALUES), len(PACKED), 3)


def test_a_page_by_hand_is_read() -> None:
    rows = read(with_page(page_header(*RIGHT), PACKED))
    assert [row["text"] for row in rows] == [b"a", b"", b"bc"]


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (page_header(2**31 - 1, RIGHT[1], 3), "far more than the file"),
        (page_header(2**62, RIGHT[1], 3), "far more than the file"),
        (page_header(RIGHT[0] - 1, RIGHT[1], 3), "ZSTD"),
        (page_header(RIGHT[0] + 1, RIGHT[1], 3), "ZSTD"),
        (page_header(RIGHT[0], RIGHT[1] + 1, 3), "a page of"),
        (page_header(RIGHT[0], RIGHT[1] - 1, 3), "ZSTD|cut off"),
        (page_header(RIGHT[0], RIGHT[1], 2), "2 values end at 9"),
        (page_header(RIGHT[0], RIGHT[1], 4), "4 values end at"),
        (page_header(RIGHT[0], RIGHT[1], 2**31 - 1), "values end at"),
        (page_header(*RIGHT, kind=2), "other than a plain data page"),
        (page_header(*RIGHT, encoding=2), "other than a plain data page"),
        (page_header(*RIGHT)[:6] + b"\x00", "other than a plain data page"),
        (b"\x15\x00\x15\x01\x15\x00\x2c\x15\x06\x15\x00\x00\x00", "-1 raw"),
        (b"\x15\x00\x15\x02\x15\x01\x2c\x15\x06\x15\x00\x00\x00", "-1 bytes"),
        (b"\x15\x00\x15\x02\x15\x00\x2c\x15\x05\x15\x00\x00\x00", "a page of"),
        (b"\x15\x00\x15\x02\x15\x00\x25\x06\x00", "other than a plain data page"),
    ],
)
def test_a_page_that_says_something_else_is_refused(header: bytes, problem: str) -> None:
    with pytest.raises((ValueError, OSError), match=problem):
        read(with_page(header, PACKED))


def test_groups_of_unequal_columns_are_refused() -> None:
    values = VALUES[:9]
    packed = pa.Codec("zstd").compress(values, asbytes=True)
    with pytest.raises(ValueError, match="other lengths than 3"):
        read(with_page(page_header(len(values), len(packed), 2), packed))


def test_a_long_footer_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_parquet, "FOOTER_BYTES", 100)
    with pytest.raises(ValueError, match="a footer of"):
        read(DATA)


def test_columns_that_share_their_bytes_are_refused() -> None:
    """Many row groups in one place would take far more time than the file's size says."""
    footer = read_footer(DATA)
    groups = [[column[3] for column in group[1]] for group in footer[4]]
    first, second = groups[0][0], groups[1][0]
    whole = [b"\x16" + varint(c[7]) + b"\x26" + varint(c[9]) for c in (first, second)]
    size = int.from_bytes(DATA[-8:-4], "little")
    tail = DATA[-8 - size : -8]
    assert tail.count(whole[1]) == 1
    shared = b"\x16" + varint(len(DATA) - first[9]) + b"\x26" + varint(first[9])
    tail = tail.replace(whole[1], shared)
    with pytest.raises(ValueError, match="beyond the file or shared"):
        read(DATA[: -8 - size] + tail + len(tail).to_bytes(4, "little") + b"PAR1")


def test_a_long_page_header_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_parquet, "HEADER_BYTES", 100)
    header = page_header(*RIGHT)[:-1]
    longer = {size: header + bytes([0x18, size]) + b"x" * size + b"\0" for size in (10, 90)}
    assert len(read(with_page(longer[10], PACKED))) == 3
    with pytest.raises(ValueError, match="cut off"):
        read(with_page(longer[90], PACKED))
