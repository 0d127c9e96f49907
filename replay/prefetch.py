"""Steps read ahead by threads: one plans them, several read and decode their blocks, and one packs
their batches, as far ahead as two bounds in bytes allow."""

import os
import weakref
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from stillroom.cache.recycler import Empty
from stillroom.replay.batch import Batch, MicroBatch, collate
from stillroom.replay.blocks import Blocks
from stillroom.replay.feed import Feed
from stillroom.replay.reader import Block
from stillroom.replay.step import Item, Key, Position, Step

MOST_STEPS = 64
"""On their way at once, however small they are."""

Plan = Callable[[Position], tuple[Step, Position]]
"""The step at a position, and the position after it."""


@dataclass(frozen=True, slots=True)
class _Coming:
    """A planned step."""

    at: Position
    step: Step
    after: Position
    keys: frozenset[Key]
    bytes: int


class Prefetch:
    """Steps on their way, in order. One thread uses it.

    Args:
        cached_bytes: bound on decoded blocks.
        ahead_bytes: bound on batches; one is always on its way, and MOST_STEPS at most.
        threads: threads that read.
        empty: allocates arrays of batches.
    """

    def __init__(self, cached_bytes: int, ahead_bytes: int, threads: int, empty: Empty) -> None:
        """Start threads when they are first needed."""
        self._limit, self._empty = ahead_bytes, empty
        self._readers = ThreadPoolExecutor(threads, "stillroom-read")
        self._packer = ThreadPoolExecutor(1, "stillroom-pack")
        self._planner = ThreadPoolExecutor(1, "stillroom-plan")
        self._blocks: Blocks[Key, Block] = Blocks(_read, _size, self._readers, cached_bytes)
        self._ahead: deque[tuple[_Coming, Future[Batch]]] = deque()
        self._next: _Coming | None = None
        self._planning: Future[None] | None = None
        self._finalizer = weakref.finalize(
            self, _shut_down, os.getpid(), self._readers, self._packer, self._planner
        )

    @property
    def closed(self) -> bool:
        """Whether the threads have ended."""
        return not self._finalizer.alive

    def take(self, plan: Plan, at: Position) -> tuple[Batch, Position]:
        """Wait for the step at a position; the one returned is after it. Later steps are planned
        and read while the caller goes on.

        Args:
            plan: plans a step.
            at: where to begin if no step is on its way, or another one.

        Raises:
            Exception: whatever planning or reading it raised. All steps on their way are dropped
                then.
        """
        self.fill(plan, at)
        coming, batch = self._ahead[0]
        try:
            found = batch.result()
        except BaseException as error:
            self.drop()
            if isinstance(error, Exception):
                self._blocks.settle()
            raise
        self._ahead.popleft()
        self._planning = self._planner.submit(self._fill, plan, coming.after)
        return found, coming.after

    def fill(self, plan: Plan, at: Position) -> None:
        """Have the step at a position read, and later ones as far ahead as the bounds allow."""
        try:
            self.settle()
            if self._ahead and self._ahead[0][0].at != at:
                self.drop()  # an interrupt came between taking a step and noting it
            if not self._ahead:
                self._fill(plan, at)
        except BaseException:
            self.drop()
            raise

    def settle(self) -> None:
        """Wait until steps are planned as far ahead as the bounds allow."""
        if self._planning is not None:
            self._planning.result()
            self._planning = None

    def drop(self) -> None:
        """Forget the steps on their way."""
        if self._planning is not None:
            wait([self._planning])
            self._planning = None
        for coming, batch in self._ahead:
            if batch.cancel():
                self._blocks.release(coming.keys)
        self._ahead.clear()
        self._next = None

    def forget_all_but(self, feeds: Collection[Feed]) -> None:
        """Forget decoded blocks of feeds that are no longer read."""
        self._blocks.forget(lambda key: key[0] not in feeds)

    def close(self) -> None:
        """Drop all, and wait until the threads have ended."""
        self.drop()
        self._finalizer()
        for pool in (self._planner, self._packer, self._readers):
            pool.shutdown()

    def _fill(self, plan: Plan, at: Position) -> None:
        while True:
            if self._next is None:
                begin = self._ahead[-1][0].after if self._ahead else at
                step, after = plan(begin)
                self._next = _Coming(begin, step, after, frozenset(step.keys()), step.bytes())
            if self._ahead and not self._fits(self._next):
                return
            coming, self._next = self._next, None
            self._blocks.want(coming.keys)
            try:
                batch = self._packer.submit(_pack, coming, self._blocks, self._empty)
            except BaseException:
                self._blocks.release(coming.keys)
                raise
            self._ahead.append((coming, batch))

    def _fits(self, coming: _Coming) -> bool:
        ready = sum(ahead.bytes for ahead, _ in self._ahead)
        few = len(self._ahead) < MOST_STEPS and ready + coming.bytes <= self._limit
        return few and self._blocks.fits(coming.keys)


def _read(key: Key) -> Block:
    feed, block = key
    return feed.reader.read(block)


def _size(key: Key) -> int:
    feed, block = key
    return feed.reader.block_bytes(block)


def _pack(coming: _Coming, blocks: Blocks[Key, Block], empty: Empty) -> Batch:
    """Wait for a step's blocks, and pack its rows."""
    step = coming.step
    try:
        micro = [_collate(items, blocks, empty) for items in step.micro_batches]
    finally:
        blocks.release(coming.keys)
    return Batch(
        epoch=step.epoch,
        first=step.first,
        rows=step.rows,
        caches=step.caches,
        num_positions=step.num_positions,
        micro_batches=tuple(micro),
    )


def _collate(
    items: tuple[Item, ...], blocks: Blocks[Key, Block], empty: Empty
) -> MicroBatch | None:
    rows, groups = [], []
    for number, item in enumerate(items):
        reader = item.feed.reader
        for row in item.rows:
            rows.append(reader.row(blocks.get((item.feed, reader.block_of(row))), row))
            groups.append(number)
    shared = groups if len(rows) > len(items) else None
    return collate(rows, groups=shared, empty=empty) if rows else None


def _shut_down(pid: int, *pools: ThreadPoolExecutor) -> None:
    """End threads; a fork of their process has none."""
    for pool in pools if os.getpid() == pid else ():
        pool.shutdown(wait=False, cancel_futures=True)
