"""Decoding a column that a hostile writer made: an error, or numbers of the right dtype and count,
never much memory."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.parquet_column import Rows, Values, decode_column
from stillroom.cache.parquet_layout import PLAIN, Field
from stillroom.cache.parquet_pages import (
    DICTIONARY_PAGE,
    SMALL_BYTES,
    Page,
    data_page,
    dictionary_page,
    read_pages,
)
from stillroom.cache.parquet_shard import ParquetFormat, ParquetReader
from stillroom.cache.testing_shard import Stored, random_stored
from stillroom.cache.thrift_writer import i32, struct, write_struct
from tests.cache.conftest import QUICK
from tests.cache.fakes import same_bits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stored() -> Stored:
    """A shard of one row group and one page a column."""
    return random_stored(ParquetFormat(), positions=300)


def column(stored: Stored, name: str) -> tuple[Field, list[Page], Rows]:
    """Pages of a column, and what a reader knows of it."""
    reader = ParquetReader(stored.source)
    chunk = stored.source.manifest.arrays[name].chunks[0]
    data = stored.encoded.data[chunk.offset : chunk.offset + chunk.length]
    field = reader._fields[name]
    return field, list(read_pages(data)), reader._group_rows(field, 0)


def encode(pages: list[Page], raws: list[bytes]) -> bytes:
    """The same pages with other content."""
    out = b""
    for page, raw in zip(pages, raws, strict=True):
        if page.kind == DICTIONARY_PAGE:
            out += dictionary_page(raw, page.entries).data
        else:
            out += data_page(b"", raw, page.entries, page.encoding).data
    return out


def check(stored: Stored, field: Field, values: Values) -> None:
    """Dtype and count are those of the column, whatever the numbers."""
    expected = stored.arrays[field.name]
    if field.name != "teacher_prompt":
        assert values.value.shape == expected.shape
    assert values.value.dtype == expected.dtype
    assert values.length.sum() == len(values.value)


def names(stored: Stored) -> Iterator[str]:
    """All columns."""
    yield from stored.source.manifest.arrays


def test_columns_are_decoded(stored: Stored) -> None:
    for name in names(stored):
        field, pages, rows = column(stored, name)
        data = encode(pages, [page.decompress() for page in pages])
        found = decode_column(field, data, rows, 0, len(rows.positions))
        assert same_bits(found.value, stored.arrays[name])
        if field.width == "K":
            assert found.count.tolist() == stored.arrays["topk_count"].tolist()


@settings(QUICK, max_examples=200)
@given(data=st.data())
def test_other_bytes_in_pages_are_refused_or_other_numbers(
    stored: Stored, data: st.DataObject
) -> None:
    """Levels, codes, dictionaries and values, compressed again as a hostile writer would."""
    name = data.draw(st.sampled_from(sorted(names(stored))))
    field, pages, rows = column(stored, name)
    raws = [bytearray(page.decompress()) for page in pages]
    for _ in range(data.draw(st.integers(1, 4))):
        raw = raws[data.draw(st.integers(0, len(raws) - 1))]
        at = data.draw(
            st.one_of(st.integers(0, min(40, len(raw)) - 1), st.integers(0, len(raw) - 1))
        )
        kind = data.draw(st.sampled_from(["flip", "flip", "cut", "insert"]))
        if kind == "flip":
            raw[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut" and len(raw) > 1:
            del raw[at]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    try:
        found = decode_column(
            field, encode(pages, [bytes(raw) for raw in raws]), rows, 0, len(rows.positions)
        )
    except ValueError:
        return
    check(stored, field, found)


@settings(QUICK, max_examples=200)
@given(data=st.data())
def test_other_counts_in_headers_are_refused(stored: Stored, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(names(stored))))
    field, pages, rows = column(stored, name)
    raws = [page.decompress() for page in pages]
    number = data.draw(st.integers(0, len(pages) - 1))
    page = pages[number]
    step = data.draw(st.integers(1, 2**31 - 1))
    entries = (page.entries + step) % 2**31
    pages[number] = Page(page.kind, entries, page.encoding, page.raw_bytes, page.stored)
    with pytest.raises(ValueError, match=r".+"):
        decode_column(field, encode(pages, raws), rows, 0, len(rows.positions))


def test_pages_of_other_columns_are_refused_or_other_numbers(stored: Stored) -> None:
    for name in names(stored):
        field, _, rows = column(stored, name)
        for other in names(stored):
            _, pages, _ = column(stored, other)
            data = encode(pages, [page.decompress() for page in pages])
            try:
                found = decode_column(field, data, rows, 0, len(rows.positions))
            except ValueError:
                continue
            check(stored, field, found)


def test_pages_more_or_less_are_refused(stored: Stored) -> None:
    for name in names(stored):
        field, pages, rows = column(stored, name)
        raws = [page.decompress() for page in pages]
        last = (pages[-1:], raws[-1:])
        for changed in (
            (pages[:-1], raws[:-1]),
            (pages + last[0], raws + last[1]),
            (pages[:1] + pages, raws[:1] + raws),
            (pages[::-1] if len(pages) > 1 else [], raws[::-1] if len(pages) > 1 else []),
        ):
            with pytest.raises(ValueError, match=r".+"):
                decode_column(field, encode(*changed), rows, 0, len(rows.positions))


@pytest.mark.parametrize("name", ["topk_id", "source"])
def test_a_code_beyond_the_dictionary_is_refused(stored: Stored, name: str) -> None:
    field, pages, rows = column(stored, name)
    raws = [page.decompress() for page in pages]
    raws[1] = raws[1][: -8 * (2 if field.is_id else 1)] + b"\xff" * 8 * (2 if field.is_id else 1)
    with pytest.raises(ValueError, match="stands for nothing"):
        decode_column(field, encode(pages, raws), rows, 0, len(rows.positions))


@pytest.mark.dist
def test_a_page_that_claims_to_inflate_takes_no_memory() -> None:
    """In a process of its own, which says by how much its largest size grew."""
    command = [sys.executable, "-m", "tests.cache.test_parquet_column"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 10


def read_bombs() -> int:
    """Decode pages of some kB that become 64 MiB; by how many KiB the process grew."""
    stored = random_stored(ParquetFormat(), positions=300)
    stored.read_all()
    (bomb,) = read_pages(data_page(b"", bytes(SMALL_BYTES), 300, PLAIN).data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names(stored):
        field, pages, rows = column(stored, name)
        head = encode(pages[:-1], [page.decompress() for page in pages[:-1]])
        for entries in (0, 1, 300, SMALL_BYTES, 2**31 - 1):
            page = i32(entries), i32(pages[-1].encoding), i32(3), i32(3)
            header = {1: i32(0), 2: i32(SMALL_BYTES), 3: i32(len(bomb.stored)), 4: i32(0)}
            inner = struct(dict(enumerate(page, 1)))
            chunk = head + write_struct(header | {5: inner}) + bomb.stored
            with pytest.raises(ValueError, match=r".+"):
                decode_column(field, chunk, rows, 0, len(rows.positions))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


if __name__ == "__main__":
    print(read_bombs())
