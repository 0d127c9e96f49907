"""What a Parquet file says of its sizes is believed only where it can be so."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.parquet_bounds import check_bounds
from stillroom.cache.part import METADATA_KEYS, encode_part
from stillroom.cache.plain_parquet import read_footer
from stillroom.cache.thrift_reader import read_struct
from stillroom.cache.thrift_writer import varint
from tests.cache.fakes import make_meta, random_rollouts

DATA = encode_part(random_rollouts(0, 20), make_meta())
ROWS = 4_000_000


def written(table: pa.Table, **options: Any) -> bytes:
    """A file of a table."""
    sink = io.BytesIO()
    plain = {"compression": "zstd", "store_schema": False}
    pq.write_table(table, sink, **plain | options)
    return sink.getvalue()


def replaced(old: bytes, new: bytes) -> bytes:
    """`DATA` with other bytes in the place of the first such bytes of its footer."""
    size = int.from_bytes(DATA[-8:-4], "little")
    footer = DATA[-8 - size : -8]
    assert old in footer
    footer = footer.replace(old, new, 1)
    return DATA[: -8 - size] + footer + len(footer).to_bytes(4, "little") + DATA[-4:]


def refused(data: bytes, why: str) -> None:
    """Check that a file is refused."""
    with pytest.raises(ValueError, match=why):
        check_bounds(data, METADATA_KEYS)


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"use_dictionary": False}])
def test_plain_files_pass(options: dict[str, Any]) -> None:
    check_bounds(DATA, METADATA_KEYS)
    table = random_rollouts(0, 2000)
    check_bounds(written(table, row_group_size=300, data_page_size=200, **options), ())


@pytest.mark.parametrize(
    "values",
    [
        pa.nulls(ROWS, pa.list_(pa.uint32())),
        pa.array(np.zeros(ROWS, np.uint8)),
        pa.array(["x" * 100_000] * 1000),
        pa.DictionaryArray.from_arrays(np.zeros(30_000, np.int32), ["x" * 1000]),
    ],
    ids=["null lists", "one value", "one long string", "one string often"],
)
def test_a_small_file_that_becomes_large(values: pa.Array) -> None:
    data = written(pa.table({"a": values}))
    assert len(data) < 1 << 16
    refused(data, "far more than the file")


@pytest.mark.parametrize("codec", ["snappy", "gzip", "lz4", "brotli"])
def test_other_codecs(codec: str) -> None:
    refused(written(random_rollouts(0, 3), compression=codec), "codec")


def test_other_metadata() -> None:
    refused(written(random_rollouts(0, 3), store_schema=True), "ARROW:schema")
    with pytest.raises(ValueError, match="stillroom"):
        check_bounds(DATA, ())


def test_other_pages() -> None:
    refused(written(random_rollouts(0, 3), data_page_version="2.0"), "page of type 3")


def test_counts_that_disagree() -> None:
    rows = read_footer(DATA)[3]
    for other in (rows + 1, rows - 1):
        old, new = b"\x16" + varint(2 * rows) + b"\x19", b"\x16" + varint(2 * other) + b"\x19"
        refused(replaced(old, new), "rows in row groups")


def test_deep_and_broken_schemas() -> None:
    deep = pa.array([[[[[[[1]]]]]]])
    refused(written(pa.table({"a": deep})), "no tree")
    refused(replaced(b"\x15\x22\x00", b"\x15\x20\x00"), "no tree")
    refused(replaced(b"\x15\x22\x00", b"\x15\x24\x00"), "ends")


def test_pages_that_are_cut_off() -> None:
    """A column that says to be longer than the file, and one that ends within a page."""
    footer = read_footer(DATA)
    chunk = footer[4][0][1][0][3]
    sizes = varint(2 * chunk[5]), varint(2 * chunk[6]), varint(2 * chunk[7])
    whole = b"\x16" + b"\x16".join(sizes)
    for size, why in ((2**31, "a column of"), (chunk[7] - 1, "a page of type")):
        new = b"\x16" + b"\x16".join([*sizes[:2], varint(2 * size)])
        refused(replaced(whole, new), why)


def test_a_page_that_claims_more_than_the_file_may_become() -> None:
    start = len(b"PAR1")
    header, _ = read_struct(DATA, start)
    old = b"\x15" + varint(2 * header[2])
    assert DATA[start + 2 :].startswith(old)
    new = b"\x15" + varint(2 * (1 << 30))
    data = DATA[: start + 2] + new + DATA[start + 2 + len(old) :]
    refused(data, "far more|column of|cut off")


def test_columns_that_share_their_bytes() -> None:
    """Two columns of the same kind, of which the second says to lie where the first does."""
    values = pa.array(np.arange(20_000))
    data = written(pa.table({"a": values, "b": values}), use_dictionary=False)
    check_bounds(data, ())
    first, second = (column[3] for column in read_footer(data)[4][0][1])
    old, new = (b"\x26" + varint(2 * chunk[9]) for chunk in (second, first))
    assert data.count(old) >= 1
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8].replace(old, new)
    body = data[: first[9] + first[7]]
    refused(body + footer + len(footer).to_bytes(4, "little") + b"PAR1", "shared")
