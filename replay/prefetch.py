"""Steps read ahead by threads: one plans them, several read and decode their blocks, and two pack
their batches, as far ahead as two bounds in bytes allow."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock, RLock

from stillroom.cache.errors import ConfigError
from stillroom.cache.recycler import Empty
from stillroom.replay.batch import Batch, MicroBatch, collate
from stillroom.replay.blocks import Blocks
from stillroom.replay.feed import Feed
from stillroom.replay.reader import Block
from stillroom.replay.step import Item, Key, Position, Step

MOST_STEPS = 64
"""On their way at once, however small they are."""
PACK_THREADS = 2

Plan = Callable[[Position], tuple[Step, Position]]
"""The step at a position, and the position after it."""

_ENDING = Event()
# Where an interpreter ends it waits for threads of pools, and these do all that is queued first,
# unless they are told before: what `atexit` calls comes too late.
threading._register_atexit(_ENDING.set)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Coming:
    """A planned step."""

    at: Position
    step: Step
    after: Position
    keys: frozenset[Key]
    bytes: int
    once: Lock = field(default_factory=Lock)

    def release(self, blocks: Blocks[Key, Block]) -> None:
        """Let go of its blocks, which were wanted once; later calls do nothing."""
        if self.once.acquire(blocking=False):
            blocks.release(self.keys)


class Prefetch:
    """Steps on their way, in order. One thread uses it.

    Args:
        plan: plans a step, in any thread, but one at a time. Holds nothing that holds this.
        cached_bytes: bound on decoded blocks; the blocks of one step alone may be more.
        ahead_bytes: bound on batches; one is always on its way, and MOST_STEPS at most.
        threads: threads that read.
        empty: allocates arrays of batches, for several threads at once.
    """

    def __init__(
        self, plan: Plan, cached_bytes: int, ahead_bytes: int, threads: int, empty: Empty
    ) -> None:
        """Start threads when they are first needed."""
        self._plan, self._limit, self._empty = plan, ahead_bytes, empty
        self._read_pool = ThreadPoolExecutor(threads, "stillroom-read")
        self._pack_pool = ThreadPoolExecutor(PACK_THREADS, "stillroom-pack")
        self._plan_pool = ThreadPoolExecutor(1, "stillroom-plan")
        self._blocks: Blocks[Key, Block] = Blocks(_read, _size, self._read_pool, cached_bytes)
        # Held while steps are added or dropped; the first one is taken without it.
        self._lock = RLock()
        self._ahead: deque[tuple[_Coming, Future[Batch]]] = deque()
        # After the last step on its way; None where all are to be dropped.
        self._end: Position | None = None
        self._next: _Coming | None = None
        self._planning: Future[None] | None = None
        self._finalizer = weakref.finalize(
            self, _shut_down, os.getpid(), self._read_pool, self._pack_pool, self._plan_pool
        )

    @property
    def closed(self) -> bool:
        """Whether the threads have ended."""
        return not self._finalizer.alive

    def take(self, at: Position) -> tuple[Batch, Position]:
        """Wait for the step at a position; the one returned is after it. Later steps are planned
        and read while the caller goes on.

        Args:
            at: where to begin if no step is on its way, or another one.

        Raises:
            Exception: whatever planning or reading this step raised. All steps on their way are
                dropped then.
        """
        self.fill(at)
        coming, batch = self._ahead[0]
        try:
            found = batch.result()
        except BaseException as error:
            self.drop()
            if isinstance(error, Exception):
                self._blocks.settle()
            raise
        self._ahead.popleft()
        self._plan_on()
        return found, coming.after

    def fill(self, at: Position) -> None:
        """Have the step at a position on its way. Where it is not yet, later ones are planned too,
        as far ahead as the bounds allow.

        Raises:
            ConfigError: the interpreter ends.
        """
        _check_running()
        if self._ahead and self._begins_at() == at:
            return
        with self._lock:
            try:
                if self._begins_at() != at:
                    self.drop()
                    self._end = at
                if not self._ahead:
                    self._fill()
            except BaseException:
                self.drop()
                raise

    def drop(self) -> None:
        """Forget the steps on their way."""
        with self._lock:
            self._end = self._next = None
            while self._ahead:
                coming, batch = self._ahead[0]
                if batch.cancel():
                    coming.release(self._blocks)
                self._ahead.popleft()

    def forget_all_but(self, feeds: Collection[Feed]) -> None:
        """Forget decoded blocks of feeds that are no longer read."""
        self._blocks.forget(lambda key: key[0] not in feeds)

    def close(self) -> None:
        """Drop all, wait until the threads have ended, and forget all blocks."""
        self.drop()
        self._finalizer()
        for pool in (self._plan_pool, self._pack_pool, self._read_pool):
            pool.shutdown()
        self._blocks.forget(lambda _: True)

    def _begins_at(self) -> Position | None:
        """The position of the step that is taken next, and None where all are to be dropped."""
        return self._ahead[0][0].at if self._ahead and self._end is not None else self._end

    def _plan_on(self) -> None:
        """Plan in the other thread, unless it is about to begin anyway. Threads that call this at
        the same time may have it plan once too often. Where that thread has ended, or cannot start,
        the next take plans."""
        last = self._planning
        if last is None or last.running() or last.done():
            with suppress(RuntimeError):
                self._planning = self._plan_pool.submit(self._fill)

    def _fill(self) -> None:
        """Add steps as far ahead as the bounds allow. What is raised while others are on their way
        is raised again when they are taken, and the step is needed."""
        with self._lock:
            try:
                while self._add():
                    pass
            except Exception:
                if not self._ahead:
                    raise

    def _add(self) -> bool:
        """Have one more step read, unless there is no room or all are dropped."""
        if self._end is None:
            return False
        if self._next is None or self._next.at != self._end:
            step, after = self._plan(self._end)
            self._next = _Coming(self._end, step, after, frozenset(step.keys()), step.bytes())
        if not self._fits(self._next):
            return False
        coming, self._next = self._next, None
        self._blocks.want(coming.keys)
        try:
            batch = self._pack_pool.submit(_pack, coming, self._blocks, self._empty)
        except BaseException:
            coming.release(self._blocks)
            raise
        self._ahead.append((coming, batch))
        self._end = coming.after
        batch.add_done_callback(partial(_plan_again, weakref.ref(self)))
        return True

    def _fits(self, coming: _Coming) -> bool:
        ahead = self._ahead.copy()  # the first may be taken meanwhile
        if not ahead:
            return True
        ready = sum(one.bytes for one, _ in ahead)
        few = len(ahead) < MOST_STEPS and ready + coming.bytes <= self._limit
        return few and self._blocks.fits(coming.keys)


def _plan_again(prefetch: weakref.ref[Prefetch], batch: Future[Batch]) -> None:
    """Plan on where a batch has let go of its blocks, for which later ones may have had no room.
    Called by the thread that packed or dropped it, which may hold locks of the pool of packers: it
    takes those of the planning pool alone."""
    ahead = None if batch.cancelled() else prefetch()
    if ahead is not None and not ahead.closed:
        ahead._plan_on()


def _check_running() -> None:
    if _ENDING.is_set():
        do = "Close streams before the main thread ends."
        raise ConfigError("stream", "a running interpreter", "one that ends", do)


def _read(key: Key) -> Block:
    _check_running()
    feed, block = key
    return feed.reader.read(block)


def _size(key: Key) -> int:
    feed, block = key
    return feed.reader.block_bytes(block)


def _pack(coming: _Coming, blocks: Blocks[Key, Block], empty: Empty) -> Batch:
    """Wait for a step's blocks, and pack its rows."""
    step = coming.step
    try:
        _check_running()
        micro = [_collate(items, blocks, empty) for items in step.micro_batches]
    finally:
        coming.release(blocks)
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
