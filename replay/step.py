"""A planned step: which rows it has, and how they fall to ranks and micro-batches. Nothing is read
for it; every rank finds the same plan."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Feed, Unit
from stillroom.replay.mix import drawn, shares_of_units
from stillroom.replay.packing import balance, deal, num_micro_batches
from stillroom.replay.place import Place, Span, after_steps, next_step

Key = tuple[Feed, int]
"""A block of a feed."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream stands."""

    step: int
    """Steps taken."""
    drawn: int
    """Units taken from all feeds; decides how many the next step takes from each."""
    places: tuple[Place, ...]
    """Of each feed."""
    epoch_ended: bool = False
    """Whether the last step was the last of its epoch, or went beyond it."""


@dataclass(slots=True)
class Item:
    """Rows that go into one micro-batch together."""

    feed: Feed
    rows: list[int]
    """Their numbers in the snapshot."""
    tokens: int
    """What the micro-batch holds of them: a shared prompt counts once."""
    positions: int


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
            for row in item.rows
        }

    def bytes(self) -> int:
        """What this rank's micro-batches take in memory, about."""
        return sum(
            item.feed.packed_bytes(item.tokens, item.positions)
            for items in self.micro_batches
            for item in items
        )


class Planner:
    """Plans the steps of one rank.

    Args:
        feeds: the sources.
        shares: of the rows that each gives, whole numbers.
        config: the stream's settings.
        rank: this process.
        world: number of processes.
        one_row: whether a micro-batch holds one row (or group) only.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        shares: Sequence[int],
        config: StreamConfig,
        rank: int,
        world: int,
        one_row: bool,
    ) -> None:
        """Plan nothing yet."""
        self._shares, self._config = shares, config
        self._rank, self._world, self._most = rank, world, 1 if one_row else None
        self._batch = config.batch_rows // config.group_rows
        self.read_from(feeds)

    def read_from(self, feeds: Sequence[Feed]) -> None:
        """Plan the next steps with these feeds."""
        self.feeds = tuple(feeds)
        self._unit_shares = self._shares
        if len(self.feeds) > 1:
            self._unit_shares = shares_of_units(self._shares, [feed.unit_rows for feed in feeds])

    def next(self, at: Position) -> tuple[Step, Position]:
        """The step at a position, and the position after it."""
        spans, after = self.spans(at)
        units = [
            (feed, unit)
            for feed, own in zip(self.feeds, spans, strict=True)
            for span in own
            for unit in feed.units_of(span)
        ]
        lead = spans[0][0] if spans[0] else Span(at.places[0].epoch, at.places[0].first, 0)
        return Step(
            epoch=lead.epoch,
            first=lead.start,
            rows=tuple(row for _, unit in units for row in unit.rows),
            caches=tuple(feed.number for feed, unit in units for _ in unit.rows),
            num_positions=sum(length[2] for _, unit in units for length in unit.lengths),
            micro_batches=self._pack(units),
        ), after

    def spans(self, at: Position) -> tuple[list[list[Span]], Position]:
        """What a step takes of each feed, and the position after it."""
        total = at.drawn + self._batch
        before, until = (drawn(units, self._unit_shares) for units in (at.drawn, total))
        spans, places = [], []
        for feed, place, start, stop in zip(self.feeds, at.places, before, until, strict=True):
            own, after = next_step(place, stop - start, feed.units_in, self._config.last_batch)
            spans.append(own)
            places.append(after)
        ended = places[0].epoch > at.places[0].epoch
        return spans, Position(at.step + 1, total, tuple(places), ended)

    def after(self, at: Position, steps: int) -> Position:
        """The position after so many steps; they are counted one by one only where epochs differ in
        length."""
        if self._config.lag_half_life is None and steps > 1:
            at, steps = self._far(at, steps - 1), 1
        for _ in range(steps):
            _, at = self.spans(at)
        return at

    def _far(self, at: Position, steps: int) -> Position:
        total, last = at.drawn + steps * self._batch, self._config.last_batch
        before, until = (drawn(units, self._unit_shares) for units in (at.drawn, total))
        places = []
        for feed, place, start, stop in zip(self.feeds, at.places, before, until, strict=True):
            strides = (1, stop - start) if last == "carry" else (steps, self._batch)
            places.append(after_steps(place, *strides, feed.units, last))
        return Position(at.step + steps, total, tuple(places))

    def _pack(self, units: Sequence[tuple[Feed, Unit]]) -> tuple[tuple[Item, ...], ...]:
        ranks = self._share_out([(feed, unit, self._items(feed, unit)) for feed, unit in units])
        tokens = [[item.tokens for item in items] for items in ranks]
        count = num_micro_batches(tokens, self._config.max_tokens, self._most)
        own = ranks[self._rank]
        packed = balance(tokens[self._rank], count, self._config.max_tokens, self._most)
        filled = [tuple(own[i] for i in part) for part in packed]
        return (*filled, *[()] * (count - len(filled)))

    def _share_out(self, units: Sequence[tuple[Feed, Unit, list[Item]]]) -> list[list[Item]]:
        """Each rank's items."""
        ranks: list[list[Item]] = [[] for _ in range(self._world)]
        if self._config.even_ranks:
            tokens = [sum(item.tokens for item in items) for _, _, items in units]
            for rank, hand in enumerate(deal(tokens, self._world)):
                ranks[rank] += [item for i in hand for item in units[i][2]]
        else:
            for feed, unit, items in units:
                ranks[(unit.g + feed.number) % self._world] += items
        return ranks

    def _items(self, feed: Feed, unit: Unit) -> list[Item]:
        """A unit's rows one by one, or with their prompt once, in as few pieces as may be."""
        items: list[Item] = []
        for row, (tokens, prompt, positions) in zip(unit.rows, unit.lengths, strict=True):
            last = items[-1] if items and self._config.share_prompts else None
            if last is not None and last.tokens + tokens - prompt <= self._config.max_tokens:
                last.rows.append(row)
                last.tokens += tokens - prompt
                last.positions += positions
            else:
                items.append(Item(feed, [row], tokens, positions))
        return items
