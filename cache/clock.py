"""Clocks: time that counts while the machine sleeps, and the storage's own time."""

import time

from stillroom.cache.storage import Storage

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Stopwatch:
    """Seconds since it was made, suspended time included.

    It goes by the larger of two clocks: the one since boot, which counts suspended time where there
    is such a clock, and the wall clock, which may be set back but counts everywhere.
    """

    def __init__(self) -> None:
        """Start."""
        self._steady, self._wall = time.clock_gettime(_STEADY), time.time()

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return max(time.clock_gettime(_STEADY) - self._steady, time.time() - self._wall)


class StoreClock:
    """The storage's own time: asked once, then counted on here by the clock since boot.

    The wall clock has no say in it: set forward, it would make live claims look dead and young
    objects old. A clock that does not count suspended time only makes things look younger.

    Args:
        storage: whose time; asked at the first call.
    """

    def __init__(self, storage: Storage) -> None:
        """Ask nothing yet."""
        self._storage = storage
        self._offset: float | None = None

    def now(self) -> float:
        """Seconds since the epoch by the storage's clock."""
        if self._offset is None:
            self._offset = self._storage.now() - time.clock_gettime(_STEADY)
        return self._offset + time.clock_gettime(_STEADY)
