"""What a hostile writer makes of damaged bytes: the hashes in them are right again, so that what
reads behind the hashes is reached."""

import base64
import json
from collections.abc import Iterator
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import StillroomError
from stillroom.cache.parquet_seal import seal


def sealed_json(data: bytes) -> Iterator[bytes]:
    """Sealed JSON with its last field, the hash, made right; and the same values, canonical."""
    body = data[: -jsonfile.SEAL_BYTES]
    tail = f',"{jsonfile.SEAL}":"{jsonfile.digest(body)}"}}'
    yield body + tail.encode()
    value = parsed(body + b"}")
    if isinstance(value, dict):
        yield jsonfile.dump_sealed(value)


def sealed_parquet(data: bytes) -> Iterator[bytes]:
    """A sealed Parquet file with the right hash, if there is still a place for it."""
    try:
        yield seal(data)
    except StillroomError:
        return


def rehashed_manifest(data: bytes, shard: bytes) -> Iterator[bytes]:
    """A manifest with the true size, hash and hashes of the chunks that it names."""
    value = parsed(data)
    if not isinstance(value, dict):
        return
    value |= {"size": len(shard), "hash": jsonfile.digest(shard)}
    arrays = value.get("arrays")
    for entry in arrays.values() if isinstance(arrays, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("chunks"), list):
            entry["chunks"] = [_rehashed(chunk, shard) for chunk in entry["chunks"]]
    yield jsonfile.dump(value)


def _rehashed(chunk: Any, shard: bytes) -> Any:
    if not isinstance(chunk, list) or [type(n) for n in chunk[:2]] != [int, int]:
        return chunk
    start, length = chunk[:2]
    if not 0 <= start <= start + length <= len(shard):
        return chunk
    return [start, length, jsonfile.digest(shard[start : start + length])]


def parsed(data: bytes) -> Any:
    """The value of JSON that a writer can write; None if it is none."""
    try:
        value = json.loads(data)
        jsonfile.dump(value)
    except (ValueError, RecursionError):
        return None
    return value


def packed(data: bytes) -> str:
    """Bytes as text in JSON."""
    return base64.b64encode(data).decode()
