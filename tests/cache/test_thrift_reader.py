"""Thrift's compact protocol: what pyarrow writes is read, and no bytes do harm."""

import io
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.thrift_reader import read_struct
from tests.cache.conftest import QUICK


def test_every_type_is_read() -> None:
    data = b"".join(
        (
            b"\x11\x12",  # 1: true, 2: false
            b"\x13\x07",  # 3: a byte
            b"\x14\x03\x15\x04",  # 4: -2, 5: 2
            b"\x16\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # 6: 2^63 - 1
            b"\x17" + struct.pack("<d", -0.5),
            b"\x18\x02hi",
            b"\x19\x25\x02\x01",  # 9: [1, -1]
            b"\x1a\x31\x01\x02\x01",  # 10: booleans, a byte each
            b"\x1c\x15\x02\x00",  # 11: {1: 1}
            b"\x05\x50\x06",  # 40, written out: 3
            b"\x19\xf5\x10" + b"\x02" * 16,  # 41: sixteen times 1
            b"\x00",
        )
    )
    expected = {1: True, 2: False, 3: 7, 4: -2, 5: 2, 6: 2**63 - 1, 7: -0.5, 8: b"hi"}
    expected |= {9: [1, -1], 10: [1, 2, 1], 11: {1: 1}, 40: 3, 41: [1] * 16}
    assert read_struct(data) == (expected, len(data))
    assert read_struct(b"xx" + data + b"xx", 2) == (expected, 2 + len(data))
    for length in range(len(data)):
        with pytest.raises(ValueError, match="cut off"):
            read_struct(data[:length])


def test_a_footer_of_pyarrow_is_read() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": range(100), "b": ["x"] * 100}), sink, row_group_size=30)
    data = sink.getvalue()
    size = int.from_bytes(data[-8:-4], "little")
    footer, end = read_struct(data[-8 - size : -8])
    meta = pq.ParquetFile(io.BytesIO(data)).metadata
    assert end == size
    assert footer[3] == 100
    assert [leaf[4] for leaf in footer[2]] == [b"schema", b"a", b"b"]
    assert [group[3] for group in footer[4]] == [30, 30, 30, 10]
    assert footer[6] == meta.created_by.encode()
    for number, group in enumerate(footer[4]):
        for index, column in enumerate(group[1]):
            theirs = meta.row_group(number).column(index)
            assert column[3][7] == theirs.total_compressed_size
            assert column[3][9] == theirs.data_page_offset


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x1c" * 40, "levels of structs"),
        (b"\x19" * 40, "levels of lists"),
        (b"\x1c\x19\x1c" * 20, "levels of structs"),
        (b"\x15" + b"\x80" * 20, "more than 64 bits"),
        (b"\x18\xff\xff\xff\xff\x7fx", "cut off"),
        (b"\x19\xf3\xff\xff\xff\xff\x7fx", "cut off"),
        (b"\x1b\x00", "type 11"),
        (b"\x1e\x00", "type 14"),
    ],
)
def test_what_claims_too_much_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_struct(data)


@settings(QUICK, max_examples=500)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_struct_or_refused(data: bytes) -> None:
    try:
        found, end = read_struct(data)
    except ValueError:
        return
    assert end <= len(data)
    assert len(repr(found)) <= 100 * len(data)
