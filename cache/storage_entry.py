"""`Entry`: one object of a listing, and which names of objects are ours."""

import re
from dataclasses import dataclass, field

NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
SAFE_NAME = re.compile(NAME)
SAFE_PATH = re.compile(rf"{NAME}(/{NAME})*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    path: str
    """Relative to the root."""
    size_bytes: int
    modified: float = field(compare=False)
    """When it was last written, in seconds since the epoch by the store's own clock."""


def is_ours(name: str) -> bool:
    """Whether a file's or folder's name is one that we may have given."""
    return SAFE_NAME.fullmatch(name) is not None
