"""Made-up caches whose objects have ages, and by brute force what of them may be removed.

An object's age is in hours. No shard holds anything: `gc` reads commits and snapshots only.
"""

import os
import time
import uuid
from dataclasses import dataclass, field

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.claims import claim_path
from stillroom.cache.commits import Commit, commit_path, encode_row_table
from stillroom.cache.quarantine import quarantine_path
from stillroom.cache.snapshot import Snapshot, snapshot_path
from stillroom.cache.snapshot_file import encode_commits
from stillroom.cache.store import Cache
from tests.cache.fakes import make_meta

SIZES = {"manifest.json": 10, "shard.zarr.zip": 20}


@dataclass(frozen=True, slots=True)
class Made:
    """One commit of a part."""

    aside: float | None = None
    """Hours since it was put into quarantine; None is not in quarantine."""
    objects: tuple[str, ...] = tuple(SIZES)
    """Objects of its attempt that are there."""
    tombstone: float | None = None
    """Hours since a `gc` that died put one."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part."""

    commits: tuple[Made, ...] = ()
    """By n; all but the last must be in quarantine."""
    strays: tuple[tuple[float, ...], ...] = ()
    """Attempts that were not committed: ages of their objects."""
    whole: bool = False
    """Whether the first object of each of those is a manifest."""
    retired: float | None = None
    """Hours since it was retired; None is not retired."""
    rollouts: bool = True
    claim: float | None = None
    """Hours since its claim was renewed; None is no claim."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin and its snapshot."""

    shards: tuple[tuple[int, int], ...]
    """Numbers of parts, and n."""
    expires: float
    """Hours from now; negative where it has expired."""


