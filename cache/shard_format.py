"""What a shard format is: how arrays become one object, and how verified ranges of it become arrays
again. Zarr and Parquet are equals behind this."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit
from stillroom.cache.errors import CorruptError
from stillroom.cache.identity import Identity
from stillroom.cache.manifest import ArrayEntry, Chunk, Manifest
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import Arrays, expected_shapes
from stillroom.cache.storage import Storage


@dataclass(frozen=True, slots=True)
class Encoded:
    """A shard's object, and what its manifest says of it."""

    data: bytes
    arrays: dict[str, ArrayEntry]
    attributes: dict[str, Any]
    """Those given, and what the format adds to read its arrays."""
    row_groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """A committed shard's object: ranges of it, verified."""

    storage: Storage
    path: str
    commit: Commit
    identity: Identity
    manifest: Manifest
    empty: Empty = field(default=np.empty, kw_only=True)
    """Makes the arrays that are read."""

    @cached_property
    def where(self) -> str:
        """Full name of the object, for messages."""
        return self.storage.describe(self.path)

    def fetch(self, chunks: Sequence[tuple[str, Chunk]]) -> list[bytes]:
        """The bytes of named chunks, in one request where they lie close.

        Raises:
            CorruptError: bytes are not what was committed; names the object and the chunk.
        """
        starts, lengths = [c.offset for _, c in chunks], [c.length for _, c in chunks]
        blobs = self.storage.get_ranges(self.path, starts, lengths, self.manifest.size)
        for (name, chunk), blob in zip(chunks, blobs, strict=True):
            verify(blob, chunk.hash, f"{self.where}, {name}")
        return blobs

    def sizes(self) -> dict[str, int]:
        """Entries on each axis, as the commit says."""
        commit = self.commit
        return {
            "position": commit.positions,
            "token": commit.tokens,
            "sequence": commit.rows,
            "edge": commit.rows + 1,
            "teacher_token": commit.teacher_prompt_tokens,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all columns, user columns included."""
        sizes, axes = self.sizes(), self.manifest.attributes["user_axes"]
        user = {name: (sizes[axis],) for name, axis in axes.items()}
        return expected_shapes(sizes, self.identity.topk, self.identity.extra) | user


class Reader(Protocol):
    """Columns of one shard."""

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[np.ndarray]:
        """Rows [start, stop) of columns along their own axes, as (name, start, stop) each; exactly
        the numbers that were encoded.

        Raises:
            CorruptError: bytes are not what was committed, or do not decode to what was asked.
        """


class ShardFormat(Protocol):
    """One way to store a shard as one object."""

    @property
    def object_name(self) -> str:
        """Name of the object in an attempt's folder."""

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode every column of a shard, checked by `check_arrays`; equal arrays give equal
        bytes."""

    def open(self, source: Source) -> Reader:
        """Check that a manifest is possible for its commit; nothing is read yet.

        Raises:
            CorruptError: it is not.
        """


def shard_format(name: str) -> ShardFormat:
    """The format of that name, as an identity holds it."""
    if name == "parquet":
        from stillroom.cache.parquet_shard import ParquetFormat

        return ParquetFormat()
    from stillroom.cache.zarr_format import ZarrFormat

    return ZarrFormat()


def verify(data: bytes, expected: str, where: str) -> None:
    """Refuse bytes whose hash is not the expected one.

    Raises:
        CorruptError: they are others.
    """
    found = jsonfile.digest(data)
    if found != expected:
        do = "It was damaged after its commit: restore it, or run 'stillroom verify --repair'."
        raise CorruptError(where, f"bytes with hash {expected}", f"{found} ({len(data)} bytes)", do)
