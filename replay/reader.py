"""Rows of a snapshot, in decoded blocks of neighbouring ones."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from stillroom.cache.commits import Commit
from stillroom.cache.errors import MissingError, ShapeError
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import EDGE_OF, USER_NAME, Arrays, Axis
from stillroom.cache.shard import Shard
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import Facts, Row
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
OF_FACTS = ("scored", "source", "policy_version_min")
"""Columns that `Facts` stand for."""
WEIGHT = "weight"
"""What a row's weights are called, whatever their column's name."""
ENTRY_BYTES = 6
POSITION_BYTES = 14
WEIGHT_BYTES = 4
EXTRA_BYTES = 10
TOKEN_BYTES = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring rows of one shard, decoded."""

    first: int
    """Snapshot number of its first row."""
    arrays: Arrays
    columns: tuple[tuple[str, np.ndarray, Sequence[int]], ...]
    """What rows have: name, values, and where each row begins in them; the last entry ends the last
    one."""
    facts: tuple[Facts, ...]
    """Of each row."""
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
        weight_column: the user column that becomes a row's weights; None reads none.
    """

    def __init__(
        self,
        cache: Cache,
        snapshot: Snapshot,
        block_rows: int,
        number: int,
        max_tokens: int,
        empty: Empty = np.empty,
        *,
        weight_column: str | None = None,
    ) -> None:
        """Read nothing yet."""
        self._weight_column = weight_column
        self._commits, self._number, self._max_tokens = snapshot.commits, number, max_tokens
        self._block_rows = block_rows
        self._ends = np.cumsum([commit.rows for commit in snapshot.commits]).tolist()
        self._shard = lru_cache(OPEN_SHARDS)(
            lambda part: cache.shard(snapshot.commits[part], empty)
        )
        identity, weighted = cache.identity, weight_column is not None
        row_bytes = _row_bytes(snapshot.commits, identity.topk, identity.extra, weighted)
        starts = range(0, len(row_bytes), block_rows)
        self._block_bytes: list[int] = np.add.reduceat(row_bytes, starts).tolist()

    def block_of(self, row: int) -> int:
        """Number of the block that holds a row."""
        return row // self._block_rows

    @property
    def mean_row_bytes(self) -> float:
        """What a row takes in memory on average."""
        return float(sum(self._block_bytes) / self._ends[-1])

    def block_bytes(self, block: int) -> int:
        """What the columns of a block along tokens and positions take in memory, and the facts of
        its rows."""
        return self._block_bytes[block]

    def read(self, block: int) -> Block:
        """Read, verify and decode a block.

        Raises:
            CorruptError: stored bytes are damaged; names the object.
            MissingError: a shard is gone, or has no column of weights.
            ShapeError: a row does not have a position for each token that is scored.
        """
        start = block * self._block_rows
        stop = min(start + self._block_rows, self._ends[-1])
        pieces = []
        while start < stop:
            part = bisect_right(self._ends, start)
            end, before = min(stop, self._ends[part]), self._ends[part - 1] if part else 0
            shard = self._shard(part)
            names = {**COLUMNS, **self._weight_axis(shard)}
            arrays = shard.rows(start - before, end - before, names)
            sampler = shard.manifest.attributes["sampler"]
            temperature, likeliest = _number(sampler.get("temperature")), notes_likeliest(sampler)
            columns, facts = _columns(arrays, names), _facts(arrays, start)
            pieces.append(Piece(start, arrays, columns, facts, temperature, likeliest))
            start = end
        return tuple(pieces)

    def close(self) -> None:
        """Let go of open shards; a later read opens its own again."""
        self._shard.cache_clear()

    def row(self, block: Block, number: int) -> Row:
        """A row of a block; its arrays are views."""
        piece = block[bisect_right(block, number, key=lambda p: p.first) - 1]
        at = number - piece.first
        arrays = {name: values[edge[at] : edge[at + 1]] for name, values, edge in piece.columns}
        facts = piece.facts[at]
        if len(arrays["token"]) > self._max_tokens:
            arrays, facts = _cut(arrays, facts, self._max_tokens)
        return Row(number, arrays, piece.temperature, self._number, piece.extra_likeliest, facts)

    def _weight_axis(self, shard: Shard) -> dict[str, Axis]:
        name = self._weight_column
        if name is None:
            return {}
        if name not in shard.columns:
            user = [n for n in shard.columns if USER_NAME.fullmatch(n)]
            do = f"Set replay.weight_column to one that every shard has; this one has {user}."
            raise MissingError(shard.path, f"a column {name!r}", "none", do)
        return {name: shard.axis(name)}


def _number(temperature: float | None) -> float:
    return float("nan") if temperature is None else temperature


def _row_bytes(commits: Sequence[Commit], topk: int, extra: int, weighted: bool) -> np.ndarray:
    lengths = np.concatenate([np.zeros((0, 3), np.int64), *(c.row_lengths() for c in commits)])
    per_position = topk * ENTRY_BYTES + extra * EXTRA_BYTES + POSITION_BYTES
    per_position += WEIGHT_BYTES * weighted
    return np.asarray(lengths[:, 0] * TOKEN_BYTES + lengths[:, 2] * per_position)


def _columns(
    arrays: Arrays, axes: Mapping[str, Axis]
) -> tuple[tuple[str, np.ndarray, Sequence[int]], ...]:
    edges: dict[Axis, Sequence[int]] = {
        axis: arrays[e].tolist() for axis, e in EDGE_OF.items() if e in arrays
    }
    edges["sequence"] = range(len(arrays["source"]) + 1)
    return tuple(
        (name if name in COLUMNS else WEIGHT, arrays[name], edges[axis])
        for name, axis in axes.items()
        if name in arrays and name not in OF_FACTS
    )


def _facts(arrays: Arrays, first: int) -> tuple[Facts, ...]:
    """Those of each row; `first` is the number of the first one."""
    token_start, start = arrays[EDGE_OF["token"]], arrays[EDGE_OF["position"]]
    target = np.flatnonzero(arrays["scored"] != 0)  # of 16-bit numbers alone it is slow
    scored, positions = np.diff(np.searchsorted(target, token_start)), np.diff(start)
    for row in np.flatnonzero(scored != positions).tolist():
        where, do = f"row {first + row}, tail_logprob", "Run 'stillroom verify'."
        expected = f"{scored[row]} positions, as are scored"
        raise ShapeError(where, expected, f"{positions[row]}", do)
    target = (target - np.repeat(token_start[:-1], positions)).astype(np.int32)
    own = (target[begin:end] for begin, end in pairwise(start.tolist()))
    return tuple(map(Facts, own, *(arrays[name].tolist() for name in OF_FACTS[1:])))


def _cut(row: Arrays, facts: Facts, max_tokens: int) -> tuple[Arrays, Facts]:
    """The first tokens of a row, and the positions that score them."""
    positions = int(np.searchsorted(facts.target, max_tokens))
    kept = {"token": max_tokens, "position": positions, "sequence": 1}
    arrays = {name: array[: kept[COLUMNS.get(name, "position")]] for name, array in row.items()}
    return arrays, facts._replace(target=facts.target[:positions])
