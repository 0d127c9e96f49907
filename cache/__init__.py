"""The store of teacher scores, and the job that fills it."""

from stillroom.cache.errors import StillroomError
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache

__all__ = ["Cache", "Identity", "Snapshot", "StillroomError", "TeacherId"]
