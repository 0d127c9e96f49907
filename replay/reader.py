"""Rows of a snapshot, in decoded blocks of neighbouring ones."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stillroom.cache.commits import Commit
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import EDGE_OF, Arrays, Axis
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import Row
from stillroom.replay.sampler import notes_likeliest

OPEN_SHARDS = 128
"""Each holds its manifest, row edges and lists of ids: about 0.2 MB for 50,000 positions and 2 MB
for a million. To open one again costs about 3 us for each of its chunks."""
COLUMNS: dict[str, Axis] = {
    "topk_id": "position",
    "topk_logprob": "position",
    "tail_logprob": "position",
    "sampled_logprob": "position",
    "behaviour_logprob": "position",
    "extra_id": "position",
    "extra_logprob": "position",
    "extra_behaviour_logprob": "position",
    "token": "token",
    "scored": "token",
    "policy_version_min": "sequence",
    "source": "sequence",
    "prompt_length": "sequence",
}
"""What is read of a shard."""
ENTRY_BYTES = 6
POSITION_BYTES = 10
EXTRA_BYTES = 10
TOKEN_BYTES = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring rows of one shard, decoded."""

    first: int
    """Snapshot number of its first row."""
    arrays: Arrays
    columns: tuple[tuple[str, np.ndarray, Sequence[int]], ...]
    """Name, values, and where each row begins in them; the last entry ends the last one."""
    temperature: float
    """At which the rows were sampled; NaN if unknown."""
    extra_likeliest: bool
    """The sampler noted its likeliest tokens as extra ids."""


Block = tuple[Piece, ...]
"""Neighbouring rows of a snapshot: a piece of every shard that they lie in."""


class RowReader:
    """Blocks and rows of one snapshot. Threads may share it.

    Args:
        cache: the cache.
        snapshot: its shards.
        block_rows: rows of a block.
        number: the cache's place among those that feed the stream.
        max_tokens: longer rows are cut to so many tokens.
        empty: makes the arrays of blocks.
    """

    def __init__(
        self,
        cache: Cache,
        snapshot: Snapshot,
        block_rows: int,
        number: int,
        max_tokens: int,
        empty: Empty = np.empty,
    ) -> None:
        """Read nothing yet."""
        self._commits, self._number, self._max_tokens = snapshot.commits, number, max_tokens
        self._block_rows = block_rows
        self._ends = np.cumsum([commit.rows for commit in snapshot.commits]).tolist()
        self._shard = lru_cache(OPEN_SHARDS)(
            lambda part: cache.shard(snapshot.commits[part], empty)
        )
        self._row_bytes = _row_bytes(snapshot.commits, cache.identity.topk, cache.identity.extra)

    def block_of(self, row: int) -> int:
        """Number of the block that holds a row."""
        return row // self._block_rows

    @property
    def mean_row_bytes(self) -> float:
        """What a row takes in memory on average."""
        return float(self._row_bytes.mean())

    def block_bytes(self, block: int) -> int:
        """What the columns of a block along tokens and positions take in memory."""
        start = block * self._block_rows
        return int(self._row_bytes[start : start + self._block_rows].sum())

    def read(self, block: int) -> Block:
        """Read, verify and decode a block.

        Raises:
            CorruptError: stored bytes are damaged; names the object.
            MissingError: a shard is gone.
        """
        start = block * self._block_rows
        stop = min(start + self._block_rows, self._ends[-1])
        pieces = []
        while start < stop:
            part = bisect_right(self._ends, start)
            end, before = min(stop, self._ends[part]), self._ends[part - 1] if part else 0
            shard = self._shard(part)
            arrays = shard.rows(start - before, end - before, COLUMNS)
            sampler = shard.manifest.attributes["sampler"]
            temperature, likeliest = _number(sampler.get("temperature")), notes_likeliest(sampler)
            pieces.append(Piece(start, arrays, _columns(arrays), temperature, likeliest))
            start = end
        return tuple(pieces)

    def row(self, block: Block, number: int) -> Row:
        """A row of a block; its arrays are views."""
        piece = block[bisect_right(block, number, key=lambda p: p.first) - 1]
        at = number - piece.first
        arrays = _cut(_one(piece, at), self._max_tokens)
        return Row(number, arrays, piece.temperature, self._number, piece.extra_likeliest)


def _number(temperature: float | None) -> float:
    return float("nan") if temperature is None else temperature


def _row_bytes(commits: Sequence[Commit], topk: int, extra: int) -> np.ndarray:
    lengths = np.concatenate([np.zeros((0, 3), np.int64), *(c.row_lengths() for c in commits)])
    per_position = topk * ENTRY_BYTES + extra * EXTRA_BYTES + POSITION_BYTES
    return np.asarray(lengths[:, 0] * TOKEN_BYTES + lengths[:, 2] * per_position)


def _columns(arrays: Arrays) -> tuple[tuple[str, np.ndarray, Sequence[int]], ...]:
    edges: dict[Axis, Sequence[int]] = {
        axis: arrays[e].tolist() for axis, e in EDGE_OF.items() if e in arrays
    }
    edges["sequence"] = range(len(arrays["source"]) + 1)
    return tuple(
        (name, arrays[name], edges[axis]) for name, axis in COLUMNS.items() if name in arrays
    )


def _one(piece: Piece, at: int) -> Arrays:
    return {name: values[edge[at] : edge[at + 1]] for name, values, edge in piece.columns}


def _cut(row: Arrays, max_tokens: int) -> Arrays:
    """The first tokens of a row, and the positions that score them."""
    if len(row["token"]) <= max_tokens:
        return row
    positions = int(row["scored"][:max_tokens].sum())
    kept = {"token": max_tokens, "position": positions, "sequence": 1}
    return {name: array[: kept[COLUMNS[name]]] for name, array in row.items()}
