"""Writing a shard as one object: a Zarr v3 group (sharding codec, PCodec) inside an uncompressed
ZIP, which plain zarr opens (`zarr.storage.ZipStore`) and from which a manifest's byte ranges can be
read directly.

The chunks are encoded and laid out here; zarr is not needed to write or to read. Equal arrays give
equal bytes.
"""

import io
import zipfile
from typing import Any

import google_crc32c
import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.codec import encode_chunk
from stillroom.cache.manifest import ArrayEntry, Chunk
from stillroom.cache.schema import Arrays
from stillroom.cache.shard_format import Encoded
from stillroom.cache.zarr_entries import pack_entries
from stillroom.cache.zarr_id_groups import group_ids
from stillroom.cache.zarr_layout import (
    BLOCK_ROWS,
    CHUNK_ROWS,
    array_metadata,
    block_key,
    block_slots,
    group_metadata,
    settings_of,
)

NO_CHUNK = 2**64 - 1
LONG_AGO = (1980, 1, 1, 0, 0, 0)


def encode_zarr(arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
    """Encode every column of a shard into one object; see `ShardFormat.encode`."""
    ids, count = group_ids(arrays["topk_id"]), arrays["topk_count"]
    stored = {name: array for name, array in arrays.items() if name != "topk_id"}
    stored |= {"topk_group": ids.group, "topk_list": ids.id_list}
    entries = {"topk_code": ids.code, "topk_logprob": arrays["topk_logprob"]}
    stored |= {name: pack_entries(array, count) for name, array in entries.items()}
    attributes = attributes | {
        "entries_packed": bool((count < ids.code.shape[1]).any()),
        "id_groups": ids.groups,
        "id_group_width": ids.group_width,
    }
    writer = _ZipWriter()
    writer.add("zarr.json", jsonfile.dump(group_metadata(attributes)))
    written = {name: _write_array(writer, name, array) for name, array in sorted(stored.items())}
    return Encoded(writer.finish(), written, attributes)


def _write_array(writer: "_ZipWriter", name: str, array: np.ndarray) -> ArrayEntry:
    dtype = str(array.dtype)
    chunks: list[Chunk] = []
    for block, start in enumerate(range(0, len(array), BLOCK_ROWS)):
        encoded = _encode_rows(name, array[start : start + BLOCK_ROWS])
        offset = writer.add(
            block_key(name, block, array.shape[1:]), _with_index(encoded, block_slots(len(array)))
        )
        for data in encoded:
            chunks.append(Chunk(offset, len(data), jsonfile.digest(data)))
            offset += len(data)
    writer.add(f"{name}/zarr.json", jsonfile.dump(array_metadata(name, dtype, array.shape)))
    return ArrayEntry(dtype, array.shape, tuple(chunks))


def _encode_rows(name: str, rows: np.ndarray) -> list[bytes]:
    out = []
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        if len(chunk) < CHUNK_ROWS:
            filled = np.zeros((CHUNK_ROWS, *rows.shape[1:]), rows.dtype)
            filled[: len(chunk)] = chunk
            chunk = filled
        out.append(encode_chunk(chunk, settings_of(name)))
    return out


def _with_index(chunks: list[bytes], slots: int) -> bytes:
    """One object of the sharding codec: chunks, then [offset, length] of each slot, then crc32c."""
    index = np.full((slots, 2), NO_CHUNK, "<u8")
    lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
    index[: len(chunks), 1] = lengths
    index[: len(chunks), 0] = np.cumsum(lengths) - lengths
    table = index.tobytes()
    return b"".join([*chunks, table, google_crc32c.value(table).to_bytes(4, "little")])


class _ZipWriter:
    """An uncompressed ZIP with fixed dates, in memory."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        self._archive = zipfile.ZipFile(self._sink, "w", zipfile.ZIP_STORED)

    def add(self, name: str, data: bytes) -> int:
        """Add a member; where its bytes begin in the archive."""
        self._archive.writestr(zipfile.ZipInfo(name, date_time=LONG_AGO), data)
        return self._sink.tell() - len(data)

    def finish(self) -> bytes:
        self._archive.close()
        return self._sink.getvalue()
