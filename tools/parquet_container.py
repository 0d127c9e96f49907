"""Whether a Parquet shard's object is a file that other readers read as the manifest says: its
footer must be, to the byte, the one that describes the pages that lie before it."""

from collections.abc import Iterator

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import Manifest
from stillroom.cache.parquet_footer import ColumnChunk, RowGroup, footer
from stillroom.cache.parquet_layout import (
    MAGIC,
    METADATA_KEY,
    PLAIN,
    RLE,
    RLE_DICTIONARY,
    Field,
    fields_of,
)
from stillroom.cache.parquet_pages import DICTIONARY_PAGE, HEADER, read_pages


def check_parquet(data: bytes, manifest: Manifest) -> None:
    """Refuse an object that a Parquet reader would not read as the manifest says.

    Args:
        data: the whole object, whose chunks are verified.
        manifest: its manifest, which is possible for its commit.

    Raises:
        CorruptError: the file begins or ends with something else, or its footer differs.
    """
    extra = "extra_id" in manifest.arrays
    fields = fields_of(manifest.attributes["user_axes"], extra=extra)
    chunks = [chunk for entry in manifest.arrays.values() for chunk in entry.chunks]
    start = max((chunk.offset + chunk.length for chunk in chunks), default=len(MAGIC))
    try:
        expected = footer(fields, list(_groups(data, manifest, fields)), _metadata(manifest))
    except ValueError as error:
        raise _corrupt("container", "pages", str(error)) from error
    if data[: len(MAGIC)] != MAGIC or data[start:] != expected:
        got = f"others, of {len(data) - start} bytes"
        wanted = f"the {len(expected)} bytes of a footer for the manifest's columns"
        raise _corrupt("container", wanted, got)


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {METADATA_KEY: jsonfile.dump(manifest.attributes).decode()}


def _groups(data: bytes, manifest: Manifest, fields: tuple[Field, ...]) -> Iterator[RowGroup]:
    for group, rows in enumerate(manifest.row_groups):
        own = []
        for field in fields:
            chunk = manifest.arrays[field.name].chunks[group]
            own.append(_column(field, data[chunk.offset : chunk.offset + chunk.length]))
        offset = manifest.arrays[fields[0].name].chunks[group].offset
        yield RowGroup(rows, offset, tuple(own))


def _column(field: Field, chunk: bytes) -> ColumnChunk:
    pages = list(read_pages(chunk))
    first = HEADER.match(chunk)
    coded = first is not None and pages[0].kind == DICTIONARY_PAGE
    dictionary_bytes = first.end() + len(pages[0].stored) if first and coded else 0
    values = pages[1:] if coded else pages
    if not values:
        raise ValueError(f"{field.name}: a column without pages of values")
    encoding = RLE_DICTIONARY if coded else values[0].encoding
    headers = len(chunk) - sum(len(page.stored) for page in pages)
    return ColumnChunk(
        field,
        chunk,
        dictionary_bytes,
        entries=sum(page.entries for page in values),
        encodings=tuple(sorted({RLE, encoding} | ({PLAIN} if coded else set()))),
        raw_bytes=headers + sum(page.raw_bytes for page in pages),
    )


def _corrupt(where: str, expected: str, got: str) -> CorruptError:
    return CorruptError(where, expected, got, "Score the part again.")
