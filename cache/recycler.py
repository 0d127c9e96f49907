"""Arrays in memory that earlier ones no longer use: the system clears every page that it gives, and
that takes as long as decoding into it."""

import sys
from collections import deque
from collections.abc import Callable
from math import prod
from threading import Lock
from typing import Any

import numpy as np

Empty = Callable[[tuple[int, ...], Any], np.ndarray]
"""Makes an array of a shape and a dtype whose values will be written, as np.empty does."""
LEAST_BYTES = 1 << 16
"""Smaller arrays come from np.empty, which has such memory at hand."""
LOOK_AT = 32
"""Buffers that are looked at before a new one is made; those handed out longest ago come first."""


class Recycler:
    """Makes arrays as np.empty does, in buffers that no array refers to any more. Threads may share
    it.

    Args:
        limit: bytes of buffers beyond which free ones are let go for new ones. Where those in use
            take more, free ones are looked for after each sixteenth of it.
    """

    def __init__(self, limit: int) -> None:
        """Hold nothing."""
        self._limit, self._bytes = limit, 0
        self._let_go_beyond = limit
        self._buffers: dict[int, deque[np.ndarray]] = {}
        self._lock = Lock()
        self._free = _references(deque([np.empty(0, np.uint8)]))

    @property
    def bytes(self) -> int:
        """Of all buffers, in use or not."""
        return self._bytes

    def empty(self, shape: tuple[int, ...] | int, dtype: Any) -> np.ndarray:
        """An array whose values are arbitrary."""
        shape, dtype = (shape,) if isinstance(shape, int) else shape, np.dtype(dtype)
        size = prod(shape) * dtype.itemsize
        if size < LEAST_BYTES:
            return np.empty(shape, dtype)
        with self._lock:
            array: np.ndarray = self._take(_rounded(size))[:size].view(dtype).reshape(shape)
            return array

    def clear(self) -> None:
        """Let go of all buffers; those in use last as long as their arrays."""
        with self._lock:
            self._buffers.clear()
            self._bytes, self._let_go_beyond = 0, self._limit

    def _take(self, size: int) -> np.ndarray:
        buffers = self._buffers.setdefault(size, deque())
        for _ in range(min(LOOK_AT, len(buffers))):
            buffers.rotate(-1)
            if _references(buffers) == self._free:
                return buffers[-1]
        if self._bytes + size > self._let_go_beyond:
            self._let_go(size)
        buffers.append(np.empty(size, np.uint8))
        self._bytes += size
        return buffers[-1]

    def _let_go(self, needed: int) -> None:
        """Let go of free buffers until a new one fits."""
        self._let_go_beyond = self._limit
        for size, buffers in self._buffers.items():
            for _ in range(len(buffers)):
                if self._bytes + needed <= self._limit:
                    return
                buffers.rotate(-1)
                if _references(buffers) == self._free:
                    buffers.pop()
                    self._bytes -= size
        if self._bytes + needed > self._limit:
            self._let_go_beyond = self._bytes + needed + self._limit // 16


def _references(buffers: deque[np.ndarray]) -> int:
    """References to the last buffer."""
    return sys.getrefcount(buffers[-1])


def _rounded(size: int) -> int:
    """Sizes up to an eighth apart share buffers."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step
