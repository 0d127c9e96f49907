"""The replay order: seed and row count in, rows of every step out. Pure; no row is read here.

Rows are numbered along a snapshot. An epoch permutes blocks of neighbouring rows and lays them end
to end, cuts that list into L lanes whose lengths differ by at most one (the longer first), and
inside a lane permutes aligned tiles of `window` rows. Row g of the epoch is row g div L of lane g
mod L. Step s of batch size B is rows [sB, (s+1)B); rank r of W takes those with g mod W = r. So the
rows of a step do not depend on W.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stillroom.cache.errors import ConfigError

MAX_LANES = 64
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
        lane, index = g % self.lanes, g // self.lanes
        start, length = self._lane(lane)
        tile = index // self.window
        size = min(self.window, length - tile * self.window)
        order = permutation(size, self.seed, epoch, lane, tile)
        return self._listed(epoch, start + tile * self.window + int(order[index % self.window]))

    def step_rows(
        self, epoch: int, first: int, batch: int, rank: int = 0, world: int = 1
    ) -> list[int]:
        """Snapshot rows of one rank in the step that begins at g = first; the last step of an epoch
        may be short."""
        stop = min(first + batch, self.rows)
        return [self.row(epoch, g) for g in range(first, stop) if g % world == rank]

    def _lane(self, lane: int) -> tuple[int, int]:
        base, longer = divmod(self.rows, self.lanes)
        return lane * base + min(lane, longer), base + (lane < longer)

    def _listed(self, epoch: int, position: int) -> int:
        """Snapshot row at a position of the epoch's list of permuted blocks."""
        order, ends = _blocks(self.rows, self.block, self.seed, epoch)
        at = int(np.searchsorted(ends, position, side="right"))
        before = int(ends[at - 1]) if at else 0
        return int(order[at]) * self.block + position - before


@lru_cache(maxsize=4)
def _blocks(rows: int, block: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    order = permutation(-(-rows // block), seed, epoch)
    sizes = np.minimum(block, rows - order * block)
    return order, np.cumsum(sizes)


@lru_cache(maxsize=256)
def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) from the key alone: indices sorted by a hash of (key, index).

    Own arithmetic (SplitMix64), because the order must never change with a library's release.
    """
    state = np.array(size, np.uint64)
    with np.errstate(over="ignore"):
        for word in key:
            state = _mix(state ^ np.uint64(word % 2**64))
        hashes = _mix(state + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(MIX[0]))
    return np.argsort(hashes, kind="stable")


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(MIX[0])
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX[1])
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX[2])
    return np.asarray(value ^ (value >> np.uint64(31)))
