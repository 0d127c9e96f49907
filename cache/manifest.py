"""The manifest of an attempt: where each encoded chunk lies in the shard's object, and its hash.

A reader needs no other metadata: it takes ranges from here, verifies them, and decodes. The commit
holds the manifest's own hash, so a chunk cannot be swapped for another, moved, or left out
unnoticed. It is the same for every shard format; which columns are stored, and how many rows a
chunk holds, is the format's.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.schema import COLUMNS, FORMAT_VERSION, USER_NAME

MAX_NUMBERS = 1 << 40
DTYPES = frozenset(column.dtype for column in COLUMNS)
"""Of stored arrays, as NumPy calls them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One range of the shard's object."""

    offset: int
    """First byte in the shard's object."""
    length: int
    """Bytes."""
    hash: str
    """xxh3-128 of the encoded bytes, hexadecimal."""


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """One stored array."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    """In row order."""


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
    row_groups: tuple[int, ...] = ()
    """Sequences in each row group, in order; Parquet only."""
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
            size = value["size"]
            value["arrays"] = {n: _array(n, e, size) for n, e in value["arrays"].items()}
            value["row_groups"] = tuple(int(n) for n in value["row_groups"])
            _check_user_axes(value["attributes"]["user_axes"], value["arrays"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(where, "a manifest", repr(error), "Score the part again.") from error
        manifest: Manifest = jsonfile.build(Manifest, value, where)
        return manifest

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Refuse stored arrays that are not exactly the expected ones.

        Raises:
            CorruptError: names what differs.
        """
        own = {name: entry.shape for name, entry in self.arrays.items()}
        if own != dict(expected):
            names = sorted(n for n in own.keys() | expected.keys() if own.get(n) != expected.get(n))
            want, got = [expected.get(n) for n in names], [own.get(n) for n in names]
            do = "The shard does not belong to this commit: score the part again."
            raise CorruptError(where, f"shapes {want} of {names}", f"{got}", do)


def _chunk(name: str, value: list[Any], size: int) -> Chunk:
    offset, length, digest = value
    chunk = Chunk(int(offset), int(length), str(digest))
    if chunk.offset < 0 or chunk.length < 1 or chunk.offset + chunk.length > size:
        raise ValueError(f"{name}: a chunk outside the object")
    return chunk


def _array(name: str, entry: dict[str, Any], size: int) -> ArrayEntry:
    dtype, stated = entry["dtype"], tuple(int(n) for n in entry["shape"])
    if dtype not in DTYPES or not 1 <= len(stated) <= 2 or min(stated) < 0:
        raise ValueError(f"{name}: {dtype!r:.40}{stated}")
    if math.prod(stated) > MAX_NUMBERS:
        raise ValueError(f"{name}: {stated} numbers")
    return ArrayEntry(dtype, stated, tuple(_chunk(name, c, size) for c in entry["chunks"]))


def _check_user_axes(axes: dict[str, str], arrays: dict[str, ArrayEntry]) -> None:
    user = {name for name in arrays if USER_NAME.fullmatch(name)}
    if axes.keys() != user or not set(axes.values()) <= {"sequence", "position"}:
        raise ValueError(f"axes {axes} of the user columns {sorted(user)}")
