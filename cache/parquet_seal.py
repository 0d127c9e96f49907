"""The hash that a Parquet file carries of itself, so that no byte of it can change unnoticed: page
checksums do not cover headers and footers.

It stands in the file's key-value metadata under `stillroom_hash`, and is that of the file's bytes
with 32 zeros in its place.
"""

import re

import xxhash

from stillroom.cache.errors import CorruptError

HASH_KEY = b"stillroom_hash"
NO_HASH = b"0" * 32
SEAL = re.compile(HASH_KEY + rb"\x18\x20([0-9a-f]{32})")
"""How the hash stands in the file's footer, which is Thrift's compact protocol: the key, the header
of a string of 32 bytes, and the string."""


def seal(data: bytes) -> bytes:
    """Put the hash of a file's bytes into its footer, where `NO_HASH` stands under `HASH_KEY`."""
    start, stop = _hash_span(data, "the file", "Report this.")
    return data[:start] + _unsealed_hash(data, start, stop) + data[stop:]


def check_seal(data: bytes, where: str, do: str) -> None:
    """Refuse bytes that are not as they were sealed; nothing of them is parsed.

    Args:
        data: the file.
        where: named by the error.
        do: what the reader of the error can do.

    Raises:
        CorruptError: there is no hash in them, or another one.
    """
    start, stop = _hash_span(data, where, do)
    found = _unsealed_hash(data, start, stop)
    if data[start:stop] != found:
        expected = f"bytes with hash {data[start:stop].decode()}"
        raise CorruptError(where, expected, found.decode(), do)


def _hash_span(data: bytes, where: str, do: str) -> tuple[int, int]:
    """Where the hash stands."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    spans = [match.span(1) for match in SEAL.finditer(data, max(0, footer))]
    if len(data) < 12 or footer < 4 or len(spans) != 1:
        expected = f"a Parquet file with its {HASH_KEY.decode()}"
        got = f"{len(data)} bytes, with {len(spans)} of them"
        raise CorruptError(where, expected, got, do)
    return spans[0]


def _unsealed_hash(data: bytes, start: int, stop: int) -> bytes:
    """Hash of the bytes as if the hash were 32 zeros."""
    hasher = xxhash.xxh3_128()
    for piece in (memoryview(data)[:start], NO_HASH, memoryview(data)[stop:]):
        hasher.update(piece)
    return hasher.hexdigest().encode()
