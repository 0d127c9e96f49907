"""What `doctor` does to a storage: puts that must be refused, overwriting, deleting, the clocks,
and how long it all takes. What it puts it deletes again."""

import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from stillroom.cache.errors import StillroomError
from stillroom.cache.storage import Storage
from stillroom.tools.doctor_finding import Finding, Level, failed

RACERS = 4
SMALL_BYTES = 1024
SMALL_OBJECTS = 8
LONGEST_S = 10.0
"""After so long no further small object is tried."""
SLOW_MS, SLOW_MB_S = 1000.0, 5.0
SKEW_S, REFUSED_SKEW_S = 60.0, 900.0
"""S3 refuses requests of clocks that are further off than the second."""


class Trial:
    """Objects below `probe/` that are put for a trial, and removed after it.

    Args:
        storage: the one to try.
    """

    def __init__(self, storage: Storage) -> None:
        """Put nothing yet."""
        self.storage = storage
        self.clock_offset_s = 0.0
        """The store's clock less this machine's, as far as it is known."""
        self._keys: list[str] = []

    def run(self, size_bytes: int) -> list[Finding]:
        """Everything in turn; without the right to write, nothing but the first. What was put is
        deleted also where it is interrupted.

        Args:
            size_bytes: of the large object that is timed.
        """
        found: list[Finding] = []
        try:
            found += self._tries(size_bytes)
        except StillroomError as error:
            found.append(failed("writing", error))
        finally:
            if self._keys:
                found.append(self._deletes())
        return found

    def _tries(self, size_bytes: int) -> list[Finding]:
        first = self._refuses()
        if first.level == "bad":
            return [first]
        return [
            first,
            self._overwrites(),
            self._clock(),
            *self._small(),
            self._large(size_bytes),
        ]

    def _key(self) -> str:
        self._keys.append(f"probe/{uuid.uuid4().hex}")
        return self._keys[-1]

    def _refuses(self) -> Finding:
        what, key = "put if absent", self._key()
        try:
            self.storage.probe(key)
        except StillroomError as error:
            return failed(what, error)
        raced = self._key()
        with ThreadPoolExecutor(RACERS) as pool:
            puts = [pool.submit(self.storage.put_new, raced, b"%d" % i) for i in range(RACERS)]
        won = sum(put.result() for put in puts)
        if won > 1:
            got = f"{won} of {RACERS} puts of one key at the same time were accepted"
            do = "This storage ignores conditional puts: use another one."
            return Finding(level="bad", what=what, got=got, do=do)
        return Finding(level="ok", what=what, got="a second put of a key is refused")

    def _overwrites(self) -> Finding:
        what, key = "overwriting, for claims and pins", self._key()
        self.storage.put(key, b"first")
        self.storage.put(key, b"second")
        if (found := self.storage.get(key)) != b"second":
            do = "The storage is not consistent: use another one."
            return Finding(level="bad", what=what, got=f"{found!r}", do=do)
        return Finding(level="ok", what=what, got="the last put is what is read")

    def _clock(self) -> Finding:
        key = self._key()
        before = time.time()
        self.storage.put_new(key, b"now")
        after, entry = time.time(), self.storage.entry(key)
        if entry is None:
            do = "The storage is not consistent: use another one."
            return Finding(level="bad", what="clock", got="a new object is not there", do=do)
        self.clock_offset_s = entry.modified - (before + after) / 2
        got = f"the store's is {round(self.clock_offset_s):+d} s from this machine's"
        apart = abs(self.clock_offset_s)
        figures = {"clock_offset_s": self.clock_offset_s}
        level: Level = "ok"
        if apart > SKEW_S:
            level = "bad" if apart > REFUSED_SKEW_S and not self.storage.is_local else "warning"
        do = "" if level == "ok" else "Set this machine's clock by a time server."
        return Finding(level=level, what="clock", got=got, do=do, figures=figures)

    def _small(self) -> list[Finding]:
        keys, data = [self._key() for _ in range(SMALL_OBJECTS)], os.urandom(SMALL_BYTES)
        timed = {
            "put": _timed([partial(self.storage.put_new, key, data) for key in keys]),
            "get": _timed([partial(self.storage.get, key) for key in keys]),
            "list": _timed([partial(self.storage.list, "probe")] * 3),
        }
        found = []
        for name, milliseconds in timed.items():
            slow = milliseconds > SLOW_MS
            do = "Run nearer to the storage, or make fewer, larger parts." if slow else ""
            found.append(
                Finding(
                    level="warning" if slow else "ok",
                    what=f"time of a {name}",
                    got=f"{milliseconds:,.1f} ms",
                    do=do,
                    figures={f"{name}_ms": milliseconds},
                )
            )
        return found

    def _large(self, size_bytes: int) -> Finding:
        what, key, data = "speed", self._key(), os.urandom(size_bytes)
        start = time.perf_counter()
        self.storage.put_new(key, data)
        middle = time.perf_counter()
        same = self.storage.get(key) == data
        end = time.perf_counter()
        if not same:
            do = "The storage changes what it is given: use another one."
            return Finding(level="bad", what=what, got="other bytes than were written", do=do)
        written, read = (size_bytes / 1e6 / s for s in (middle - start, end - middle))
        near = ", from this machine's memory perhaps" if self.storage.is_local else ""
        slow = min(written, read) < SLOW_MB_S
        return Finding(
            level="warning" if slow else "ok",
            what=what,
            got=f"{written:,.0f} MB/s written, {read:,.0f} MB/s read{near}",
            do="Run nearer to the storage." if slow else "",
            figures={"write_mb_s": written, "read_mb_s": read},
        )

    def _deletes(self) -> Finding:
        what = "deleting, for gc"
        refused: list[StillroomError] = []
        for key in self._keys:
            try:
                self.storage.delete(key)
            except StillroomError as error:
                refused.append(error)
        if refused:
            left = f"{len(refused)} objects below probe/ stay: {refused[0].got}"
            do = "Only 'stillroom gc' needs the right to delete; it removes them too."
            return Finding(level="warning", what=what, got=left, do=do)
        return Finding(level="ok", what=what, got="what was tried is removed again")


def _timed(calls: list[Callable[[], object]]) -> float:
    """Milliseconds of a call, the mean over those that are tried in time."""
    start, done = time.perf_counter(), 0
    for call in calls:
        call()
        done += 1
        if time.perf_counter() - start > LONGEST_S:
            break
    return 1000 * (time.perf_counter() - start) / done
