"""Reading a cache in a reproducible order, and keeping it fresh."""

from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.plan import Plan
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream

__all__ = [
    "Batch",
    "MicroBatch",
    "Plan",
    "ReplayStream",
    "RowFilter",
    "Source",
    "StreamConfig",
]
