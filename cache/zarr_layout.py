"""How a Zarr shard is laid out: which arrays are stored, in what chunks, and the metadata that
plain zarr reads.

Every column is stored under its name, but for the token ids, which are codes. Where a mass cut-off
left entries unused, only the used ones are stored, end to end in rows of K.
"""

from typing import Any

from stillroom.cache.codec import AUTO, CODES, DIFFERENCES, UNORDERED

OBJECT_NAME = "shard.zarr.zip"
CHUNK_ROWS = 2048
BLOCK_ROWS = 65_536
STORED_IDS = {"topk_code": "uint32", "topk_group": "uint16", "topk_list": "uint32"}
"""What stands for `topk_id`; see `zarr_id_groups`."""
SETTINGS: dict[str, dict[str, Any]] = {
    "topk_code": CODES,
    "topk_group": CODES,
    "topk_logprob": DIFFERENCES,
    "tail_logprob": UNORDERED,
    "sampled_logprob": UNORDERED,
    "behaviour_logprob": UNORDERED,
    "token": UNORDERED,
}


def settings_of(name: str) -> dict[str, Any]:
    """PCodec settings of an array."""
    return SETTINGS.get(name, AUTO)


def chunks_of(rows: int) -> int:
    """Chunks of an array of so many rows."""
    return -(-rows // CHUNK_ROWS)


def block_slots(rows: int) -> int:
    """Chunks for which each block of an array has room."""
    return min(max(1, chunks_of(rows)), BLOCK_ROWS // CHUNK_ROWS)


def block_key(name: str, block: int, width: tuple[int, ...]) -> str:
    """Member of the ZIP that holds a block: one object of the sharding codec."""
    return f"{name}/c/{block}" + "/0" * len(width)


def array_metadata(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """`zarr.json` of an array."""
    width = list(shape[1:])
    sharding = {
        "chunk_shape": [CHUNK_ROWS, *width],
        "codecs": [{"name": "numcodecs.pcodec", "configuration": settings_of(name)}],
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [block_slots(shape[0]) * CHUNK_ROWS, *width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "storage_transformers": [],
    }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """`zarr.json` of the group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
