"""Writing a shard: the same bytes for the same arrays, which plain zarr opens."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from stillroom.cache import jsonfile
from stillroom.cache.codec import decode_chunk
from stillroom.cache.manifest import BLOCK_ROWS, CHUNK_ROWS, chunk_numbers
from stillroom.cache.schema import Arrays
from stillroom.cache.zarr_shard import Encoded, encode_shard
from tests.cache.fakes import random_arrays, same_bits

LENGTHS = [0, 1, 2047, 2048, 2049, 65_535, 65_536, 65_537, 131_072, 133_121]


def decode(encoded: Encoded, name: str) -> np.ndarray:
    """An array, from the byte ranges alone."""
    entry = encoded.arrays[name]
    dtype, numbers = np.dtype(entry.dtype), chunk_numbers(entry.shape)
    chunks = [
        decode_chunk(encoded.data[c.offset : c.offset + c.length], dtype, numbers, name)
        for c in entry.chunks
    ]
    whole: np.ndarray = np.concatenate([np.empty(0, dtype), *chunks]).reshape(-1, *entry.shape[1:])
    assert not whole[entry.shape[0] :].any(), "the last chunk is filled up with zeros"
    return whole[: entry.shape[0]]


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_hold_the_rows(length: int, topk: int) -> None:
    rng = np.random.default_rng(length)
    arrays = {
        "topk_id": rng.integers(0, 2**32, (length, topk), np.uint32),
        "sampled_logprob": -rng.random(length, np.float32),
    }
    encoded = encode_shard(arrays, {})
    for name, array in arrays.items():
        entry = encoded.arrays[name]
        assert len(entry.chunks) == -(-length // CHUNK_ROWS)
        assert same_bits(decode(encoded, name), array)
        for c in entry.chunks:
            assert c.hash == jsonfile.digest(encoded.data[c.offset : c.offset + c.length])


def test_zeros_are_written_like_other_numbers() -> None:
    encoded = encode_shard({"topk_count": np.zeros(5000, np.uint16)}, {})
    assert len(encoded.arrays["topk_count"].chunks) == 3
    assert not decode(encoded, "topk_count").any()


def test_equal_arrays_give_equal_bytes() -> None:
    arrays = random_arrays(seed=3, positions=3000, sequences=9)
    attributes = {"part": "p", "temperature": 1.0}
    first, second = encode_shard(arrays, attributes), encode_shard(arrays, attributes)
    other_order = encode_shard(dict(reversed(arrays.items())), attributes)
    assert first == second
    assert other_order.data == first.data
    assert other_order.arrays == first.arrays


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


@pytest.mark.parametrize(("positions", "topk"), [(1, 1), (300, 7), (BLOCK_ROWS + 1, 1)])
def test_plain_zarr_opens_it(tmp_path: Path, positions: int, topk: int) -> None:
    arrays = random_arrays(1, positions, sequences=min(positions, 3), topk=topk)
    attributes = {"part": "p", "sampler": {"top_p": 0.9}}
    path = tmp_path / "shard.zarr.zip"
    path.write_bytes(encode_shard(arrays, attributes).data)
    found_attributes, found = open_plainly(path)
    assert found_attributes == attributes
    assert found.keys() == arrays.keys()
    assert all(same_bits(found[name], array) for name, array in arrays.items())


def test_the_archive_is_plain_and_without_times() -> None:
    data = encode_shard(random_arrays(0, 20, 2), {}).data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
        names = archive.namelist()
    assert names == sorted(names)
    assert "zarr.json" in names
