"""Claims: which parts are being sampled or scored at the moment, and by whom.

They save work and nothing else: any number of workers may do the same part, and what one of them
puts first holds. A claim is live while its object is renewed, which takes a worker that gets on. It
is dead once it was not renewed for a minute by the storage's clock, and at once when it belongs to
a process of this machine that is gone. Workers overwrite claims and delete none.
"""

import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from stillroom.cache import jsonfile
from stillroom.cache.clock import Stopwatch, StoreClock
from stillroom.cache.errors import CorruptError, MissingError, StorageError
from stillroom.cache.storage import Storage

FOLDER = "claims"
MAX_BYTES = 64 << 10
RENEW_EVERY_S = 10.0
DEAD_AFTER_S = 60.0
STALLED_AFTER_S = 10 * DEAD_AFTER_S
"""A worker that shows no progress for so long renews its claim no more: it may hang for ever. One
that only was slow costs its part's work twice, so this is longer than a teacher's largest batch
takes, or the put of a shard on a slow line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Who samples or scores a part."""

    part: str
    worker: str
    """Random id of one run of a job."""
    host: str
    machine: str
    """Boot and process namespace: processes of equal machines see one another."""
    pid: int
    process_start: int
    """When the process started, in the machine's own ticks; 0 where that is not known."""
    working: bool
    """False once the worker has let go of the part."""


def claim_path(part: str) -> str:
    """Object of a part's claim."""
    return f"{FOLDER}/{part}.json"


class Claims:
    """The claims of one worker.

    Args:
        storage: the cache's storage.
        stalled_after_s: seconds without a step forward after which a claim is not renewed; None is
            `STALLED_AFTER_S`.
    """

    def __init__(self, storage: Storage, stalled_after_s: float | None = None) -> None:
        """Draw the worker's id; nothing is written."""
        self._storage = storage
        self._stalled_after_s = STALLED_AFTER_S if stalled_after_s is None else stalled_after_s
        self._clock = StoreClock(storage)
        self._warned = False
        self._renewed_at: dict[str, float] = {}
        self.worker = uuid.uuid4().hex

    def in_own_order(self, parts: Iterable[str]) -> list[str]:
        """Parts in an order of this worker's own, so that workers seldom want the same."""
        return sorted(parts, key=lambda part: jsonfile.digest(f"{self.worker} {part}".encode()))

    def take(self, part: str) -> bool:
        """Claim a part, unless another worker's claim is live.

        Two workers that take over a dead claim at the same moment may both get the part, and so
        may those who cannot write claims, which is printed once.
        """
        try:
            return self._take(part)
        except StorageError as error:
            self._warn(part, error)
            return True

    def is_held(self, part: str) -> bool:
        """Whether another worker's claim of a part is live, for those who wait: one request, and
        once a minute another. A claim that cannot be read for trouble holds nothing."""
        try:
            claim = self._read(part)
            return claim is not None and claim.worker != self.worker and self._is_live(part, claim)
        except StorageError as error:
            self._warn(part, error)
            return False

    def _take(self, part: str) -> bool:
        if self._storage.put_new(claim_path(part), self._mine(part)):
            return True
        claim = self._read(part)
        if claim is not None and claim.worker == self.worker:
            return True
        if self._is_live(part, claim):
            return False
        self._storage.put(claim_path(part), self._mine(part))
        claim = self._read(part)
        return claim is not None and claim.worker == self.worker

    @contextmanager
    def renewed(self, part: str) -> Iterator[Callable[[], None]]:
        """Renew a claim that was taken for as long as the block runs and gets on, then let go of
        the part. A claim that another worker has taken over is left to it while it is live.

        Trouble with the claim never fails the block: it is printed, once.

        Yields:
            What to call at each step forward. After `stalled_after_s` without a call the claim is
            not renewed, until the next one.
        """
        work = _Work(self._stalled_after_s)
        thread = threading.Thread(target=self._renew, args=(part, work), daemon=True)
        thread.start()
        try:
            yield work.progress
        finally:
            work.ended.set()
            thread.join()
            self._put(part, working=False)

    def _renew(self, part: str, work: "_Work") -> None:
        while not work.ended.wait(RENEW_EVERY_S):
            if work.stalled():
                self._warn(part, f"nothing came of it for {self._stalled_after_s:.0f} s")
            else:
                self._put(part)

    def _put(self, part: str, *, working: bool = True) -> None:
        try:
            claim = self._read(part)
            mine = claim is None or claim.worker == self.worker
            if mine or not self._is_live(part, claim):
                self._storage.put(claim_path(part), self._mine(part, working=working))
        except StorageError as error:
            self._warn(part, error)

    def _warn(self, part: str, why: StorageError | str) -> None:
        if not self._warned:
            print(f"  warning: others may do {part} too: {why}", file=sys.stderr, flush=True)
        self._warned = True

    def _mine(self, part: str, *, working: bool = True) -> bytes:
        claim = replace(_this_process(), part=part, worker=self.worker, working=working)
        return jsonfile.dump_sealed(asdict(claim))

    def _is_live(self, part: str, claim: Claim | None) -> bool:
        if claim is not None and not (claim.working and may_run(claim)):
            return False
        if claim is not None and self._is_young(part):
            return True
        entry = self._storage.entry(claim_path(part))
        if entry is None:
            return False
        self._renewed_at[part] = entry.modified
        if entry.modified - self._clock.now() >= DEAD_AFTER_S:
            self._clock = StoreClock(self._storage)  # it may have been set since it was asked
        return self._is_young(part)

    def _is_young(self, part: str) -> bool:
        """Whether a claim cannot be dead, as far as this worker knows when it was renewed. One from
        the future is as old as one from the past: the clock was set back since."""
        renewed_at = self._renewed_at.get(part)
        return renewed_at is not None and abs(self._clock.now() - renewed_at) < DEAD_AFTER_S

    def _read(self, part: str) -> Claim | None:
        """The claim; None where there is none or it cannot be understood: then its age decides."""
        path = claim_path(part)
        try:
            value = jsonfile.load_sealed(self._storage.get(path, MAX_BYTES), path)
            claim: Claim = jsonfile.build(Claim, value, path)
        except (CorruptError, MissingError):
            return None
        return claim


class _Work:
    """The work on one part: whether it has ended, and when it last got on."""

    def __init__(self, stalled_after_s: float) -> None:
        self.ended = threading.Event()
        self._stalled_after_s = stalled_after_s
        self._since = Stopwatch()

    def progress(self) -> None:
        """Note a step forward."""
        self._since = Stopwatch()

    def stalled(self) -> bool:
        """Whether nothing came for so long that nothing may come any more."""
        return self._since.elapsed_s() > self._stalled_after_s


def may_run(claim: Claim) -> bool:
    """Whether the claim's process may be running: always, if it is not of this machine."""
    here = _this_process()
    if (claim.host, claim.machine) != (here.host, here.machine):
        return True
    try:
        os.kill(claim.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    start = _process_start(claim.pid)
    return start is None or start == claim.process_start


def _process_start(pid: int) -> int | None:
    """Start of a process in ticks since boot; -1 if it ended, None if this system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def _this_process() -> Claim:
    """A claim of nothing by this process."""
    pid = os.getpid()
    return Claim(
        part="",
        worker="",
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        process_start=_process_start(pid) or 0,
        working=True,
    )


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
