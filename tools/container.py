"""Whether a shard's object is a ZIP that plain zarr opens: the expected members and metadata.

Metadata is compared with what the format says, value by value; zarr itself is not needed.
"""

import io
import json
import zipfile
from typing import Any

import numpy as np

from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import BLOCK_ROWS, CHUNK_ROWS, ArrayEntry, Manifest

MAX_METADATA_BYTES = 1 << 20
GROUP = "zarr.json"


def check_container(data: bytes, manifest: Manifest, where: str) -> None:
    """Refuse an object that plain zarr would not read as the manifest says.

    Args:
        data: the whole object.
        manifest: its manifest.
        where: names the object.

    Raises:
        CorruptError: no ZIP, other members, compressed ones, or other metadata.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_members(archive, manifest, where)
            for name, expected in _metadata(manifest).items():
                _check_equal(json.loads(archive.read(name)), expected, f"{where}, {name}")
    except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError) as error:
        if isinstance(error, CorruptError):
            raise
        raise _corrupt(where, "a ZIP with JSON metadata", str(error)) from error


def array_metadata(entry: ArrayEntry) -> dict[str, Any]:
    """What `zarr.json` of an array must hold."""
    rows = max(1, -(-entry.shape[0] // CHUNK_ROWS)) * CHUNK_ROWS
    width = list(entry.shape[1:])
    sharding = {
        "chunk_shape": [CHUNK_ROWS, *width],
        "codecs": [{"name": "numcodecs.pcodec", "configuration": {}}],
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(entry.shape),
        "data_type": entry.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [min(rows, BLOCK_ROWS), *width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "storage_transformers": [],
    }


def _metadata(manifest: Manifest) -> dict[str, dict[str, Any]]:
    group = {"zarr_format": 3, "node_type": "group", "attributes": manifest.attributes}
    arrays = {f"{n}/zarr.json": array_metadata(entry) for n, entry in manifest.arrays.items()}
    return {GROUP: group, **arrays}


def _check_members(archive: zipfile.ZipFile, manifest: Manifest, where: str) -> None:
    expected = [*_metadata(manifest)]
    for name, entry in manifest.arrays.items():
        blocks = int(np.ceil(entry.shape[0] / BLOCK_ROWS))
        expected += [f"{name}/c/{b}" + "/0" * (len(entry.shape) - 1) for b in range(blocks)]
    members = archive.infolist()
    names = sorted(member.filename for member in members)
    if names != sorted(expected):
        differing = sorted(set(names) ^ set(expected)) or ["one member twice"]
        raise _corrupt(where, f"{len(expected)} members", f"{len(names)}; see {differing[0]}")
    for member in members:
        metadata = member.filename.endswith(GROUP)
        if member.compress_type != zipfile.ZIP_STORED or (
            metadata and member.file_size > MAX_METADATA_BYTES
        ):
            raise _corrupt(where, "uncompressed members and small metadata", member.filename)


def _check_equal(found: Any, expected: dict[str, Any], where: str) -> None:
    if found == expected:
        return
    keys = expected.keys() | (found.keys() if isinstance(found, dict) else set())
    own = found if isinstance(found, dict) else {}
    key = sorted(k for k in keys if own.get(k) != expected.get(k) or k not in own)[0]
    raise _corrupt(where, f"{key} = {expected.get(key)!r}", f"{own.get(key)!r}")


def _corrupt(where: str, expected: str, got: str) -> CorruptError:
    return CorruptError(where, expected, got, "Score the part again.")
