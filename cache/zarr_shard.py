"""Writing a shard as one object: a Zarr v3 group (sharding codec, PCodec) inside an uncompressed
ZIP.

zarr encodes into memory; its objects are laid one after another into a ZIP without compression,
which plain zarr opens (`zarr.storage.ZipStore`) and from which the manifest's byte ranges can be
read directly. Equal arrays give equal bytes.
"""

import io
import json
import warnings
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs.numcodecs import PCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from stillroom.cache import jsonfile
from stillroom.cache.manifest import BLOCK_ROWS, CHUNK_ROWS, ArrayEntry, Chunk
from stillroom.cache.schema import Arrays

INDEX_ENTRY_BYTES = 16
CRC_BYTES = 4
NO_CHUNK = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A shard's object and where its chunks lie."""

    data: bytes
    arrays: dict[str, ArrayEntry]


def encode_shard(arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
    """Encode arrays with their attributes into one object.

    Args:
        arrays: every column of a shard, checked by `schema.check_arrays`.
        attributes: JSON values that describe the whole shard.
    """
    store = MemoryStore()
    group = zarr.create_group(store=store, zarr_format=3, attributes=attributes)
    for name, array in arrays.items():
        _write_array(group, name, array)
    objects = _objects(store)
    data, offsets = _zip(objects)
    entries = {name: _entry(name, array, objects, offsets) for name, array in arrays.items()}
    return Encoded(data, entries)


def _write_array(group: zarr.Group, name: str, array: np.ndarray) -> None:
    rows = max(1, -(-len(array) // CHUNK_ROWS)) * CHUNK_ROWS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3")
        target = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(CHUNK_ROWS, *array.shape[1:]),
            shards=(min(rows, BLOCK_ROWS), *array.shape[1:]),
            serializer=PCodec(),
            compressors=None,
            filters=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        if array.size:
            target[...] = array


def _objects(store: MemoryStore) -> dict[str, bytes]:
    async def collect() -> dict[str, bytes]:
        found = {}
        async for key in store.list():
            value = await store.get(key, default_buffer_prototype())
            assert value is not None
            found[key] = value.to_bytes()
        return found

    objects = sync(collect())
    for key in objects:
        if key.endswith("zarr.json"):
            objects[key] = json.dumps(json.loads(objects[key]), separators=(",", ":")).encode()
    return dict(sorted(objects.items()))


def _zip(objects: dict[str, bytes]) -> tuple[bytes, dict[str, int]]:
    sink = io.BytesIO()
    offsets = {}
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for key, data in objects.items():
            info = zipfile.ZipInfo(key, date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, data)
            offsets[key] = sink.tell() - len(data)
    return sink.getvalue(), offsets


def _entry(
    name: str, array: np.ndarray, objects: dict[str, bytes], offsets: dict[str, int]
) -> ArrayEntry:
    count = -(-len(array) // CHUNK_ROWS)
    slots = min(count, BLOCK_ROWS // CHUNK_ROWS)
    chunks: list[Chunk] = []
    for block in range(-(-len(array) // BLOCK_ROWS)):
        key = f"{name}/c/{block}" + "/0" * (array.ndim - 1)
        chunks += _block_chunks(objects[key], offsets[key], slots)
    return ArrayEntry(str(array.dtype), array.shape, tuple(chunks[:count]))


def _block_chunks(data: bytes, offset: int, slots: int) -> list[Chunk]:
    """Chunks of one block, from the index at its end; slots past the array's end are empty."""
    start = len(data) - CRC_BYTES - INDEX_ENTRY_BYTES * slots
    index = np.frombuffer(data, "<u8", 2 * slots, start).reshape(slots, 2)
    used = index[index[:, 0] != NO_CHUNK].tolist()
    return [Chunk(offset + o, n, jsonfile.digest(data[o : o + n])) for o, n in used]
