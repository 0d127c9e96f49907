"""Writing a Zarr shard: an archive that plain zarr opens, with the same bytes for the same arrays
in every release."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from stillroom.cache import jsonfile
from stillroom.cache.check_arrays import check_arrays
from stillroom.cache.codec import decode_chunk
from stillroom.cache.example_shards import edges, random_shard
from stillroom.cache.schema import COLUMNS, Arrays
from stillroom.cache.shard_format import Encoded
from stillroom.cache.zarr_entries import pack_entries
from stillroom.cache.zarr_id_groups import group_ids
from stillroom.cache.zarr_layout import BLOCK_ROWS, CHUNK_ROWS, STORED_IDS, block_key
from stillroom.cache.zarr_shard import encode_zarr
from tests.cache.fakes import random_arrays, same_bits
from tests.cache.test_zarr_layout import by_zarr

ATTRIBUTES = {"part": "p", "sampler": {"top_p": 0.9}, "user_axes": {}}


def stored_arrays(arrays: Arrays) -> Arrays:
    """What stands in the archive."""
    ids, count = group_ids(arrays["topk_id"]), arrays["topk_count"]
    rest = {name: array for name, array in arrays.items() if name != "topk_id"}
    rest["topk_logprob"] = pack_entries(arrays["topk_logprob"], count)
    code = pack_entries(ids.code, count)
    return rest | {"topk_code": code, "topk_group": ids.group, "topk_list": ids.id_list}


def decode(encoded: Encoded, name: str) -> np.ndarray:
    """An array, from the byte ranges alone."""
    entry = encoded.arrays[name]
    whole = np.empty((len(entry.chunks), CHUNK_ROWS, *entry.shape[1:]), entry.dtype)
    for chunk, out in zip(entry.chunks, whole, strict=True):
        data = encoded.data[chunk.offset : chunk.offset + chunk.length]
        assert jsonfile.digest(data) == chunk.hash
        decode_chunk(data, out, name)
    rows = whole.reshape(-1, *entry.shape[1:])
    assert not rows[entry.shape[0] :].any(), "the last chunk is filled up with zeros"
    return rows[: entry.shape[0]]


@pytest.mark.parametrize("positions", [1, 2047, 2048, 2049, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_chunks_hold_the_rows(positions: int) -> None:
    arrays = random_arrays(positions, positions, sequences=1, topk=2)
    encoded = encode_zarr(arrays, ATTRIBUTES)
    stored = stored_arrays(arrays)
    assert encoded.arrays.keys() == stored.keys()
    for name, array in stored.items():
        entry = encoded.arrays[name]
        assert (entry.dtype, entry.shape) == (str(array.dtype), array.shape)
        assert len(entry.chunks) == -(-len(array) // CHUNK_ROWS)
        assert same_bits(decode(encoded, name), array)


@pytest.mark.parametrize("name", ["topk_code", "topk_logprob", "behaviour_logprob", "token"])
@pytest.mark.parametrize("positions", [5, 3000, BLOCK_ROWS + 1])
def test_blocks_are_those_that_zarr_writes(name: str, positions: int) -> None:
    arrays = random_arrays(7, positions, sequences=2, topk=3)
    array = stored_arrays(arrays)[name]
    with zipfile.ZipFile(io.BytesIO(encode_zarr(arrays, ATTRIBUTES).data)) as archive:
        objects = by_zarr(name, array)
        for block in range(-(-len(array) // BLOCK_ROWS)):
            key = block_key(name, block, array.shape[1:])
            assert archive.read(key) == objects[key]


def open_plainly(path: Path) -> tuple[dict[str, object], Arrays]:
    """Attributes and arrays, through zarr alone."""
    with ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        arrays: Arrays = {}
        for name, array in group.arrays():
            value = array[...]
            assert isinstance(value, np.ndarray)
            arrays[name] = value
        return dict(group.attrs), arrays


@pytest.mark.parametrize(("positions", "topk"), [(1, 1), (900, 7), (BLOCK_ROWS + 1, 1)])
def test_plain_zarr_opens_it(tmp_path: Path, positions: int, topk: int) -> None:
    arrays = random_shard(
        1, positions, min(positions, 3), topk=topk, vocab_size=99, extra=2, mass=True
    )
    arrays["x_weight"] = np.ones(positions, np.float32)
    encoded = encode_zarr(arrays, ATTRIBUTES)
    path = tmp_path / "shard.zarr.zip"
    path.write_bytes(encoded.data)
    attributes, found = open_plainly(path)
    ids = group_ids(arrays["topk_id"])
    packed = bool((arrays["topk_count"] < topk).any())
    sizes = {"id_groups": ids.groups, "id_group_width": ids.group_width, "entries_packed": packed}
    assert attributes == encoded.attributes == ATTRIBUTES | sizes
    stored = stored_arrays(arrays)
    assert found.keys() == stored.keys()
    assert all(same_bits(found[name], array) for name, array in stored.items())


def test_the_archive_is_plain_and_without_times() -> None:
    encoded = encode_zarr(random_arrays(0, 20, 2), ATTRIBUTES)
    with zipfile.ZipFile(io.BytesIO(encoded.data)) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
        first, *members = archive.namelist()
    arrays = [name.partition("/")[0] for name in members]
    assert first == "zarr.json"
    assert arrays == sorted(arrays)
    assert set(arrays) == encoded.arrays.keys()


def fixed_arrays() -> Arrays:
    """A shard by arithmetic alone, of two groups and two chunks, that no random generator can
    change."""
    positions, topk = 2100, 3
    at = np.arange(positions)
    ids = (at[:, None] ** 2 % 89 + np.arange(topk) * (at[:, None] % 7 + 1)) % 97
    arrays: Arrays = {
        "topk_id": ids.astype(np.uint32),
        "topk_logprob": (-np.arange(topk) - (at[:, None] % 64) / 64).astype(np.float16),
        "topk_count": np.full(positions, topk, np.uint16),
        "tail_logprob": (-(at % 50) / 8).astype(np.float16),
        "sampled_logprob": (-(at % 1000) / 256).astype(np.float32),
        "behaviour_logprob": (-(at % 999) / 128).astype(np.float32),
        "token": (np.arange(positions + 2) % 97).astype(np.uint32),
        "scored": np.array([0, *[1] * 2000, 0, *[1] * 100], np.uint16),
        "sequence_start": edges([2001, 101]),
        "position_start": edges([2000, 100]),
        "teacher_prompt": np.arange(5, dtype=np.uint32),
        "teacher_prompt_start": edges([0, 5]),
    }
    for column in COLUMNS:
        if column.axis == "sequence":
            arrays[column.name] = np.array([1, 1], column.dtype)
    check_arrays(arrays, topk, 0)
    return arrays


def test_the_bytes_are_those_of_version_1() -> None:
    """They depend on PCodec's encoder; these are of pcodec 0.3.6, which constraints.txt pins.

    If they change, shards that are written again differ from those that are there, though both are
    read: say so in the change log.
    """
    encoded = encode_zarr(fixed_arrays(), ATTRIBUTES)
    assert encoded.attributes["id_groups"] > 1
    assert jsonfile.digest(encoded.data) == "1600f2ae97f4b0ca517c27d1ad9ff189"


def test_every_stored_array_is_pinned() -> None:
    assert encode_zarr(fixed_arrays(), ATTRIBUTES).arrays.keys() == (
        {c.name for c in COLUMNS if c.width != "M"} - {"topk_id"} | STORED_IDS.keys()
    )
