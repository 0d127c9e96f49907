"""One cache's part of a stream: its snapshot, which of its rows are replayed, and their order in
every epoch."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import count

import numpy as np

from stillroom.cache.recycler import Empty
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import LAYOUT
from stillroom.replay.config import StreamConfig
from stillroom.replay.place import Span
from stillroom.replay.plan import Plan
from stillroom.replay.reader import RowReader
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.selection import Selection, select
from stillroom.replay.shard_columns import Known
from stillroom.replay.staleness import expected_rows, kept_rows, mean_of_kept

BYTES = {
    axes: sum(np.dtype(dtype).itemsize for own, dtype in LAYOUT.values() if own == axes)
    for axes in ("T", "P", "PK", "PM")
}
"""What a micro-batch takes, by the axes of its arrays."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that stay together."""

    g: int
    """Its place in the epoch."""
    rows: list[int]
    """Their numbers in the snapshot."""
    lengths: list[list[int]]
    """Tokens, prompt tokens and positions of each."""


@dataclass(frozen=True, slots=True)
class Source:
    """A cache that feeds a stream."""

    cache: Cache
    snapshot: Snapshot
    """Which shards."""
    weight: float = 1.0
    """Its share of the rows, beside other caches; > 0."""
    rows: RowFilter | None = None
    """Which rows; None for those of the stream's settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSource:
    """Where a cache is that feeds a stream, before it is opened; see `Source`."""

    root: str
    """Folder or address of the cache."""
    snapshot: str
    """Id of a stored snapshot. Pin it for as long as it is replayed."""
    weight: float = 1.0
    """Its share of the rows, beside other caches; > 0."""
    rows: RowFilter | None = None
    """Which rows; None for those of the stream's settings."""

    def open(self) -> Source:
        """Open the cache and the snapshot.

        Raises:
            MissingError: the cache, or a part of the snapshot, is gone.
        """
        cache = Cache.open(self.root)
        return Source(cache, cache.open_snapshot(self.snapshot), self.weight, self.rows)


class Feed:
    """A source, opened.

    Args:
        source: the cache.
        number: its place among the stream's sources; seeds its order too.
        config: the stream's settings.
        empty: makes the arrays of decoded blocks.
        known: what was read of shards, where the source is followed, for rows to be chosen by.
            What is read now is added, also where no feed comes of it.

    Raises:
        InputError: no row is left, or one is too long.
    """

    def __init__(
        self,
        source: Source,
        number: int,
        config: StreamConfig,
        empty: Empty = np.empty,
        known: Known | None = None,
    ) -> None:
        """Choose rows; none is read yet."""
        self.source, self.number, self._config, self._empty = source, number, config, empty
        self.filter = config.rows if source.rows is None else source.rows
        known = ({} if known is None else known) if config.follow_every_steps else None
        self.selection = select(
            source.cache,
            source.snapshot,
            self.filter,
            max_tokens=config.max_tokens,
            over_long=config.over_long,
            group_rows=config.group_rows,
            with_policy=config.lag_half_life is not None,
            known=known,
        )
        self._known = _of_snapshot(known or {}, source.snapshot)
        self.selection_digest = self.selection.digest
        self.reader = RowReader(
            source.cache,
            source.snapshot,
            config.block_rows,
            number,
            config.max_tokens,
            empty,
            weight_column=config.weight_column,
        )
        identity = source.cache.identity
        wide = BYTES["PK"] * identity.topk + BYTES["PM"] * identity.extra
        self._position_bytes = BYTES["P"] + wide
        self._epoch = lru_cache(2)(partial(_make_epoch, self.selection, config, number))

    @property
    def units(self) -> int:
        """Units in all."""
        return len(self.selection.unit_start) - 1

    @property
    def unit_rows(self) -> Fraction:
        """Rows of a unit, on average over many epochs."""
        selection, half_life = self.selection, self._config.lag_half_life
        if half_life is None or self._config.group_rows == 1:
            return Fraction(len(selection.rows), self.units)
        sizes = np.diff(selection.unit_start)
        return mean_of_kept(sizes, selection.unit_policy, half_life, selection.newest_policy)

    @cached_property
    def expected_units(self) -> Fraction:
        """Units of an epoch, on average over many; below 1 where most have one only because each
        has one at least."""
        selection, half_life = self.selection, self._config.lag_half_life
        if half_life is None:
            return Fraction(self.units)
        return expected_rows(selection.unit_policy, half_life, selection.newest_policy)

    def open_bytes(self, world: int) -> int:
        """About what the blocks take that one of so many ranks has in use at once."""
        plan, _ = self._epoch(0)
        own = plan.lanes % world == 0 and not self._config.even_ranks
        share = world if own else 1
        wanted = plan.lanes * (plan.window + 2 * plan.block) * self._config.group_rows / share
        size, kept = self._config.block_rows, self.selection.rows
        read = len(np.unique(kept // size)) * size / len(kept)
        rows = min(wanted * read, self.source.snapshot.rows)
        return int(rows * self.reader.mean_row_bytes)

    def units_in(self, epoch: int) -> int:
        """Units of an epoch, those left out for their lag not counted; >= 1."""
        return len(self._epoch(epoch)[1])

    def units_of(self, span: Span) -> list[Unit]:
        """Units that a step takes."""
        plan, kept = self._epoch(span.epoch)
        units = kept[plan.rows_of(span.epoch, span.start, span.stop)]
        starts, stops = self.selection.unit_start[units], self.selection.unit_start[units + 1]
        found = []
        for g, start, stop in zip(count(span.start), starts.tolist(), stops.tolist(), strict=False):
            rows = self.selection.rows[start:stop].tolist()
            found.append(Unit(g, rows, self.selection.lengths[start:stop].tolist()))
        return found

    def packed_bytes(self, tokens: int, positions: int) -> int:
        """What so many tokens and positions take in a micro-batch, about."""
        return tokens * BYTES["T"] + positions * self._position_bytes

    def with_snapshot(self, snapshot: Snapshot) -> "Feed":
        """The same source at another snapshot. Where it is followed, columns are read only of
        shards that this one has not."""
        source = replace(self.source, snapshot=snapshot)
        return Feed(source, self.number, self._config, self._empty, self._known)

    def close(self) -> None:
        """Let go of open shards, and of what is known of others."""
        self.reader.close()
        self._known.clear()


def _make_epoch(
    selection: Selection, config: StreamConfig, number: int, epoch: int
) -> tuple[Plan, np.ndarray]:
    """The order of an epoch, and the units that it has."""
    seed = config.seed + number
    kept = np.arange(len(selection.unit_start) - 1)
    if config.lag_half_life is not None:
        key = selection.rows[selection.unit_start[:-1]]
        newest = selection.newest_policy
        kept = kept_rows(selection.unit_policy, seed, epoch, config.lag_half_life, key, newest)
    size = config.group_rows
    block, window = max(1, config.block_rows // size), max(1, config.window_rows // size)
    return Plan(len(kept), seed, block, window), kept


def _of_snapshot(known: Known, snapshot: Snapshot) -> Known:
    """What is known of the shards of a snapshot."""
    digests = (commit.digest() for commit in snapshot.commits) if known else ()
    return {digest: known[digest] for digest in digests if digest in known}
