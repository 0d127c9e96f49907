"""Pages: what is written is read back; what claims to become too much is not decompressed."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.parquet_layout import PLAIN, RLE_DICTIONARY
from stillroom.cache.parquet_pages import (
    DATA_PAGE,
    DICTIONARY_PAGE,
    SMALL_BYTES,
    Page,
    data_page,
    dictionary_page,
    read_pages,
)
from stillroom.cache.thrift_reader import read_struct
from stillroom.cache.thrift_writer import Value, i32, struct, write_struct
from tests.cache.conftest import QUICK

CHUNK = dictionary_page(b"abcd", 1).data + data_page(b"lev", b"values" * 9, 7, PLAIN).data


def header(**changes: Value) -> bytes:
    """A header of a page of 24 bytes, 16 of them stored, with other fields where given."""
    fields = {"type": i32(0), "raw": i32(24), "stored": i32(16), "crc": i32(-5)}
    fields["data"] = struct({1: i32(3), 2: i32(0), 3: i32(3), 4: i32(3)})
    numbers = {"type": 1, "raw": 2, "stored": 3, "crc": 4, "data": 5, "dictionary": 7, "v2": 8}
    return write_struct({numbers[name]: value for name, value in (fields | changes).items()})


@QUICK
@given(st.binary(max_size=99), st.binary(min_size=1, max_size=99), st.integers(0, 2**31 - 1))
def test_pages_are_read_back(levels: bytes, values: bytes, entries: int) -> None:
    pages = [
        dictionary_page(values, entries),
        data_page(levels, values, entries, PLAIN),
        data_page(levels, values, entries, RLE_DICTIONARY),
    ]
    found = list(read_pages(b"".join(page.data for page in pages)))
    assert [page.kind for page in found] == [DICTIONARY_PAGE, DATA_PAGE, DATA_PAGE]
    assert [page.encoding for page in found] == [PLAIN, PLAIN, RLE_DICTIONARY]
    assert {page.entries for page in found} == {entries}
    assert [page.decompress() for page in found] == [values, levels + values, levels + values]
    for page, encoded in zip(found, pages, strict=True):
        assert len(encoded.data) - len(page.stored) + page.raw_bytes == encoded.raw_bytes


def test_the_crc_is_that_of_the_stored_bytes() -> None:
    encoded = data_page(b"", b"values", 1, PLAIN).data
    (page,) = read_pages(encoded)
    assert read_struct(encoded)[0][4] & 0xFFFFFFFF == zlib.crc32(page.stored)


def test_a_header_by_hand_is_read() -> None:
    assert list(read_pages(header() + bytes(16))) == [Page(0, 3, 0, 24, bytes(16))]
    assert list(read_pages(b"")) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"raw": i32(-24)},
        {"stored": i32(-16)},
        {"stored": i32(17)},
        {"raw": i32(SMALL_BYTES + 1)},
        {"raw": i32(2**31 - 1)},
        {"raw": i32(2**32 + 24)},
        {"type": i32(1)},
        {"type": i32(2)},
        {"type": i32(3)},
        {"raw": (6, 24)},
        {"data": struct({1: i32(-1), 2: i32(0), 3: i32(3), 4: i32(3)})},
        {"data": struct({1: i32(3), 2: i32(2), 3: i32(3), 4: i32(3)})},
        {"data": struct({1: i32(3), 2: i32(0), 3: i32(4), 4: i32(3)})},
        {"data": struct({1: i32(3), 2: i32(0), 3: i32(3)})},
        {"data": struct({1: i32(3), 2: i32(0), 3: i32(3), 4: i32(3), 5: struct({})})},
        {"dictionary": struct({1: i32(3), 2: i32(0)})},
        {"v2": struct({1: i32(3)})},
    ],
)
def test_a_header_that_says_anything_else_is_refused(changes: dict[str, Value]) -> None:
    with pytest.raises(ValueError, match="page"):
        list(read_pages(header(**changes) + bytes(16)))


def test_a_large_page_is_believed_only_if_much_of_it_is_stored() -> None:
    stored = SMALL_BYTES // 1000 + 1
    head = header(raw=i32(SMALL_BYTES + 1), stored=i32(stored))
    assert next(read_pages(head + bytes(stored))).raw_bytes == SMALL_BYTES + 1


@pytest.mark.parametrize("length", range(1, len(CHUNK)))
def test_pages_that_are_cut_off_are_refused(length: int) -> None:
    if length == len(dictionary_page(b"abcd", 1).data):
        assert len(list(read_pages(CHUNK[:length]))) == 1
        return
    with pytest.raises(ValueError, match="page"):
        list(read_pages(CHUNK[:length]))


@QUICK
@given(st.integers(0, len(CHUNK) - 1), st.integers(1, 255))
def test_a_flipped_byte_gives_other_pages_or_an_error(at: int, flip: int) -> None:
    changed = bytearray(CHUNK)
    changed[at] ^= flip
    try:
        pages = list(read_pages(bytes(changed)))
        raw = [page.decompress() for page in pages]
    except ValueError:
        return
    assert [len(data) for data in raw] == [page.raw_bytes for page in pages]


@pytest.mark.parametrize("raw_bytes", [0, 1, 53, 55, 10_000])
def test_a_page_that_becomes_another_size_is_refused(raw_bytes: int) -> None:
    page = list(read_pages(CHUNK))[1]
    assert page.raw_bytes == 57
    with pytest.raises(ValueError, match=r".+"):
        Page(page.kind, page.entries, page.encoding, raw_bytes, page.stored).decompress()
