"""Decoding one column of a row group of a Parquet shard, strictly: pages other than those that
`parquet_writer` makes are refused, and none becomes larger than the commit allows."""

from dataclasses import dataclass

import numpy as np

from stillroom.cache.parquet_layout import RLE_DICTIONARY, Field, page_rows, plain_encoding
from stillroom.cache.parquet_levels import read_list_levels, read_nested_levels
from stillroom.cache.parquet_pages import DATA_PAGE, DICTIONARY_PAGE, Page, read_pages
from stillroom.cache.parquet_values import decode_values, encoded_bytes, names_dictionary
from stillroom.cache.schema import UNUSED_ID

LEVEL_BYTES = 32
"""Of the lengths and run headers of both kinds of levels, at most."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a commit says of the sequences of a row group."""

    positions: np.ndarray
    """(rows,) scored tokens of each."""
    length: np.ndarray | None
    """(rows,) values of each on the column's axis; None where only the column knows."""
    limit: int
    """Values of the column at most."""
    width: int
    """K or M, 1 in columns without entries."""
    topk: int


@dataclass(frozen=True, slots=True)
class Values:
    """Some sequences' values of a column."""

    value: np.ndarray
    """(n,) or (n, width)."""
    length: np.ndarray
    """(rows,) values of each of these sequences."""
    count: np.ndarray
    """(n,) used entries of each value, in columns that have entries."""


def decode_column(field: Field, chunk: bytes, rows: Rows, start: int, stop: int) -> Values:
    """Decode the sequences [start, stop) of a row group.

    Args:
        field: the column.
        chunk: its bytes in the row group.
        rows: all sequences of the row group.
        start: at least 0.
        stop: above `start`.

    Raises:
        ValueError: the bytes are no such column.
    """
    pages = list(read_pages(chunk))
    dictionary = None
    if pages and pages[0].kind == DICTIONARY_PAGE:
        dictionary = _dictionary(field, pages.pop(0))
    counts = page_rows(field, rows.positions, rows.topk)
    if len(pages) != len(counts):
        raise ValueError(f"{len(pages)} pages for {len(counts)}")
    found, row = [], 0
    for page, count in zip(pages, counts, strict=True):
        wanted = slice(max(start - row, 0), min(stop - row, count))
        if wanted.start < wanted.stop:
            own = slice(row, row + count)
            found.append(_decode_page(field, page, rows, own, wanted, dictionary))
        row += count
    return found[0] if len(found) == 1 else _joined(found)


def _joined(parts: list[Values]) -> Values:
    return Values(
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.count for part in parts]),
    )


def _dictionary(field: Field, page: Page) -> np.ndarray:
    """What the codes of a column stand for."""
    if field.names:
        expected = names_dictionary(field.names)
        sizes = page.entries, page.raw_bytes
        if sizes != (len(field.names), len(expected)) or page.decompress() != expected:
            raise ValueError("other names")
        return np.arange(len(field.names), dtype=field.dtype)
    if not field.is_id or page.raw_bytes != 4 * page.entries or page.entries > 1 << 16:
        raise ValueError(f"a dictionary of {page.entries} values in {page.raw_bytes} bytes")
    return np.frombuffer(page.decompress(), "<u4")


def _decode_page(
    field: Field,
    page: Page,
    rows: Rows,
    own: slice,
    wanted: slice,
    dictionary: np.ndarray | None,
) -> Values:
    """Some sequences, counted in the page, which holds the row group's sequences `own`."""
    encoding = plain_encoding(field) if dictionary is None else RLE_DICTIONARY
    if page.kind != DATA_PAGE or page.encoding != encoding:
        raise ValueError(f"a page of type {page.kind} in encoding {page.encoding}")
    raw = _decompress(field, page, rows, own)
    length, count, at = _read_levels(field, raw, page.entries, rows, own)
    values, part = int(length.sum()), _span(length, wanted)
    if field.depth == 2:
        values, part, count = int(count.sum()), _span(count, part), count[part]
    if len(raw) != at + encoded_bytes(field, values, encoding):
        raise ValueError(f"{len(raw) - at} bytes of {values} values")
    flat = decode_values(field, raw, at, values, encoding, part)
    if dictionary is not None:
        if flat.max(initial=0) >= len(dictionary):
            raise ValueError("a code that stands for nothing")
        flat = dictionary.take(flat)
    return Values(_entries(field, flat, count, rows.width), length[wanted], count)


def _decompress(field: Field, page: Page, rows: Rows, own: slice) -> bytes:
    """A page's levels and values, which are no more than its sequences can have."""
    most = rows.limit if rows.length is None else int(rows.length[own].sum()) * rows.width
    most += own.stop - own.start
    values_bytes = encoded_bytes(field, most, page.encoding)
    if page.entries > most or page.raw_bytes > LEVEL_BYTES + field.depth * most // 4 + values_bytes:
        raise ValueError(f"{page.entries} values in {page.raw_bytes} bytes for {most}")
    return page.decompress()


def _read_levels(
    field: Field, raw: bytes, entries: int, rows: Rows, own: slice
) -> tuple[np.ndarray, np.ndarray, int]:
    """Values of each sequence, entries of each value, and where the levels end."""
    known = None if rows.length is None else rows.length[own]
    none = np.empty(0, np.int64)
    if field.depth == 2 and known is not None:
        count, at = read_nested_levels(raw, entries, known, rows.width)
        return known, count, at
    length, at = np.ones(entries, np.int64), 0
    if field.depth == 1:
        length, at = read_list_levels(raw, entries)
    is_known = known is None or np.array_equal(length, known)
    if len(length) != own.stop - own.start or not is_known:
        raise ValueError("other lists than the sequences have")
    return length, none, at


def _span(length: np.ndarray, wanted: slice) -> slice:
    """Values of some lists."""
    start = int(length[: wanted.start].sum())
    return slice(start, start + int(length[wanted].sum()))


def _entries(field: Field, flat: np.ndarray, count: np.ndarray, width: int) -> np.ndarray:
    """Values as (n, width) where they have entries, filled up where these are unused."""
    if field.depth < 2:
        return flat
    if (count == width).all():
        return flat.reshape(-1, width)
    if field.width == "M" or count.min() < 1 or count.max() > width:
        raise ValueError(f"other than {width} entries")
    out = np.full((len(count), width), UNUSED_ID if field.is_id else -np.inf, flat.dtype)
    out[np.arange(width) < count[:, None]] = flat
    return out
