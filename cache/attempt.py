"""Attempts: one try at a part's shard, where its objects go, and how long it may be committed.

`gc` removes an uncommitted attempt that is 24 hours old by the storage's clock. So that it never
meets a scorer that is about to commit, scorers commit within 6 hours of an attempt's first byte,
however long the machine slept, and otherwise start the attempt again.
"""

import re
import uuid

from stillroom.cache.clock import HOUR_S, Stopwatch

COMMIT_WITHIN_S = 6 * HOUR_S
NAME = re.compile(r"[0-9a-f]{32}")


class Attempt:
    """A new attempt; make it right before its first byte is put.

    Args:
        part: the part.
        commit_within_s: seconds from now on in which it may be committed.
    """

    def __init__(self, part: str, commit_within_s: float = COMMIT_WITHIN_S) -> None:
        """Draw its id, and start its clock."""
        self.part = part
        self.id = uuid.uuid4().hex
        """32 random hexadecimal digits."""
        self._within_s = commit_within_s
        self._clock = Stopwatch()

    @property
    def path(self) -> str:
        """Folder of its objects."""
        return f"scores/{self.part}/{self.id}"

    def expired(self) -> bool:
        """Whether it must not be committed any more, and has to be started again."""
        return self._clock.elapsed_s() > self._within_s
