"""What a cell's training takes, measurements left out: wall time, and CPU time of its process and
of those that it started and that ended."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """A stopwatch that stands until it is started."""

    def __init__(self) -> None:
        """At zero."""
        self.wall_s = self.cpu_s = 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """Go on."""
        self._since = _now()

    def stop(self) -> None:
        """Stand, if it goes."""
        if self._since is not None:
            wall, cpu = _now()
            self.wall_s += wall - self._since[0]
            self.cpu_s += cpu - self._since[1]
            self._since = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Go for the length of a block."""
        self.start()
        yield
        self.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand for the length of a block."""
        self.stop()
        yield
        self.start()


def _now() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), sum(times[:4])
