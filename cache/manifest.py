"""The manifest of an attempt: where each encoded chunk lies in the shard's object, and its hash.

A reader needs no other metadata: it takes ranges from here, verifies them, and decodes. The commit
holds the manifest's own hash, so a chunk cannot be swapped for another, moved, or left out
unnoticed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.schema import BY_NAME, FORMAT_VERSION, USER_NAME

OBJECT_NAME = "shard.zarr.zip"
CHUNK_ROWS = 2048
BLOCK_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Chunk:
    """One encoded chunk."""

    offset: int
    """First byte in the shard's object."""
    length: int
    """Bytes."""
    hash: str
    """xxh3-128 of the encoded bytes, hexadecimal."""


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """One array: its chunks hold `CHUNK_ROWS` rows each, the last one filled up with zeros."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All of one attempt."""

    part: str
    attempt: str
    identity: str
    """Digest of the cache's identity."""
    size: int
    """Bytes of the shard's object."""
    hash: str
    """xxh3-128 of the whole object."""
    arrays: dict[str, ArrayEntry]
    attributes: dict[str, Any]
    """Sampler settings and what else is true of the whole shard."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """Canonical bytes; chunks as [offset, length, hash]."""
        value = asdict(self)
        for name, entry in self.arrays.items():
            value["arrays"][name]["chunks"] = [[c.offset, c.length, c.hash] for c in entry.chunks]
        return jsonfile.dump(value)

    @staticmethod
    def from_json(data: bytes, where: str) -> "Manifest":
        """Parse and check a manifest whose hash was verified.

        Raises:
            CorruptError: a structure, dtype, range or count is not possible.
        """
        value = jsonfile.load(data, where)
        try:
            value["arrays"] = {n: _array(n, e, value["size"]) for n, e in value["arrays"].items()}
            _check_user_axes(value["attributes"]["user_axes"], value["arrays"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(where, "a manifest", repr(error), "Score the part again.") from error
        manifest: Manifest = jsonfile.build(Manifest, value, where)
        return manifest

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Refuse arrays that are not exactly the expected ones.

        Raises:
            CorruptError: names what differs.
        """
        own = {name: entry.shape for name, entry in self.arrays.items()}
        if own != dict(expected):
            names = sorted(n for n in own.keys() | expected.keys() if own.get(n) != expected.get(n))
            want, got = [expected.get(n) for n in names], [own.get(n) for n in names]
            do = "The shard does not belong to this commit: score the part again."
            raise CorruptError(where, f"shapes {want} of {names}", f"{got}", do)


def _array(name: str, entry: dict[str, Any], size: int) -> ArrayEntry:
    dtype = "float32" if USER_NAME.fullmatch(name) else BY_NAME[name].dtype
    shape = tuple(int(n) for n in entry["shape"])
    chunks = tuple(Chunk(int(o), int(n), str(h)) for o, n, h in entry["chunks"])
    if entry["dtype"] != dtype or min(shape) < 0 or len(shape) > 2:
        raise ValueError(f"{name}: {entry['dtype']}{shape}")
    if len(chunks) != -(-shape[0] // CHUNK_ROWS):
        raise ValueError(f"{name}: {len(chunks)} chunks for {shape[0]} rows")
    if any(c.offset < 0 or c.length < 1 or c.offset + c.length > size for c in chunks):
        raise ValueError(f"{name}: a chunk outside the object")
    return ArrayEntry(dtype, shape, chunks)


def _check_user_axes(axes: dict[str, str], arrays: dict[str, ArrayEntry]) -> None:
    user = {name for name in arrays if USER_NAME.fullmatch(name)}
    if axes.keys() != user or not set(axes.values()) <= {"sequence", "position"}:
        raise ValueError(f"axes {axes} of the user columns {sorted(user)}")


def chunk_numbers(shape: tuple[int, ...]) -> int:
    """Numbers in every chunk of an array of this shape."""
    return CHUNK_ROWS * int(np.prod(shape[1:], dtype=np.int64))
