"""Pages of a Parquet column: levels and values, compressed with Zstandard, behind a header; and
back, for the pages that are written here.

Where values are coded, a dictionary page comes first that says what the codes stand for.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from stillroom.cache.parquet_layout import PLAIN, RLE, RLE_DICTIONARY
from stillroom.cache.thrift_writer import Fields, i32, struct, write_struct

DATA_PAGE, DICTIONARY_PAGE = 0, 2
NUMBER = rb"(?:[\x80-\xff]{0,4}[\x00-\x7f])"
HEADER = re.compile(
    rb"\x15(?:\x00|(?P<dictionary>\x04))"  # type of page
    rb"\x15(?P<raw>NUMBER)\x15(?P<stored>NUMBER)\x15NUMBER"  # and the crc
    rb"(?(dictionary)\x3c|\x1c)\x15(?P<entries>NUMBER)\x15(?P<encoding>[\x00\x10\x12])"
    rb"(?(dictionary)|\x15\x06\x15\x06)\x00\x00".replace(b"NUMBER", NUMBER),
    re.DOTALL,
)
"""A header as it is written here, in Thrift's compact protocol. Other bytes could mean the same,
but need not be understood."""
LEVEL = 4
LEVEL_OF_CODES = 1
"""Codes hold nothing for a compressor to search for: higher levels are slower and no smaller."""
SMALL_BYTES = 64 << 20
INFLATION = 1000
"""A page becomes at most so many bytes, or so many times its stored ones."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page as it is stored."""

    kind: int
    entries: int
    """Values and empty lists that it says to hold."""
    encoding: int
    raw_bytes: int
    """What it says that it becomes."""
    stored: bytes

    def decompress(self) -> bytes:
        """Levels and values.

        Raises:
            ValueError: they are not as many bytes as the header says.
        """
        if self.raw_bytes == 0:
            raise ValueError("a page of no bytes")
        try:
            codec = pa.Codec("zstd")
            raw: bytes = codec.decompress(self.stored, self.raw_bytes, asbytes=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(str(error)) from error
        return raw


@dataclass(frozen=True, slots=True)
class EncodedPage:
    """A page with its header."""

    data: bytes
    raw_bytes: int
    """With the header, but decompressed."""


def dictionary_page(values: bytes, count: int) -> EncodedPage:
    """The page that says what codes stand for."""
    header = struct({1: i32(count), 2: i32(PLAIN)})
    return _page(values, {1: i32(DICTIONARY_PAGE), 7: header}, LEVEL_OF_CODES)


def data_page(levels: bytes, values: bytes, entries: int, encoding: int) -> EncodedPage:
    """A page of values with their levels."""
    header = struct({1: i32(entries), 2: i32(encoding), 3: i32(RLE), 4: i32(RLE)})
    level = LEVEL_OF_CODES if encoding == RLE_DICTIONARY else LEVEL
    return _page(levels + values, {1: i32(DATA_PAGE), 5: header}, level)


def read_pages(chunk: bytes) -> Iterator[Page]:
    """Pages of one column of a row group, one after another; nothing is decompressed.

    Raises:
        ValueError: they are none, or claim to become far more than they are.
    """
    at = 0
    while at < len(chunk):
        match = HEADER.match(chunk, at)
        if match is None:
            raise ValueError(f"no header of a page at {at}")
        kind, end = DICTIONARY_PAGE if match["dictionary"] else DATA_PAGE, match.end()
        raw, size, entries = (_number(match[n]) for n in ("raw", "stored", "entries"))
        at = end + size
        if at > len(chunk) or raw > max(SMALL_BYTES, INFLATION * size):
            raise ValueError(f"a page of {size} bytes at {end} that becomes {raw}")
        yield Page(kind, entries, match["encoding"][0] >> 1, raw, chunk[end:at])


def _page(raw: bytes, header: Fields, level: int) -> EncodedPage:
    stored = pa.Codec("zstd", compression_level=level).compress(raw, asbytes=True)
    crc = int.from_bytes(zlib.crc32(stored).to_bytes(4, "little"), "little", signed=True)
    head = write_struct(header | {2: i32(len(raw)), 3: i32(len(stored)), 4: i32(crc)})
    return EncodedPage(head + stored, len(head) + len(raw))


def _number(varint: bytes) -> int:
    """A zigzag varint of 32 bits."""
    value = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(varint))
    if value & 1 or value >> 32:
        raise ValueError(f"{varint.hex()} in the header of a page")
    return value >> 1
