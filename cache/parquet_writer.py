"""Writing a shard as one Parquet file with one row a sequence; equal arrays give equal bytes.

Pages are encoded here: no Parquet writer gives token ids the codes that they take the least bytes
with (see `parquet_id_codes`).
"""

from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import ShapeError
from stillroom.cache.manifest import ArrayEntry, Chunk
from stillroom.cache.parquet_footer import ColumnChunk, RowGroup, footer
from stillroom.cache.parquet_id_codes import code_ids
from stillroom.cache.parquet_layout import (
    MAGIC,
    METADATA_KEY,
    PLAIN,
    RLE,
    RLE_DICTIONARY,
    Field,
    fields_of,
    page_rows,
    plain_encoding,
    row_groups,
)
from stillroom.cache.parquet_levels import Levels, list_levels, nested_levels, no_levels
from stillroom.cache.parquet_pages import EncodedPage, data_page, dictionary_page
from stillroom.cache.parquet_values import encode_values, names_dictionary
from stillroom.cache.schema import EDGE_OF, Arrays
from stillroom.cache.shard_format import Encoded

Coded = tuple[np.ndarray, EncodedPage]


def encode_parquet(arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
    """Encode every column of a shard into one file; see `ShardFormat.encode`.

    Raises:
        ShapeError: a flag is not 0 or 1, or a code stands for no name.
    """
    fields = fields_of(attributes["user_axes"], extra="extra_id" in arrays)
    for field in fields:
        _check_codes(field, arrays[field.name])
    length = {axis: np.diff(arrays[edge].astype(np.int64)) for axis, edge in EDGE_OF.items()}
    topk = arrays["topk_id"].shape[1]
    rows = row_groups(length["position"], length["token"], length["teacher_token"], topk)
    chunks: dict[str, list[Chunk]] = {field.name: [] for field in fields}
    groups, parts, offset, first = [], [MAGIC], len(MAGIC), 0
    for count in rows:
        encoder = _GroupEncoder(arrays, first, first + count)
        group = RowGroup(count, offset, tuple(encoder.encode(field) for field in fields))
        for chunk in group.chunks:
            digest = jsonfile.digest(chunk.data)
            chunks[chunk.field.name].append(Chunk(offset, len(chunk.data), digest))
            parts.append(chunk.data)
            offset += len(chunk.data)
        groups.append(group)
        first += count
    metadata = {METADATA_KEY: jsonfile.dump(attributes).decode()}
    parts.append(footer(fields, groups, metadata))
    entries = {
        f.name: ArrayEntry(f.dtype, arrays[f.name].shape, tuple(chunks[f.name])) for f in fields
    }
    return Encoded(b"".join(parts), entries, attributes, tuple(rows))


class _GroupEncoder:
    """Encodes columns of the sequences [start, stop)."""

    def __init__(self, arrays: Arrays, start: int, stop: int) -> None:
        self._arrays = arrays
        self._rows = start, stop
        self._edges = {
            axis: arrays[edge][start : stop + 1].astype(np.int64) for axis, edge in EDGE_OF.items()
        }
        self._shared: dict[tuple[str, int], Levels] = {}

    def encode(self, field: Field) -> ColumnChunk:
        """All pages of a column."""
        values, pages = self._values(field), []
        coded = _code(field, values)
        if coded is not None:
            values, dictionary = coded
            pages.append(dictionary)
        encoding = RLE_DICTIONARY if coded else plain_encoding(field)
        entries = row = at = 0
        topk = self._arrays["topk_id"].shape[1]
        for count in page_rows(field, np.diff(self._edges["position"]), topk):
            levels = self._levels(field, row, row + count)
            own = encode_values(field, values[at : at + levels.values], encoding)
            pages.append(data_page(levels.data, own, levels.entries, encoding))
            row, at, entries = row + count, at + levels.values, entries + levels.entries
        return ColumnChunk(
            field,
            data=b"".join(page.data for page in pages),
            dictionary_bytes=len(pages[0].data) if coded else 0,
            entries=entries,
            encodings=tuple(sorted({RLE, encoding} | ({PLAIN} if coded else set()))),
            raw_bytes=sum(page.raw_bytes for page in pages),
        )

    def _values(self, field: Field) -> np.ndarray:
        """All values of a column end to end, unused entries left out."""
        start, stop = self._span(field, 0, self._rows[1] - self._rows[0])
        values = self._arrays[field.name][start:stop]
        if field.width == "K":
            count = self._arrays["topk_count"][start:stop, None]
            if (count < values.shape[1]).any():
                used: np.ndarray = values[np.arange(values.shape[1]) < count]
                return used
        return np.ascontiguousarray(values).ravel()

    def _levels(self, field: Field, row: int, stop: int) -> Levels:
        if field.depth == 0:
            return no_levels(stop - row)
        outer = np.diff(self._edges[field.axis][row : stop + 1])
        if field.depth == 1:
            return list_levels(outer)
        if (field.width, row) not in self._shared:
            start, end = self._span(field, row, stop)
            inner = np.full(end - start, self._arrays[field.name].shape[1])
            if field.width == "K":
                inner = self._arrays["topk_count"][start:end].astype(np.int64)
            self._shared[field.width, row] = nested_levels(outer, inner)
        return self._shared[field.width, row]

    def _span(self, field: Field, row: int, stop: int) -> tuple[int, int]:
        """Rows of a column's array for rows of the group."""
        if field.depth == 0:
            return self._rows[0] + row, self._rows[0] + stop
        edge = self._edges[field.axis]
        return int(edge[row]), int(edge[stop])


def _code(field: Field, values: np.ndarray) -> Coded | None:
    """Codes and the dictionary page that they need; None where values stand for themselves."""
    if field.names:
        return values.astype(np.uint8), dictionary_page(
            names_dictionary(field.names), len(field.names)
        )
    codes = code_ids(values) if field.is_id else None
    if codes is None:
        return None
    return codes.code, dictionary_page(codes.id_list.astype("<u4").tobytes(), len(codes.id_list))


def _check_codes(field: Field, array: np.ndarray) -> None:
    limit = len(field.names) or (2 if field.stored == "bool" else 0)
    if limit and array.max(initial=0) >= limit:
        where, do = f"column {field.name!r}", "Build the shard with cache.score."
        raise ShapeError(where, f"numbers below {limit}", f"{array.max()}", do)
