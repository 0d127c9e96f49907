"""How long a model ran, by its device's own clock: forward and head, without what is made of their
results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class ModelTime:
    """A clock for one model.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        """Start at nothing."""
        self.seconds = 0.0
        """So far; on a GPU as of the last `settle`."""
        self._on_gpu = device.type == "cuda"
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around each call of the model; nothing is waited for."""
        if self._on_gpu:
            make: Callable[..., torch.cuda.Event] = torch.cuda.Event
            start, end = make(enable_timing=True), make(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending.append((start, end))
            return
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun

    def settle(self) -> None:
        """Count what ran on a GPU; to be called where its results have come."""
        self.seconds += sum(start.elapsed_time(end) for start, end in self._pending) / 1000
        self._pending.clear()
