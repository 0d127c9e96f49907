"""The check of a shard's ZIP agrees with what zarr writes, and with zarr alone."""

import io
import zipfile

import numpy as np
import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import Manifest
from stillroom.cache.schema import Arrays
from stillroom.cache.zarr_shard import Encoded, encode_shard
from stillroom.tools.container import check_container

ATTRIBUTES = {"part": "p"}


def encoded() -> Encoded:
    """Arrays of several blocks, of one chunk, of two dimensions, and empty."""
    arrays: Arrays = {
        "topk_id": np.arange(140_000, dtype=np.uint32).reshape(70_000, 2),
        "tail_logprob": np.zeros(70_000, np.float16),
        "prompt_length": np.ones(3, np.uint32),
        "teacher_prompt": np.zeros(0, np.uint32),
    }
    return encode_shard(arrays, ATTRIBUTES)


def manifest(shard: Encoded) -> Manifest:
    """A manifest of it."""
    return Manifest(
        part="p",
        attempt="a",
        identity="i",
        size=len(shard.data),
        hash="h",
        arrays=shard.arrays,
        attributes=ATTRIBUTES,
    )


def rebuilt(
    data: bytes, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """The ZIP with members replaced, added, or (None) left out."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(sink, "w", compression) as new:
        members = {name: old.read(name) for name in old.namelist()} | change
        for name, content in members.items():
            if content is not None:
                new.writestr(name, content)
    return sink.getvalue()


def test_accepts_what_is_written() -> None:
    shard = encoded()
    check_container(shard.data, manifest(shard), "object")
    check_container(rebuilt(shard.data, {}), manifest(shard), "object")


@pytest.mark.parametrize(
    "change",
    [
        {"zarr.json": b"{}"},
        {"zarr.json": b"[" * 100_000},
        {"zarr.json": b"nonsense"},
        {"zarr.json": b" " * (2 << 20)},
        {"topk_id/c/1/0": None},
        {"more": b""},
        {"../escape": b""},
        {"prompt_length/zarr.json": b"[]"},
    ],
)
def test_refuses_other_members(change: dict[str, bytes | None]) -> None:
    shard = encoded()
    with pytest.raises(CorruptError):
        check_container(rebuilt(shard.data, change), manifest(shard), "object")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"numcodecs.pcodec", b"numcodecs.pickle"),
        (b'"index_location":"end"', b'"index_location":"start"'),
        (b'"data_type":"float16"', b'"data_type":"float32"'),
        (b'"shape":[3]', b'"shape":[4]'),
        (b'"zarr_format":3', b'"zarr_format":2'),
        (b'"attributes":{}', b'"attributes":{"a":1}'),
        (b'"node_type":"array"', b'"node_type":"array","more":1'),
    ],
)
def test_refuses_other_metadata(old: bytes, new: bytes) -> None:
    shard = encoded()
    with zipfile.ZipFile(io.BytesIO(shard.data)) as archive:
        metadata = {n: archive.read(n) for n in archive.namelist() if n.endswith("zarr.json")}
    change: dict[str, bytes | None] = {n: v.replace(old, new) for n, v in metadata.items()}
    assert change != metadata
    with pytest.raises(CorruptError):
        check_container(rebuilt(shard.data, change), manifest(shard), "object")


def test_refuses_compression_and_no_zip() -> None:
    shard = encoded()
    with pytest.raises(CorruptError, match="uncompressed"):
        check_container(rebuilt(shard.data, {}, zipfile.ZIP_DEFLATED), manifest(shard), "object")
    with pytest.raises(CorruptError, match="a ZIP"):
        check_container(b"no zip", manifest(shard), "object")
