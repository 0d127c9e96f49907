"""Where the segments of a packed micro-batch lie on its device, and which tokens see which."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from stillroom.cache.errors import ShapeError
from stillroom.replay.pinned import on_device


class Span(NamedTuple):
    """Tokens start to stop, which also see those from prefix_start to prefix_stop."""

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Where the segments of a micro-batch lie; made once, and used by every layer."""

    spans: tuple[Span, ...]
    """Without empty ones."""
    edge: torch.Tensor
    """(R + 1,) int32, first token of each segment, then T; on the device."""
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    """Those that were needed so far, by prefix, length and window in tokens."""

    @classmethod
    def of(cls, row_start: np.ndarray, prefix: np.ndarray, device: torch.device) -> "Segments":
        """Segments of a `MicroBatch` with these arrays.

        Raises:
            ShapeError: a prefix is not an earlier segment without a prefix.
        """
        bounds = list(pairwise(row_start.tolist()))
        spans = []
        for i, (start, stop) in enumerate(bounds):
            before = int(prefix[i])
            if before >= i or (before >= 0 and prefix[before] >= 0):
                expected, got = "an earlier segment that has none itself", f"segment {before}"
                do = "Make micro-batches with replay.batch.collate."
                raise ShapeError(f"prefix of segment {i}", expected, got, do)
            if start < stop:
                spans.append(
                    Span(start, stop, *(bounds[before] if before >= 0 else (start, start)))
                )
        return cls(tuple(spans), on_device(row_start, device))

    @property
    def shares(self) -> bool:
        """Whether any segment has a prefix."""
        return any(span.prefix_start < span.prefix_stop for span in self.spans)

    @property
    def longest(self) -> int:
        """Tokens of the longest segment, without its prefix."""
        return max(span.stop - span.start for span in self.spans)

    def mask(self, prefix: int, length: int, window: int | None) -> torch.Tensor | None:
        """(length, prefix + length) bool, true where a token sees another; None for plain causal.

        Args:
            prefix: tokens before the segment that it sees.
            length: tokens of the segment.
            window: tokens that a query sees, itself included; None for all before it.
        """
        if not prefix and (window is None or length <= window):
            return None
        key = (prefix, length, window)
        if key not in self.masks:
            device = self.edge.device
            own = torch.arange(prefix, prefix + length, device=device)[:, None]
            distance = own - torch.arange(prefix + length, device=device)
            seen = distance >= 0
            self.masks[key] = seen if window is None else seen & (distance < window)
        return self.masks[key]
