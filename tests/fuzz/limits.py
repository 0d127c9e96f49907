"""Bounds on what reading may cost: beyond them the process has no memory, or ends."""

import resource
import signal
from pathlib import Path

CPU_S = 5.0
"""Processor time that one input may take."""
FREE_BYTES, TIMES = 64 << 20, 50
"""Memory that one input may take: so much, and so many times its own bytes."""
PAGE_BYTES = resource.getpagesize()


class Limits:
    """Bounds on memory and time while one input is read."""

    def __init__(self, size: int) -> None:
        """Bounds for so many bytes."""
        self._most = FREE_BYTES + TIMES * size

    def __enter__(self) -> None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (held + self._most, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_S)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
