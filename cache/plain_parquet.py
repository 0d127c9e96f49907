"""A reader of plain Parquet files whose bytes nobody vouches for: flat columns without nulls, plain
encoding, zstd or nothing.

pyarrow believes what such a file says of itself: it aborts the process over some damaged footers,
and a page of 100 kB may have it allocate 2 GB. Here every size is checked before it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache.thrift_reader import read_struct

MAGIC = b"PAR1"
INT32, INT64, FLOAT, BYTE_ARRAY = 1, 2, 4, 6
DTYPES = {INT32: "<i4", INT64: "<i8", FLOAT: "<f4"}
REQUIRED = 0
UNCOMPRESSED, ZSTD = 0, 6
DATA_PAGE, PLAIN = 0, 0
FOOTER_BYTES = 64 << 10
"""A footer may have so many bytes, or a sixteenth of the file: parsed, it is some 70 times that."""
HEADER_BYTES = 64 << 10
"""Of a page's header at most."""


@dataclass
class Budget:
    """Bytes that the pages of a file may still become, and that they may still take in it."""

    raw_bytes: int
    stored_bytes: int

    def spend(self, raw_bytes: int) -> None:
        """Take some, or raise ValueError."""
        self.raw_bytes -= raw_bytes
        if raw_bytes < 0 or self.raw_bytes < 0:
            raise ValueError("pages that claim to become far more than the file")

    def take(self, data: bytes, start: int, size: int) -> bytes:
        """Bytes of a file, or ValueError: they are not all there, or columns share theirs."""
        self.stored_bytes -= size
        if min(start, size, self.stored_bytes) < 0 or start + size > len(data):
            raise ValueError(f"a column of {size} bytes at {start}, beyond the file or shared")
        return data[start : start + size]


def read_groups(
    data: bytes, columns: dict[str, int], raw_limit: int
) -> Iterator[dict[str, list[Any]]]:
    """Columns of each row group in turn, of equal lengths.

    Args:
        data: the file.
        columns: physical type of each column, in the order of the file.
        raw_limit: bytes that all pages together may become.

    Raises:
        ValueError: it is not such a file.
        OSError: a page cannot be decompressed.
    """
    footer = read_footer(data)
    _check_columns(footer.get(2), columns)
    budget = Budget(raw_limit, len(data))
    for group in structs(footer.get(4)):
        chunks = [struct(chunk.get(3)) for chunk in structs(group.get(1))]
        if len(chunks) != len(columns):
            raise ValueError(f"{len(chunks)} columns in a row group")
        pairs = zip(columns.items(), chunks, strict=True)
        values = {name: _read_chunk(data, chunk, kind, budget) for (name, kind), chunk in pairs}
        if any(len(column) != group.get(3) for column in values.values()):
            raise ValueError(f"columns of other lengths than {group.get(3)!r:.40}")
        yield values


def read_footer(data: bytes) -> dict[int, Any]:
    """The metadata of a file, by Parquet's field numbers.

    Raises:
        ValueError: there is none, or far too much of it.
    """
    size = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise ValueError("no Parquet file, or a part of one")
    if size > min(len(data) - 12, max(FOOTER_BYTES, len(data) // 16)):
        raise ValueError(f"a footer of {size} bytes")
    return read_tail(data[-8 - size :])


def read_tail(tail: bytes) -> dict[int, Any]:
    """The metadata of a file, from its last bytes.

    Raises:
        ValueError: these are not its end, or not all of its metadata.
    """
    size = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != MAGIC or size > len(tail) - 8:
        raise ValueError(f"no end of a Parquet file, or a footer of {size} bytes")
    footer, end = read_struct(tail[-8 - size : -8])
    if end != size:
        raise ValueError("a footer that ends early")
    return footer


def _check_columns(schema: Any, columns: dict[str, int]) -> None:
    found = [(leaf.get(4), leaf.get(1), leaf.get(3), leaf.get(5)) for leaf in structs(schema)[1:]]
    if found != [(name.encode(), kind, REQUIRED, None) for name, kind in columns.items()]:
        raise ValueError(f"columns {[name for name, *_ in found]}"[:400])


def _read_chunk(data: bytes, chunk: dict[int, Any], kind: int, budget: Budget) -> list[Any]:
    """Values of a column of a row group."""
    start, size, codec = chunk.get(9), chunk.get(7), chunk.get(4)
    if type(start) is not int or type(size) is not int:
        raise ValueError(f"a column at {start!r:.40} with {size!r:.40} bytes")
    pages = budget.take(data, start, size)
    values: list[Any] = []
    at = 0
    while at < len(pages):
        header, at = read_page_header(pages, at)
        count, raw, stored = _page_sizes(header, len(pages) - at)
        budget.spend(raw)
        values += _decode(_unpack(pages[at : at + stored], codec, raw), kind, count)
        at += stored
    return values


def read_page_header(pages: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Header of the page that begins at a byte, and the byte after it.

    Raises:
        ValueError: it is cut off, or of more than `HEADER_BYTES`.
    """
    header, size = read_struct(pages[at : at + HEADER_BYTES])
    return header, at + size


def _page_sizes(header: dict[int, Any], rest: int) -> tuple[int, int, int]:
    """Values, raw bytes and stored bytes of a page that has at most the `rest` of its column."""
    numbers = header.get(5)
    if header.get(1) != DATA_PAGE or not isinstance(numbers, dict) or numbers.get(2) != PLAIN:
        raise ValueError("other than a plain data page of version 1")
    sizes = (numbers.get(1), header.get(2), header.get(3))
    count, raw, stored = (size if type(size) is int else -1 for size in sizes)
    if min(count, raw, stored) < 0 or stored > rest:
        raise ValueError(f"a page of {stored} bytes, {raw} raw")
    return count, raw, stored


def _unpack(page: bytes, codec: Any, raw: int) -> bytes:
    if codec == UNCOMPRESSED and len(page) == raw:
        return page
    if codec != ZSTD:
        raise ValueError(f"a page of {len(page)} bytes, {raw} raw, in codec {codec!r:.40}")
    return pa.Codec("zstd").decompress(page, raw, asbytes=True) if raw else b""


def _decode(page: bytes, kind: int, count: int) -> list[Any]:
    if kind != BYTE_ARRAY:
        if len(page) != count * np.dtype(DTYPES[kind]).itemsize:
            raise ValueError(f"a page of {len(page)} bytes for {count} numbers")
        numbers: list[Any] = np.frombuffer(page, DTYPES[kind]).tolist()
        return numbers
    values, at = [], 0
    for _ in range(count):
        start = at + 4
        at = start + int.from_bytes(page[at:start], "little")
        values.append(page[start:at])
        if at > len(page):
            break
    if at != len(page):
        raise ValueError(f"a page of {len(page)} bytes in which {count} values end at {at}")
    return values


def structs(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list):
        raise ValueError("no list where Parquet has one")
    return [struct(item) for item in value]


def struct(value: Any) -> dict[int, Any]:
    if not isinstance(value, dict):
        raise ValueError("no struct where Parquet has one")
    return value
