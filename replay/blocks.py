"""Decoded blocks, read by threads ahead of need, in a bounded number of bytes.

Who will need blocks says so (`want`), waits for each (`get`), and lets go of all (`release`).
Blocks that nobody wants any longer stay, the latest used longest, while there is room.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Block = TypeVar("Block")


@dataclass(slots=True)
class _Held(Generic[Block]):
    block: Future[Block]
    bytes: int
    users: int = 0


class Blocks(Generic[Key, Block]):
    """A cache of blocks.

    Args:
        read: reads a block; called in a thread.
        size: bytes of a block, known before it is read.
        pool: where blocks are read, in the order in which they were wanted.
        limit: bytes of blocks, those in use and those that are kept. What is in use may be more;
            then nothing else is kept.
    """

    def __init__(
        self,
        read: Callable[[Key], Block],
        size: Callable[[Key], int],
        pool: ThreadPoolExecutor,
        limit: int,
    ) -> None:
        """Hold nothing."""
        self._read, self._size, self._pool, self._limit = read, size, pool, limit
        self._held: OrderedDict[Key, _Held[Block]] = OrderedDict()
        self._bytes = self._in_use = 0
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Bytes of all blocks that are held or on their way."""
        return self._bytes

    def fits(self, keys: Collection[Key]) -> bool:
        """Whether blocks can be wanted too: no more than the limit will be in use, or nothing is
        yet."""
        with self._lock:
            idle = [k for k in keys if k not in self._held or not self._held[k].users]
            return not self._in_use or self._in_use + sum(map(self._size, idle)) <= self._limit

    def want(self, keys: Collection[Key]) -> None:
        """Keep blocks until they are released; those that are not here are read. None is kept if
        that cannot be asked for."""
        wanted: list[Key] = []
        with self._lock:
            try:
                for key in keys:
                    self._want(key)
                    wanted.append(key)
            except BaseException:
                self._release(wanted)
                raise
            self._shrink()

    def get(self, key: Key) -> Block:
        """Wait for a block that is wanted.

        Raises:
            Exception: whatever reading it raised.
        """
        with self._lock:
            block = self._held[key].block
        return block.result()

    def release(self, keys: Collection[Key]) -> None:
        """Let go of blocks. One whose reading has not begun is not read."""
        with self._lock:
            self._release(keys)

    def forget(self, unneeded: Callable[[Key], bool]) -> None:
        """Forget blocks that nobody wants, of those for which `unneeded` is true."""
        with self._lock:
            for key in [k for k, held in self._held.items() if not held.users and unneeded(k)]:
                if self._held[key].block.done():
                    self._forget(key)

    def settle(self) -> None:
        """Wait until no block is being read, so that the next one wanted is read from then on."""
        with self._lock:
            blocks = [held.block for held in self._held.values()]
        wait(blocks)

    def _want(self, key: Key) -> None:
        held = self._held.get(key)
        if held is None:
            held = _Held(self._pool.submit(self._read, key), self._size(key))
            self._held[key] = held
            self._bytes += held.bytes
        elif _failed(held.block):
            held.block = self._pool.submit(self._read, key)
        if not held.users:
            self._in_use += held.bytes
        held.users += 1
        self._held.move_to_end(key)

    def _release(self, keys: Collection[Key]) -> None:
        for key in keys:
            held = self._held[key]
            held.users -= 1
            if not held.users:
                self._in_use -= held.bytes
                if held.block.cancel():
                    self._forget(key)
        self._shrink()

    def _shrink(self) -> None:
        if self._bytes <= self._limit:
            return
        for key in [k for k, held in self._held.items() if not held.users and held.block.done()]:
            self._forget(key)
            if self._bytes <= self._limit:
                return

    def _forget(self, key: Key) -> None:
        self._bytes -= self._held.pop(key).bytes


def _failed(block: Future[Block]) -> bool:
    return block.done() and block.exception() is not None
