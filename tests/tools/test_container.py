"""The check of a shard's ZIP agrees with what zarr writes, and with zarr alone."""

import io
import zipfile
from dataclasses import replace

import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.example_shards import random_shard
from stillroom.cache.manifest import Manifest
from stillroom.cache.shard_format import Encoded
from stillroom.cache.zarr_shard import encode_zarr
from stillroom.tools.container import check_container

ATTRIBUTES = {"part": "p", "user_axes": {}}


def encoded() -> Encoded:
    """Arrays of several blocks, of one chunk, of two dimensions, and empty."""
    arrays = random_shard(0, 70_000, 3, topk=2, vocab_size=50, teacher_prompts=False)
    return encode_zarr(arrays, ATTRIBUTES)


SHARD = encoded()


def manifest(shard: Encoded) -> Manifest:
    """A manifest of it."""
    return Manifest(
        part="p",
        attempt="a",
        identity="i",
        size=len(shard.data),
        hash="h",
        arrays=shard.arrays,
        attributes=shard.attributes,
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
    shard = SHARD
    check_container(shard.data, manifest(shard))
    check_container(rebuilt(shard.data, {}), manifest(shard))


@pytest.mark.parametrize(
    "change",
    [
        {"zarr.json": b"{}"},
        {"zarr.json": b"[" * 100_000},
        {"zarr.json": b"nonsense"},
        {"zarr.json": b" " * (2 << 20)},
        {"topk_code/c/1/0": None},
        {"more": b""},
        {"../escape": b""},
        {"prompt_length/zarr.json": b"[]"},
        {"a" * 300 + str(i): b"" for i in range(20_000)},
    ],
)
def test_refuses_other_members(change: dict[str, bytes | None]) -> None:
    shard = SHARD
    with pytest.raises(CorruptError):
        check_container(rebuilt(shard.data, change), manifest(shard))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"numcodecs.pcodec", b"numcodecs.pickle"),
        (b'"index_location":"end"', b'"index_location":"start"'),
        (b'"data_type":"float16"', b'"data_type":"float32"'),
        (b'"shape":[3]', b'"shape":[5]'),
        (b'"zarr_format":3', b'"zarr_format":2'),
        (b'"attributes":{}', b'"attributes":{"a":1}'),
        (b'"node_type":"array"', b'"node_type":"array","more":1'),
    ],
)
def test_refuses_other_metadata(old: bytes, new: bytes) -> None:
    shard = SHARD
    with zipfile.ZipFile(io.BytesIO(shard.data)) as archive:
        metadata = {n: archive.read(n) for n in archive.namelist() if n.endswith("zarr.json")}
    change: dict[str, bytes | None] = {n: v.replace(old, new) for n, v in metadata.items()}
    assert change != metadata
    with pytest.raises(CorruptError):
        check_container(rebuilt(shard.data, change), manifest(shard))


def test_refuses_compression_and_no_zip() -> None:
    shard = SHARD
    with pytest.raises(CorruptError, match="uncompressed"):
        check_container(rebuilt(shard.data, {}, zipfile.ZIP_DEFLATED), manifest(shard))
    with pytest.raises(CorruptError, match="a ZIP"):
        check_container(bytes(len(shard.data)), manifest(shard))


def test_refuses_an_index_of_other_chunks() -> None:
    shard = SHARD
    names = ("rollout_id", "group")
    arrays = dict(shard.arrays)
    arrays["group"], arrays["rollout_id"] = (shard.arrays[name] for name in names)
    with pytest.raises(CorruptError, match="an index of the manifest's chunks"):
        check_container(shard.data, replace(manifest(shard), arrays=arrays))


def test_refuses_a_changed_index_and_a_wrong_crc() -> None:
    shard = SHARD
    chunk = shard.arrays["group"].chunks[0]
    end = chunk.offset + chunk.length
    for at in (end, end + 8, end + 16, end + 19, chunk.offset):
        data = bytearray(shard.data)
        data[at] ^= 1
        with pytest.raises(CorruptError, match="group/c/0"):
            check_container(bytes(data), manifest(shard))


def test_other_settings_of_the_encoder_are_no_damage() -> None:
    """A later release may choose others; a codec's other settings are refused all the same."""
    with zipfile.ZipFile(io.BytesIO(SHARD.data)) as archive:
        member = archive.read("topk_logprob/zarr.json")
    good, bad = (member.replace(b'"level":9', new) for new in (b'"level":3', b'"pages":3'))
    assert member not in (good, bad)
    check_container(rebuilt(SHARD.data, {"topk_logprob/zarr.json": good}), manifest(SHARD))
    with pytest.raises(CorruptError, match=r"topk_logprob/zarr\.json"):
        check_container(rebuilt(SHARD.data, {"topk_logprob/zarr.json": bad}), manifest(SHARD))


def test_refuses_a_member_behind_the_chunks_that_its_index_must_name() -> None:
    shard = SHARD
    names = zipfile.ZipFile(io.BytesIO(shard.data)).namelist()
    moved = [name for name in names if name.startswith("topk_code/c/")]
    content = zipfile.ZipFile(io.BytesIO(shard.data))
    without = rebuilt(shard.data, dict.fromkeys(moved))
    data = rebuilt(without, {name: content.read(name) for name in moved})
    with pytest.raises(CorruptError, match="an index of the manifest's chunks"):
        check_container(data, manifest(shard))
