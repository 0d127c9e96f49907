"""The stream: a snapshot's rows in replay order, as packed batches, for one rank of any number.

Its state is a small plain dict; a stream made from it goes on with the batch that would have come
next, also on another number of ranks or with another batch size.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from stillroom.cache.errors import ConfigError, CorruptError, InputError, MismatchError
from stillroom.cache.schema import EDGE_OF, Arrays, Axis, column_of
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch, Row, collate
from stillroom.replay.packing import num_micro_batches, pack
from stillroom.replay.plan import Plan

STATE_FORMAT = 1
OPEN_SHARDS = 64
"""Each holds its manifest, row edges and a table of ids: about 1 MB, 10 MB at most in practice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """How cached rows come to a trainer."""

    batch_rows: int = 64
    """B, rows of a step over all ranks; >= 1."""
    max_tokens: int = 8192
    """Tokens of a packed micro-batch; no row may be longer."""
    block_rows: int = 16
    """Neighbouring rows that are read and shuffled together; >= 1."""
    window_rows: int = 64
    """Rows of a lane that are shuffled among themselves; >= 1. About lanes (at most 64) times
    window_rows + block_rows rows are in use at once; more than cached_bytes of them are read
    again and again."""
    cached_bytes: int = 1 << 30
    """Decoded blocks kept in memory, bytes."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if (
            min(
                self.batch_rows,
                self.max_tokens,
                self.block_rows,
                self.window_rows,
                self.cached_bytes,
            )
            < 1
        ):
            raise ConfigError("replay", "settings of at least 1", repr(self), "Raise them.")


class ReplayStream:
    """Batches of one rank.

    Args:
        cache: the cache.
        snapshot: which shards.
        config: sizes and seed.
        rank: this process, 0 to world - 1.
        world: number of processes.

    Raises:
        InputError: the snapshot is empty, or a row is longer than a micro-batch.
    """

    def __init__(
        self,
        cache: Cache,
        snapshot: Snapshot,
        config: ReplayConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Open the shards' commits; no row is read yet."""
        if not 0 <= rank < world:
            raise ConfigError(
                "rank", f"0 to {world - 1}", f"{rank}", "Check how the job was launched."
            )
        if not snapshot.rows:
            do = "Roll out and score first, or widen the policies that are replayed."
            raise InputError(cache.storage.root, "rows to replay", "an empty snapshot", do)
        self._snapshot, self._config, self._rank, self._world = snapshot, config, rank, world
        self._lengths = np.concatenate([commit.row_lengths() for commit in snapshot.commits])
        self._check_lengths()
        self._plan = Plan(snapshot.rows, config.seed, config.block_rows, config.window_rows)
        self._reader = _RowReader(cache, snapshot, config)
        self._epoch = 0
        self._first = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row came once; the last one may be short."""
        return -(-self._snapshot.rows // self._config.batch_rows)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, before its next batch."""
        return {
            "format": STATE_FORMAT,
            "snapshot": self._snapshot.id,
            "seed": self._config.seed,
            "block": self._config.block_rows,
            "window": self._config.window_rows,
            "lanes": self._plan.lanes,
            "epoch": self._epoch,
            "first": self._first,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a state of a stream over the same snapshot and order.

        Raises:
            MismatchError: the state belongs to another snapshot, seed or order.
            CorruptError: it names no place in that order.
        """
        mine = self.state()
        fixed = [key for key in mine if key not in ("epoch", "first")]
        differing = [key for key in fixed if state.get(key) != mine[key]]
        if differing:
            raise MismatchError(
                "stream state",
                ", ".join(f"{key} = {mine[key]!r}" for key in differing),
                ", ".join(f"{key} = {state.get(key)!r}" for key in differing),
                "Resume with the snapshot and settings of the run that saved it.",
            )
        epoch, first = state.get("epoch"), state.get("first")
        if (
            type(epoch) is not int
            or type(first) is not int
            or epoch < 0
            or not 0 <= first < self._snapshot.rows
        ):
            expected = f"an epoch, and a row below {self._snapshot.rows}"
            do = "Resume from another checkpoint."
            raise CorruptError("stream state", expected, f"{epoch!r:.40} and {first!r:.40}", do)
        self._epoch, self._first = epoch, first

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch."""
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next step's share of this rank.

        Raises:
            CorruptError: stored bytes are damaged; names the object.
        """
        batch = self._batch(self._epoch, self._first)
        self._first += self._config.batch_rows
        if self._first >= self._snapshot.rows:
            self._epoch, self._first = self._epoch + 1, 0
        return batch

    def _batch(self, epoch: int, first: int) -> Batch:
        size, limit = self._config.batch_rows, self._config.max_tokens
        step = self._plan.step_rows(epoch, first, size)
        ranks = [step[(r - first) % self._world :: self._world] for r in range(self._world)]
        count = num_micro_batches([self._tokens(rows) for rows in ranks], limit)
        own = ranks[self._rank]
        packed = pack(self._tokens(own), limit)
        micro: list[MicroBatch | None] = [
            collate([self._reader.row(own[i]) for i in part]) for part in packed
        ]
        return Batch(
            epoch=epoch,
            first=first,
            rows=tuple(step),
            num_positions=int(self._lengths[step, 2].sum()),
            micro_batches=(*micro, *[None] * (count - len(micro))),
        )

    def _tokens(self, rows: list[int]) -> list[int]:
        return [int(self._lengths[row, 0]) for row in rows]

    def _check_lengths(self) -> None:
        longest = int(self._lengths[:, 0].max())
        if longest > self._config.max_tokens:
            expected = f"at least the longest row's {longest} tokens"
            raise InputError(
                "replay.max_tokens", expected, f"{self._config.max_tokens}", "Raise it."
            )


class _RowReader:
    """Rows by number, through bounded sets of decoded blocks and of open shards."""

    def __init__(self, cache: Cache, snapshot: Snapshot, config: ReplayConfig) -> None:
        self._snapshot = snapshot
        self._block, self._budget = config.block_rows, config.cached_bytes
        self._ends = np.cumsum([commit.rows for commit in snapshot.commits])
        self._shard = lru_cache(OPEN_SHARDS)(lambda part: cache.shard(snapshot.commits[part]))
        self._temperature: dict[int, float] = {}
        self._blocks: OrderedDict[tuple[int, int], Arrays] = OrderedDict()

    def row(self, number: int) -> Row:
        part = int(np.searchsorted(self._ends, number, side="right"))
        local = number - (int(self._ends[part - 1]) if part else 0)
        block = self._decoded(part, local // self._block)
        return Row(number, _one(block, local % self._block), self._temperature[part])

    def _decoded(self, part: int, block: int) -> Arrays:
        key = (part, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        start = block * self._block
        stop = min(start + self._block, self._snapshot.commits[part].rows)
        shard = self._shard(part)
        self._blocks[key] = shard.rows(start, stop)
        temperature = shard.manifest.attributes["sampler"].get("temperature")
        self._temperature[part] = float("nan") if temperature is None else temperature
        held = sum(a.nbytes for arrays in self._blocks.values() for a in arrays.values())
        while held > self._budget and len(self._blocks) > 1:
            _, dropped = self._blocks.popitem(last=False)
            held -= sum(a.nbytes for a in dropped.values())
        return self._blocks[key]


def _one(block: Arrays, row: int) -> Arrays:
    """The columns of one sequence of a block; copies, as views keep dropped blocks in memory."""
    sequences = len(block["prompt_length"])
    out = {}
    for name, array in block.items():
        user_axis: Axis = "sequence" if len(array) == sequences else "position"
        axis = column_of(name, user_axis).axis
        if axis == "sequence":
            out[name] = array[row : row + 1].copy()
        elif axis != "edge":
            edge = block[EDGE_OF[axis]]
            out[name] = array[int(edge[row]) : int(edge[row + 1])].copy()
    return out
