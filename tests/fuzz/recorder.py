"""The bytes that a process is reading, where they outlive it."""

import mmap
from pathlib import Path

from tests.fuzz.mutate import MAX_BYTES

HEAD_BYTES = 8


class Recorder:
    """The bytes that are being read, in a file that outlives the process.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Make room for the longest input."""
        with path.open("wb+") as file:
            file.truncate(HEAD_BYTES + MAX_BYTES)
            self._map = mmap.mmap(file.fileno(), HEAD_BYTES + MAX_BYTES)

    def record(self, data: bytes) -> None:
        """Write what is read next."""
        self._map[:HEAD_BYTES] = len(data).to_bytes(HEAD_BYTES, "little")
        self._map[HEAD_BYTES : HEAD_BYTES + len(data)] = data


def recorded(path: Path) -> bytes:
    """What a process read when it ended."""
    whole = path.read_bytes()
    return whole[HEAD_BYTES : HEAD_BYTES + int.from_bytes(whole[:HEAD_BYTES], "little")]
