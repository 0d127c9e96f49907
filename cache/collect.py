"""Collection of rubbish (`gc`): planned by looking, then removed so that nobody who reads or writes
at the same time loses anything.

It may be killed at any point, run again, and run twice at once. Every removal is checked once more
right before it happens: an attempt against its part's commits, a shard against the pins, which are
read after its tombstone was put (see `tombstones`).
"""

import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from stillroom.cache.attempt import COMMIT_WITHIN_S
from stillroom.cache.clock import DAY_S, Stopwatch, StoreClock
from stillroom.cache.errors import MissingError, StorageError
from stillroom.cache.pins import pinned_shards, read_pin
from stillroom.cache.progress import Progress
from stillroom.cache.rubbish import Kept, Rubbish, find_rubbish
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.survey import commits_of, survey
from stillroom.cache.tombstones import put_tombstone, tombstone_path

MIN_AGE_S = DAY_S


@dataclass(slots=True)
class Collection:
    """What there is to remove, or what was removed."""

    rubbish: list[Rubbish] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    """What would be rubbish but for one thing."""

    @property
    def objects(self) -> int:
        """Objects of the rubbish."""
        return sum(len(item.paths) for item in self.rubbish)

    @property
    def size_bytes(self) -> int:
        """Bytes of the rubbish."""
        return sum(item.size_bytes for item in self.rubbish)


def plan_collection(
    cache: Cache, *, clock: Callable[[], float] | None = None, min_age_s: float = MIN_AGE_S
) -> Collection:
    """Find out what may be removed; nothing is changed.

    Args:
        cache: the cache.
        clock: seconds since the epoch; None takes the storage's own clock.
        min_age_s: what is younger stays.

    Raises:
        CorruptError: a pin cannot be read, so nobody knows what it keeps; names it.
    """
    now = cache.storage.now() if clock is None else clock()
    plan = Collection()
    for found in find_rubbish(survey(cache.storage, now, min_age_s)):
        if isinstance(found, Kept):
            plan.kept.append(found)
        else:
            plan.rubbish.append(found)
    return plan


def collect(
    cache: Cache, plan: Collection, *, clock: Callable[[], float] | None = None
) -> Collection:
    """Remove what was planned, after checking it once more.

    Args:
        cache: the cache.
        plan: made by `plan_collection`, not necessarily just now.
        clock: seconds since the epoch; None takes the storage's own clock.

    Returns:
        What was removed, and what was kept after all.

    Raises:
        StorageError: something could not be removed. Run it again: nothing is lost.
    """
    with Progress("remove", plan.objects, "objects") as progress:
        collector = _Collector(cache.storage, clock or StoreClock(cache.storage).now, progress)
        by_kind: dict[str, list[Rubbish]] = defaultdict(list)
        for item in plan.rubbish:
            by_kind[item.kind].append(item)
        collector.remove_attempts(by_kind.pop("attempt", []))
        collector.remove_shards(by_kind.pop("shard", []), by_kind.pop("rollouts", []))
        collector.remove_pins(by_kind.pop("pin", []))
        for items in by_kind.values():
            for item in items:
                collector.remove(item)
    return collector.done


class _Collector:
    """One run of `gc`; its id is that of its tombstones."""

    def __init__(self, storage: Storage, clock: Callable[[], float], progress: Progress) -> None:
        self._storage, self._clock, self._progress = storage, clock, progress
        self._id = uuid.uuid4().hex
        self.done = Collection()

    def remove(self, item: Rubbish) -> None:
        delete = self._storage.delete
        if item.kind == "temporary":
            delete = self._storage.delete_temporary
        for path in item.paths:
            delete(path)
            self._progress.advance()
        self.done.rubbish.append(item)

    def remove_attempts(self, items: list[Rubbish]) -> None:
        """Attempts that no commit names, by commits that are read after they were found."""
        commits, unreadable = commits_of(self._storage, {str(item.part) for item in items})
        for item in items:
            part, attempt = str(item.part), item.paths[0].split("/")[2]
            committed = {commit.attempt for commit in commits.get(part, {}).values()}
            if part in unreadable or attempt in committed:
                self._keep(item, unreadable.get(part, "committed meanwhile"))
            else:
                self.remove(item)

    def remove_shards(self, shards: list[Rubbish], rollouts: list[Rubbish]) -> None:
        """Bytes of commits: tombstones first, then a look at the pins, then the bytes."""
        since = Stopwatch()
        for item in shards:
            put_tombstone(self._storage, str(item.part), int(item.n or 0), self._id)
        pinned = pinned_shards(self._storage, self._clock())
        used = {part for part, _ in pinned.by_run}
        for item in shards:
            keeper = pinned.keeper((str(item.part), int(item.n or 0)))
            if keeper is not None:
                self._storage.delete(tombstone_path(str(item.part), int(item.n or 0), self._id))
                self._keep(item, keeper)
                continue
            self._check_time(since)
            self.remove(item)
        for item in rollouts:
            if item.part in used or pinned.unknown:
                self._keep(item, pinned.unknown or "pinned meanwhile")
            else:
                self.remove(item)

    def remove_pins(self, items: list[Rubbish]) -> None:
        """Pins that nobody renewed since they were found."""
        for item in items:
            with suppress(MissingError):
                if read_pin(self._storage, item.paths[0]).expires > self._clock():
                    self._keep(item, "renewed meanwhile")
                else:
                    self.remove(item)

    def _keep(self, item: Rubbish, why: str) -> None:
        self._progress.advance(len(item.paths))
        self.done.kept.append(Kept(", ".join(item.paths), why))

    def _check_time(self, since: Stopwatch) -> None:
        """Stop long before another run may take our tombstones for those of a dead one."""
        if since.elapsed_s() > COMMIT_WITHIN_S:
            got = f"{since.elapsed_s():,.0f} s since its tombstones were put"
            do = "Run it again; nothing is lost."
            raise StorageError("gc", f"at most {COMMIT_WITHIN_S:,.0f} s", got, do)
