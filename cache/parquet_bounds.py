"""What a Parquet file says of itself, checked before pyarrow believes it: its columns, where their
pages lie, and how much they become."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from stillroom.cache.plain_parquet import (
    BYTE_ARRAY,
    DATA_PAGE,
    UNCOMPRESSED,
    ZSTD,
    Budget,
    read_footer,
    read_page_header,
    struct,
    structs,
)

DICTIONARY_PAGE = 2
SMALL_BYTES = 16 << 20
INFLATION = 100
"""A file may become so many times its bytes, or `SMALL_BYTES` if that is more."""
VALUE_BYTES = 8
"""Of a value with its levels, as it is counted besides the bytes of its page."""
MAX_DEPTH = 6
LENGTH_BYTES = 4
"""Of a string's length, and the least that any value of a dictionary takes."""


def check_bounds(data: bytes, metadata_keys: Sequence[bytes]) -> None:
    """Refuse a file that is not plainly made of columns of pages, uncompressed or in Zstandard, or
    that becomes far more than its bytes.

    Args:
        data: the file.
        metadata_keys: keys of all metadata that it may have.

    Raises:
        ValueError: it is not such a file; says what is wrong.
    """
    footer = read_footer(data)
    keys = [pair.get(1) for pair in structs(footer.get(5, []))]
    if 8 in footer or any(key not in metadata_keys for key in keys):
        raise ValueError(f"encryption, or metadata {keys}"[:200])
    leaves = _leaves(structs(footer.get(2)))
    budget = Budget(max(SMALL_BYTES, INFLATION * len(data)), len(data))
    rows = 0
    for group in structs(footer.get(4)):
        chunks = structs(group.get(1))
        if len(chunks) != len(leaves):
            raise ValueError(f"{len(chunks)} columns of {len(leaves)} in a row group")
        rows += _count(group.get(3))
        for kind, chunk in zip(leaves, chunks, strict=True):
            if 1 in chunk or 8 in chunk or 9 in chunk:
                raise ValueError("a column in another file, or an encrypted one")
            _check_chunk(data, struct(chunk.get(3)), kind, budget)
    if rows != footer.get(3):
        raise ValueError(f"{rows} rows in row groups, {footer.get(3)!r:.40} in all")
    budget.spend(VALUE_BYTES * rows)


def _leaves(schema: list[dict[int, Any]]) -> list[int]:
    """Physical types of the columns of a schema, whose tree is checked."""
    leaves: list[int] = []
    open_children = [1]
    for element in schema:
        while open_children and open_children[-1] == 0:
            open_children.pop()
        if not open_children or len(open_children) > MAX_DEPTH or type(element.get(4)) is not bytes:
            raise ValueError("a schema that is no tree of named columns")
        element[4].decode()
        open_children[-1] -= 1
        if element.get(5):
            open_children.append(_count(element[5]))
        else:
            leaves.append(_count(element.get(1)))
    if any(open_children):
        raise ValueError("a schema that ends early")
    return leaves


def _check_chunk(data: bytes, chunk: dict[int, Any], kind: int, budget: Budget) -> None:
    """One column of a row group."""
    if chunk.get(1) != kind or chunk.get(4) not in (UNCOMPRESSED, ZSTD):
        raise ValueError(f"a column of type {chunk.get(1)!r:.40} in codec {chunk.get(4)!r:.40}")
    start, size, coded = _count(chunk.get(9)), _count(chunk.get(7)), _count(chunk.get(11, 0))
    start = coded if 0 < coded < start else start
    pages = budget.take(data, start, size)
    at, values, longest = 0, 0, 0
    while at < size:
        at, count, dictionary = _check_page(pages, at, chunk[4], budget)
        if dictionary is None:
            values += count
        elif kind == BYTE_ARRAY:
            longest = max(longest, _longest(dictionary, count))
    if values != chunk.get(5):
        raise ValueError(f"{values} values in pages, {chunk.get(5)!r:.40} in all")
    budget.spend((VALUE_BYTES + longest) * values)


def _check_page(pages: bytes, at: int, codec: int, budget: Budget) -> tuple[int, int, bytes | None]:
    """Where a page ends, how many values it has, and its bytes if it is a dictionary."""
    header, start = read_page_header(pages, at)
    raw, stored = _count(header.get(2)), _count(header.get(3))
    end = start + stored
    is_dictionary = header.get(1) == DICTIONARY_PAGE
    if end > len(pages) or header.get(1) not in (DATA_PAGE, DICTIONARY_PAGE):
        raise ValueError(f"a page of type {header.get(1)!r:.40} and {stored} bytes")
    budget.spend(raw)
    count = _count(struct(header.get(7 if is_dictionary else 5)).get(1))
    if not is_dictionary:
        return end, count, None
    if LENGTH_BYTES * count > raw:
        raise ValueError(f"a dictionary of {count} values in {raw} bytes")
    page = pages[start:end]
    if codec == ZSTD:
        page = pa.Codec("zstd").decompress(page, raw, asbytes=True) if raw else b""
    return end, count, page


def _longest(page: bytes, count: int) -> int:
    """Bytes of the longest of a dictionary's strings."""
    at = longest = 0
    for _ in range(count):
        size = int.from_bytes(page[at : at + LENGTH_BYTES], "little")
        at += LENGTH_BYTES + size
        longest = max(longest, size)
        if at > len(page):
            raise ValueError(f"a dictionary of {len(page)} bytes that is cut off")
    return longest


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} where a count stands")
    return value
