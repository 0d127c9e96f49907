"""The metadata at the end of a Parquet file: its schema, and where the pages of each column lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillroom.cache.parquet_layout import LIST, MAGIC, Field
from stillroom.cache.thrift_writer import Fields, i32, i64, list_of, struct, text, write_struct

VERSION = 2
REQUIRED, REPEATED = 0, 2
ZSTD = 6
CREATED_BY = "stillroom version 1"


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """Pages of one column of a row group."""

    field: Field
    data: bytes
    dictionary_bytes: int
    """Of the dictionary page and its header, 0 without one."""
    entries: int
    """Values and empty lists of all data pages."""
    encodings: tuple[int, ...]
    raw_bytes: int
    """Of all pages, decompressed, with their headers."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some sequences."""

    rows: int
    offset: int
    """First byte in the file."""
    chunks: tuple[ColumnChunk, ...]
    """One a column, end to end."""


def footer(fields: Sequence[Field], groups: Sequence[RowGroup], metadata: dict[str, str]) -> bytes:
    """Everything behind the last page."""
    schema = [struct({4: text("schema"), 5: i32(len(fields))})]
    for field in fields:
        schema += [struct(element) for element in _elements(field)]
    pairs = [struct({1: text(key), 2: text(value)}) for key, value in metadata.items()]
    file = {
        1: i32(VERSION),
        2: list_of(schema),
        3: i64(sum(group.rows for group in groups)),
        4: list_of([struct(_row_group(group)) for group in groups]),
        5: list_of(pairs),
        6: text(CREATED_BY),
    }
    data = write_struct(file)
    return data + len(data).to_bytes(4, "little") + MAGIC


def _elements(field: Field) -> list[Fields]:
    """Schema elements of a column, outermost first: `list<element>` as often as it is deep."""
    names = [field.name, *["element"] * field.depth]
    found: list[Fields] = []
    for name in names[:-1]:
        found.append({3: i32(REQUIRED), 4: text(name), 5: i32(1), 6: i32(LIST)})
        found.append({3: i32(REPEATED), 4: text("list"), 5: i32(1)})
    leaf: Fields = {1: i32(field.physical), 3: i32(REQUIRED), 4: text(names[-1])}
    if field.converted is not None:
        leaf[6] = i32(field.converted)
    return [*found, leaf]


def _row_group(group: RowGroup) -> Fields:
    columns, offset = [], group.offset
    for chunk in group.chunks:
        columns.append(struct({2: i64(0), 3: struct(_column(chunk, offset))}))
        offset += len(chunk.data)
    return {
        1: list_of(columns),
        2: i64(sum(chunk.raw_bytes for chunk in group.chunks)),
        3: i64(group.rows),
    }


def _column(chunk: ColumnChunk, offset: int) -> Fields:
    fields = {
        1: i32(chunk.field.physical),
        2: list_of([i32(encoding) for encoding in chunk.encodings]),
        3: list_of([text(name) for name in chunk.field.path]),
        4: i32(ZSTD),
        5: i64(chunk.entries),
        6: i64(chunk.raw_bytes),
        7: i64(len(chunk.data)),
        9: i64(offset + chunk.dictionary_bytes),
    }
    return fields | ({11: i64(offset)} if chunk.dictionary_bytes else {})
