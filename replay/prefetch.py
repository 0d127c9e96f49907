"""Steps read ahead by threads: blocks are read and decoded by several, and batches packed by one,
as far ahead as two bounds in bytes allow."""

import os
import weakref
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._blocks: Blocks[Key, Block] = Blocks(_read, _size, self._readers, cached_bytes)
        self._ahead: deque[tuple[_Coming, Future[Batch]]] = deque()
        self._next: _Coming | None = None
        self._finalizer = weakref.finalize(
            self, _shut_down, os.getpid(), self._readers, self._packer
        )

    @property
    def closed(self) -> bool:
        """Whether the threads have ended."""
        return not self._finalizer.alive

    def fill(self, plan: Plan, at: Position) -> None:
        """Have steps read, as far ahead as the bounds allow.

        Args:
            plan: plans a step.
            at: where to begin if none is on its way.
        """
        while True:
            if self._next is None:
                step, after = plan(self._ahead[-1][0].after if self._ahead else at)
                self._next = _Coming(step, after, frozenset(step.keys()), step.bytes())
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

    def take(self) -> tuple[Batch, Position]:
        """Wait for the first step on its way; the position is the one after it.

        Raises:
            Exception: whatever reading it raised. All steps on their way are dropped then.
        """
        coming, batch = self._ahead[0]
        try:
            found = batch.result()
        except BaseException as error:
            self.drop()
            if isinstance(error, Exception):
                self._blocks.settle()
            raise
        self._ahead.popleft()
        return found, coming.after

    def drop(self) -> None:
        """Forget the steps on their way."""
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
        for pool in (self._packer, self._readers):
            pool.shutdown()

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
