"""What `doctor` finds: one line for each thing that it tried."""

from dataclasses import dataclass, field
from typing import Literal

from stillroom.cache.errors import StillroomError

Level = Literal["ok", "warning", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    level: Level
    """ok; warning (a job runs, but something is slow, short or left over); bad (a job fails)."""
    what: str
    """What was tried."""
    got: str
    """What came of it."""
    do: str = ""
    """What to do about it; empty if nothing."""
    figures: dict[str, float] = field(default_factory=dict)
    """What was measured, by name and unit."""


def failed(what: str, error: StillroomError) -> Finding:
    """What an error found."""
    got = f"{error.where}: expected {error.expected}; got {error.got}"
    return Finding(level="bad", what=what, got=got, do=error.do)
