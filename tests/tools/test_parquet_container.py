"""The check of a Parquet shard's footer: every byte of it counts, and pyarrow agrees with it."""

import io
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.example_shards import random_shard
from stillroom.cache.manifest import Manifest
from stillroom.cache.parquet_writer import encode_parquet
from stillroom.tools.parquet_container import check_parquet

ATTRIBUTES = {"part": "p", "user_axes": {"x_reward": "sequence", "x_advantage": "position"}}
ARRAYS = random_shard(0, 9_000, 40, topk=3, vocab_size=50, extra=2, mass=True, user_columns=True)
SHARD = encode_parquet(ARRAYS, ATTRIBUTES)
MANIFEST = Manifest(
    part="p",
    attempt="a",
    identity="i",
    size=len(SHARD.data),
    hash="h",
    arrays=SHARD.arrays,
    row_groups=SHARD.row_groups,
    attributes=SHARD.attributes,
)
FOOTER = max(c.offset + c.length for entry in SHARD.arrays.values() for c in entry.chunks)


def test_accepts_what_is_written() -> None:
    check_parquet(SHARD.data, MANIFEST)
    assert pq.ParquetFile(io.BytesIO(SHARD.data)).metadata.num_rows == 40
    assert len(SHARD.row_groups) > 1


def test_no_byte_of_the_footer_changes_unnoticed() -> None:
    for at in (*range(FOOTER, len(SHARD.data), 37), *range(-12, 0)):
        data = bytearray(SHARD.data)
        data[at] ^= 1 << (at % 8)
        with pytest.raises(CorruptError, match=r"^container: "):
            check_parquet(bytes(data), MANIFEST)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        SHARD.data[:-1],
        SHARD.data[:FOOTER],
        b"X" + SHARD.data[1:],
        SHARD.data[:FOOTER] + b"\0" + SHARD.data[FOOTER:],
        SHARD.data[:FOOTER] + bytes(8 << 20) + (8 << 20).to_bytes(4, "little") + b"PAR1",
    ],
    ids=["empty", "cut", "no footer", "other magic", "a gap", "a huge footer"],
)
def test_refuses_what_is_no_such_file(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^container: "):
        check_parquet(data, MANIFEST)


def test_refuses_a_footer_that_the_manifest_does_not_say() -> None:
    other = MANIFEST.attributes | {"part": "q"}
    with pytest.raises(CorruptError, match=r"^container: "):
        check_parquet(SHARD.data, replace(MANIFEST, attributes=other))
    first, second, *rest = MANIFEST.row_groups
    groups = (first - 1, second + 1, *rest)
    with pytest.raises(CorruptError, match=r"^container: "):
        check_parquet(SHARD.data, replace(MANIFEST, row_groups=groups))
