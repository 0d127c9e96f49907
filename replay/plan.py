"""The replay order: seed and row count in, rows of every step out. Pure; no row is read here.

Rows are numbered along a snapshot. An epoch permutes blocks of neighbouring rows and lays them end
to end, cuts that list into L lanes whose lengths differ by at most one (the longer first), and
inside a lane permutes tiles of `window` rows. Where lanes have LONG tiles or more, lane l begins
its second tile l * window div L rows early, so that lanes need new blocks one after another and not
all at once. Row g of the epoch is row g div L of lane g mod L. A step is the next B of them; rank r
of W takes those with g mod W = r. So the rows of a step do not depend on W, and where W divides L a
rank reads its own lanes only. (Where rollouts of a prompt stay together, a row here is such a
group.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from stillroom.cache.errors import ConfigError

MAX_LANES = 64
LONG = 4
EPOCHS = 2
"""Whose lists of blocks are kept."""
MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of every epoch of one snapshot."""

    rows: int
    """N, rows in the snapshot; >= 1."""
    seed: int
    block: int
    """Neighbouring rows that move together; >= 1."""
    window: int
    """Rows of a lane that are permuted among themselves; >= 1."""
    _tiles: dict[int, tuple[tuple[int, int], list[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Of each lane the tile that was used last: epoch and number, and its rows."""
    _blocks: Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]] = field(
        default_factory=lambda: lru_cache(EPOCHS)(_blocks), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.rows, self.block, self.window) < 1:
            got = f"{self.rows}, {self.block} and {self.window}"
            raise ConfigError("rows, block_rows, window_rows", "at least 1", got, "Raise them.")

    @property
    def lanes(self) -> int:
        """L, from the snapshot's rows alone."""
        return max(1, min(MAX_LANES, self.rows // self.window))

    def row(self, epoch: int, g: int) -> int:
        """Snapshot row that comes g-th in an epoch."""
        return self.rows_of(epoch, g, g + 1)[0]

    def rows_of(self, epoch: int, start: int, stop: int) -> list[int]:
        """Snapshot rows that come start-th up to stop-th, the last excluded, in an epoch."""
        lanes, found = self.lanes, []
        for g in range(start, min(stop, self.rows)):
            index, lane = divmod(g, lanes)
            number, first = divmod(index + self._early(lane, lanes), self.window)
            found.append(self._tile(epoch, lane, number)[min(first, index)])
        return found

    def _tile(self, epoch: int, lane: int, number: int) -> list[int]:
        kept = self._tiles.get(lane)
        if kept is None or kept[0] != (epoch, number):
            kept = self._tiles[lane] = (epoch, number), self._permuted(epoch, lane, number)
        return kept[1]

    def _permuted(self, epoch: int, lane: int, tile: int) -> list[int]:
        """Rows of a tile, in their order."""
        start, length = self._lane(lane)
        early = self._early(lane, self.lanes)
        first = max(0, tile * self.window - early)
        stop = min((tile + 1) * self.window - early, length)
        order = permutation(stop - first, self.seed, epoch, lane, tile)
        rows: list[int] = self._listed(epoch, start + first + order).tolist()
        return rows

    def _lane(self, lane: int) -> tuple[int, int]:
        base, longer = divmod(self.rows, self.lanes)
        return lane * base + min(lane, longer), base + (lane < longer)

    def _early(self, lane: int, lanes: int) -> int:
        """Rows by which the first tile of a lane is short."""
        is_long = self.rows >= LONG * lanes * self.window
        return lane * self.window // lanes if is_long else 0

    def _listed(self, epoch: int, position: np.ndarray) -> np.ndarray:
        """Snapshot rows at positions of the epoch's list of permuted blocks."""
        order, ends = self._blocks(self.rows, self.block, self.seed, epoch)
        at = np.searchsorted(ends, position, side="right")
        before = np.where(at > 0, ends[at - 1], 0)
        return np.asarray(order[at] * self.block + position - before)


def _blocks(rows: int, block: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The permuted blocks of an epoch, and where each ends in their list."""
    order = permutation(-(-rows // block), seed, epoch)
    sizes = np.minimum(block, rows - order * block)
    return order, np.cumsum(sizes)


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) from the key alone: indices sorted by a hash of (key, index).

    Own arithmetic (SplitMix64), because the order must never change with a library's release.
    """
    state = np.array(size, np.uint64)
    with np.errstate(over="ignore"):
        for word in key:
            state = mix_bits(state ^ np.uint64(word % 2**64))
        hashes = mix_bits(state + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(MIX[0]))
    return np.argsort(hashes, kind="stable")


def mix_bits(value: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 for each uint64; overflow is meant."""
    value = value + np.uint64(MIX[0])
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX[1])
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX[2])
    return np.asarray(value ^ (value >> np.uint64(31)))
