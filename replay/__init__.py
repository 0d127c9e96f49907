"""Reading a cache in a reproducible order, and keeping it fresh."""

from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.plan import Plan
from stillroom.replay.stream import ReplayConfig, ReplayStream

__all__ = ["Batch", "MicroBatch", "Plan", "ReplayConfig", "ReplayStream"]
