"""Ending a job from outside: SIGTERM, which clusters send, does what Ctrl-C does."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ends_when_told() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, once, so that what is claimed is let go
    before the process ends. For the main thread.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGINT came.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
