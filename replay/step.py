"""A planned step: which rows it has, and how they fall to ranks and micro-batches. Nothing is read
for it; every rank finds the same plan."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.replay.batch import LAYOUT
from stillroom.replay.config import ReplayConfig
from stillroom.replay.feed import Feed, Unit
from stillroom.replay.mix import drawn
from stillroom.replay.packing import balance, num_micro_batches
from stillroom.replay.place import Place, Span, next_step

Key = tuple[Feed, int]
"""A block of a feed."""
BYTES = {
    axes: sum(np.dtype(dtype).itemsize for own, dtype in LAYOUT.values() if own == axes)
    for axes in ("T", "P", "PK", "PM")
}
"""What a micro-batch takes, by the axes of its arrays."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream stands."""

    step: int
    """Steps taken."""
    drawn: int
    """Units taken from all feeds; decides how many the next step takes from each."""
    places: tuple[Place, ...]
    """Of each feed."""


@dataclass(frozen=True, slots=True)
class Item:
    """Rows that go into one micro-batch together."""

    feed: Feed
    rows: Unit
    tokens: int
    """What the micro-batch holds of them: a shared prompt counts once."""

    @property
    def numbers(self) -> list[int]:
        """The rows' numbers in the snapshot."""
        return [int(self.feed.selection.rows[row]) for row in self.rows]

    @property
    def bytes(self) -> int:
        """What they take in a micro-batch, about."""
        identity = self.feed.source.cache.identity
        positions = int(self.feed.selection.lengths[list(self.rows), 2].sum())
        wide = BYTES["P"] + BYTES["PK"] * identity.topk + BYTES["PM"] * identity.extra
        return self.tokens * BYTES["T"] + positions * wide


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of one step."""

    epoch: int
    first: int
    rows: tuple[int, ...]
    """Snapshot rows of all ranks."""
    caches: tuple[int, ...]
    """The source of each."""
    num_positions: int
    """N, of all ranks."""
    micro_batches: tuple[tuple[Item, ...], ...]
    """This rank's; empty ones only keep step."""

    def keys(self) -> set[Key]:
        """Blocks that hold this rank's rows."""
        return {
            (item.feed, item.feed.reader.block_of(row))
            for items in self.micro_batches
            for item in items
            for row in item.numbers
        }

    def bytes(self) -> int:
        """What this rank's micro-batches take in memory, about."""
        return sum(item.bytes for items in self.micro_batches for item in items)


class Planner:
    """Plans the steps of one rank.

    Args:
        feeds: the sources.
        shares: of each, whole numbers.
        config: the stream's settings.
        rank: this process.
        world: number of processes.
        one_row: whether a micro-batch holds one row (or group) only.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        shares: Sequence[int],
        config: ReplayConfig,
        rank: int,
        world: int,
        one_row: bool,
    ) -> None:
        """Plan nothing yet."""
        self.feeds, self._shares, self._config = tuple(feeds), shares, config
        self._rank, self._world, self._most = rank, world, 1 if one_row else None
        self._batch = config.batch_rows // config.group_rows

    def next(self, at: Position) -> tuple[Step, Position]:
        """The step at a position, and the position after it."""
        spans, after = self.spans(at)
        units = [
            (feed, g, unit)
            for feed, own in zip(self.feeds, spans, strict=True)
            for span in own
            for g, unit in feed.units_of(span)
        ]
        lengths = [feed.selection.lengths[list(unit), 2] for feed, _, unit in units]
        lead = spans[0][0] if spans[0] else Span(at.places[0].epoch, at.places[0].first, 0)
        return Step(
            epoch=lead.epoch,
            first=lead.start,
            rows=tuple(int(f.selection.rows[row]) for f, _, unit in units for row in unit),
            caches=tuple(feed.number for feed, _, unit in units for _ in unit),
            num_positions=sum(int(counts.sum()) for counts in lengths),
            micro_batches=self._pack(units),
        ), after

    def spans(self, at: Position) -> tuple[list[list[Span]], Position]:
        """What a step takes of each feed, and the position after it."""
        total = at.drawn + self._batch
        before, until = drawn(at.drawn, self._shares), drawn(total, self._shares)
        spans, places = [], []
        for feed, place, start, stop in zip(self.feeds, at.places, before, until, strict=True):
            own, after = next_step(place, stop - start, feed.units_in, self._config.last_batch)
            spans.append(own)
            places.append(after)
        return spans, Position(at.step + 1, total, tuple(places))

    def _pack(self, units: Sequence[tuple[Feed, int, Unit]]) -> tuple[tuple[Item, ...], ...]:
        ranks: list[list[Item]] = [[] for _ in range(self._world)]
        for feed, g, unit in units:
            ranks[(g + feed.number) % self._world] += self._items(feed, unit)
        tokens = [[item.tokens for item in items] for items in ranks]
        count = num_micro_batches(tokens, self._config.max_tokens, self._most)
        own = ranks[self._rank]
        packed = balance(tokens[self._rank], count, self._config.max_tokens, self._most)
        filled = [tuple(own[i] for i in part) for part in packed]
        return (*filled, *[()] * (count - len(filled)))

    def _items(self, feed: Feed, unit: Unit) -> list[Item]:
        lengths = feed.selection.lengths[list(unit)]
        tokens = lengths[:, 0].tolist()
        if not self._config.share_prompts:
            return [Item(feed, (row,), count) for row, count in zip(unit, tokens, strict=True)]
        items: list[Item] = []
        rows: list[int] = []
        held, prompt = 0, int(lengths[0, 1])
        for row, count in zip(unit, tokens, strict=True):
            if rows and held + count - prompt > self._config.max_tokens:
                items.append(Item(feed, tuple(rows), held))
                rows = []
            held = held + count - prompt if rows else count
            rows.append(row)
        return [*items, Item(feed, tuple(rows), held)]
