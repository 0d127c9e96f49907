"""The metadata and the blocks of a Zarr shard are those that zarr itself writes."""

import json

import numpy as np
import pytest
import zarr
from zarr.codecs.numcodecs import PCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from stillroom.cache.example_shards import random_shard
from stillroom.cache.schema import COLUMNS
from stillroom.cache.zarr_id_groups import group_ids
from stillroom.cache.zarr_layout import (
    BLOCK_ROWS,
    CHUNK_ROWS,
    STORED_IDS,
    array_metadata,
    block_key,
    block_slots,
    chunks_of,
    group_metadata,
    settings_of,
)


def by_zarr(name: str, array: np.ndarray) -> dict[str, bytes]:
    """All objects of a group with that array, written by zarr."""
    store = MemoryStore()
    group = zarr.create_group(store=store, zarr_format=3, attributes={"part": "p"})
    target = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(CHUNK_ROWS, *array.shape[1:]),
        shards=(block_slots(len(array)) * CHUNK_ROWS, *array.shape[1:]),
        serializer=PCodec(**settings_of(name)),
        compressors=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    if array.size:
        target[...] = array
    return sync(_objects(store))


async def _objects(store: MemoryStore) -> dict[str, bytes]:
    found = {}
    async for key in store.list():
        value = await store.get(key, default_buffer_prototype())
        assert value is not None
        found[key] = value.to_bytes()
    return found


def test_the_group_is_that_of_zarr() -> None:
    objects = by_zarr("token", np.zeros(1, np.uint32))
    assert json.loads(objects["zarr.json"]) == group_metadata({"part": "p"})


@pytest.mark.parametrize("rows", [0, 1, CHUNK_ROWS, CHUNK_ROWS + 1, BLOCK_ROWS, BLOCK_ROWS + 1])
@pytest.mark.parametrize("name", ["topk_code", "topk_logprob", "tail_logprob", "rollout_id"])
def test_metadata_and_keys_are_those_of_zarr(name: str, rows: int) -> None:
    dtype = {"tail_logprob": "float16", "topk_logprob": "float16", "rollout_id": "uint64"}
    array = np.zeros((rows, 3) if name.startswith("topk") else rows, dtype.get(name, "uint32"))
    objects = by_zarr(name, array)
    metadata = json.loads(objects[f"{name}/zarr.json"])
    assert metadata == array_metadata(name, str(array.dtype), array.shape)
    blocks = [block_key(name, block, array.shape[1:]) for block in range(-(-rows // BLOCK_ROWS))]
    assert sorted(objects) == sorted(["zarr.json", f"{name}/zarr.json", *blocks])


def test_what_stands_for_the_ids_is_stored() -> None:
    columns = {column.name for column in COLUMNS}
    assert "topk_id" in columns
    assert not columns & STORED_IDS.keys()
    coded = group_ids(random_shard(0, 10, 2, topk=3, vocab_size=9)["topk_id"])
    stored = {"topk_code": coded.code, "topk_group": coded.group, "topk_list": coded.id_list}
    assert {name: str(array.dtype) for name, array in stored.items()} == STORED_IDS


@pytest.mark.parametrize("rows", [0, 1, 2047, 2048, 2049, 65_536, 65_537])
def test_chunks_hold_all_rows(rows: int) -> None:
    assert (chunks_of(rows) - 1) * CHUNK_ROWS < rows <= chunks_of(rows) * CHUNK_ROWS or rows == 0
    assert 1 <= block_slots(rows) <= BLOCK_ROWS // CHUNK_ROWS