@dataclass(slots=True)
class AgedCache:
    """A cache of such parts, and what was put into it (see `make_aged`)."""

    cache: Cache
    parts: tuple[Part, ...]
    pins: tuple[Pinned, ...] = ()
    commits: dict[tuple[int, int], Commit] = field(default_factory=dict)
    """By part's number and n."""
    hours: dict[str, float] = field(default_factory=dict)
    """Age by path."""

    def put_all(self) -> None:
        """Put parts and pins, and an old and a new one of what dead processes leave."""
        for number, part in enumerate(self.parts):
            self._put_part(number, part)
        for number, pinned in enumerate(self.pins):
            self._put_pin(f"run-{number}", pinned)
        for age in (1, 30):
            self._put(f"probe/{uuid.uuid4().hex}", age)
            self._put(f"scores/.{uuid.uuid4().hex}.tmp", age)

    def name(self, number: int) -> str:
        """Name of a part."""
        return make_meta(number).name

    def files(self) -> set[str]:
        """Paths of all files."""
        root = self.cache.storage.folder
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def kept(self, shard: tuple[int, int]) -> bool:
        """Whether an active pin names a commit."""
        return any(pinned.expires > 0 and shard in pinned.shards for pinned in self.pins)

    def may_go(self, path: str) -> bool:
        """Whether an object is rubbish, by the rules."""
        folder, age = path.split("/")[0], self.hours.get(path, 0)
        if folder == "scores" and path.endswith(".tmp"):
            return age >= 24
        if folder == "probe":
            return age >= 24
        if folder == "pins":
            return self.pins[int(path.removesuffix(".json").split("-")[1])].expires <= -24
        number = self._number(path)
        if number is None:
            return False
        part = self.parts[number]
        retired = part.retired is not None and part.retired >= 24
        live = bool(part.commits) and part.commits[-1].aside is None
        if folder == "claims":
            return age >= 24 or (live and age * 3600 >= 60)
        if folder == "rollouts":
            return retired and not any(self.kept((number, n)) for n in range(len(part.commits)))
        if folder == "removed":
            return self._stale_tombstone(number, path)
        return folder == "scores" and self._may_go_attempt(number, path, retired, live)

    def _may_go_attempt(self, number: int, path: str, retired: bool, live: bool) -> bool:
        attempt, part = path.split("/")[2], self.parts[number]
        for n, made in enumerate(part.commits):
            if self.commits[number, n].attempt == attempt:
                replaced = made.aside is not None and made.aside >= 24 and live
                return (retired or replaced) and not self.kept((number, n))
        wanted = not (live or retired)
        if part.whole and (wanted or not self.commits):
            return False
        mates = [p for p in self.hours if p.startswith(f"scores/{self.name(number)}/{attempt}/")]
        return all(self.hours[mate] >= 24 for mate in mates)

    def _stale_tombstone(self, number: int, path: str) -> bool:
        part, n = self.parts[number], int(path.split(".")[1])
        made = part.commits[n]
        live = part.commits[-1].aside is None
        out = (part.retired or 0) >= 24 or ((made.aside or 0) >= 24 and live)
        whole = set(made.objects) == set(SIZES)
        return self.kept((number, n)) and out and whole and self.hours[path] >= 24

    def _number(self, path: str) -> int | None:
        named = (i for i in range(len(self.parts)) if self.name(i) in path)
        return next(named, None)

    def _put_part(self, number: int, part: Part) -> None:
        name = self.name(number)
        if part.rollouts:
            self._put(f"rollouts/{name}.parquet", 1000)
        if part.retired is not None:
            self._put(f"retired/{name}.json", part.retired)
        if part.claim is not None:
            self._put(claim_path(name), part.claim)
        for n, made in enumerate(part.commits):
            self._put_commit(number, n, made)
        for ages in part.strays:
            attempt = uuid.uuid4().hex
            for i, age in enumerate(ages):
                item = "manifest.json" if part.whole and not i else f"object{i}"
                self._put(f"scores/{name}/{attempt}/{item}", age)

    def _put_commit(self, number: int, n: int, made: Made) -> None:
        name = self.name(number)
        commit = self.commits[number, n] = made_up_commit(name, n)
        self._put(commit_path(name, n), 900, commit.to_json())
        for item in made.objects:
            self._put(f"scores/{name}/{commit.attempt}/{item}", 900, b"x" * SIZES[item])
        if made.aside is not None:
            self._put(quarantine_path(name, n), made.aside)
        if made.tombstone is not None:
            self._put(f"removed/{name}.{n}.{uuid.uuid4().hex}.json", made.tombstone)

    def _put_pin(self, run: str, pinned: Pinned) -> None:
        commits = tuple(self.commits[shard] for shard in sorted(pinned.shards))
        snapshot = Snapshot(commits)
        self._put(snapshot_path(snapshot.id), 800, encode_commits(commits))
        expires = time.time() + pinned.expires * 3600
        value = {"run": run, "snapshots": [snapshot.id], "expires": expires}
        self._put(f"pins/{run}.json", 800, jsonfile.dump_sealed(value))

    def _put(self, path: str, hours: float, data: bytes = b"x") -> None:
        target = self.cache.storage.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        then = time.time() - hours * 3600
        os.utime(target, (then, then))
        self.hours[path] = hours


def make_aged(cache: Cache, parts: tuple[Part, ...], pins: tuple[Pinned, ...] = ()) -> AgedCache:
    """Put such parts into an empty cache."""
    world = AgedCache(cache, parts, pins)
    world.put_all()
    return world


def made_up_commit(part: str, n: int, attempt: str | None = None) -> Commit:
    """A commit of one row, whose attempt is of the size that `SIZES` says."""
    one = np.array([1])
    return Commit(
        part=part,
        n=n,
        attempt=attempt or uuid.uuid4().hex,
        identity="0" * 32,
        manifest_hash="0" * 32,
        rollouts_hash="0" * 32,
        rows=1,
        positions=1,
        tokens=2,
        teacher_prompt_tokens=0,
        stored_bytes=sum(SIZES.values()),
        teacher_s=1.0,
        scorer={},
        row_table=encode_row_table(2 * one, one, one),
    )
