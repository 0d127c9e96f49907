"""Pins: the snapshots that runs are using, whose bytes `gc` therefore keeps.

A reader pins a snapshot before it opens and checks it, and renews the pin now and then. A pin that
was not renewed expires by the storage's clock, so that a run that died holds nothing for ever.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass

from stillroom.cache import jsonfile
from stillroom.cache.clock import DAY_S
from stillroom.cache.errors import ConfigError, CorruptError, InputError, MissingError
from stillroom.cache.snapshot import read_snapshot
from stillroom.cache.storage import Storage
from stillroom.cache.storage_entry import SAFE_NAME

FOLDER = "pins"
MAX_BYTES = 4 << 20
SNAPSHOT_ID = re.compile(r"[0-9a-f]{32}")
LIFETIME_S = 7 * DAY_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """Snapshots that a run uses."""

    run: str
    snapshots: list[str]
    """Their ids."""
    expires: float
    """Seconds since the epoch, by the storage's clock."""

    @property
    def path(self) -> str:
        """Object of the pin."""
        return pin_path(self.run)


@dataclass(frozen=True, slots=True)
class Pinned:
    """Shards that active pins keep."""

    by_run: dict[tuple[str, int], str]
    """Part and n of a commit, and a run that uses it."""
    unknown: str | None
    """Why it is not known what else is in use, if it is not: then all shards are kept."""

    def keeper(self, shard: tuple[str, int]) -> str | None:
        """What keeps the bytes of a commit (part, n), or None."""
        run = self.by_run.get(shard)
        return self.unknown if run is None else f"pinned by run {run}"


def pin_path(run: str) -> str:
    """Object of a run's pin.

    Raises:
        ConfigError: the name cannot be part of a path.
    """
    if not SAFE_NAME.fullmatch(run):
        do = "Choose another name."
        raise ConfigError("run", "letters, digits, dots, dashes and underscores", repr(run), do)
    return f"{FOLDER}/{run}.json"


def pin(
    storage: Storage, run: str, snapshot_ids: Collection[str], lifetime_s: float = LIFETIME_S
) -> Pin:
    """Keep the bytes of snapshots; what the run pinned before is let go.

    Call it before the snapshots are opened, also where they were opened before: what `gc` removed
    meanwhile is found at opening.

    Args:
        storage: the cache's storage.
        run: who pins; one pin a name, so no two runs at work may have the same.
        snapshot_ids: what it uses.
        lifetime_s: seconds until the pin expires unless it is renewed.

    Raises:
        InputError: one is no id of a snapshot; `gc` would stop at such a pin.
    """
    for snapshot_id in snapshot_ids:
        if not SNAPSHOT_ID.fullmatch(snapshot_id):
            do = "Take the id from a snapshot."
            raise InputError(
                f"pin of run {run}", "32 hexadecimal digits", repr(snapshot_id[:80]), do
            )
    made = Pin(run=run, snapshots=sorted(snapshot_ids), expires=storage.now() + lifetime_s)
    storage.put(pin_path(run), jsonfile.dump_sealed(asdict(made)))
    return made


def renew_pin(
    storage: Storage, run: str, snapshot_ids: Collection[str], lifetime_s: float = LIFETIME_S
) -> Pin:
    """Pin again if less than half of the time is left, if other snapshots are pinned, or if the pin
    is gone or damaged: it is the run's own, which knows what it uses."""
    try:
        found = read_pin(storage, pin_path(run))
    except (MissingError, CorruptError):
        return pin(storage, run, snapshot_ids, lifetime_s)
    enough = found.expires - storage.now() >= lifetime_s / 2
    if enough and found.snapshots == sorted(snapshot_ids):
        return found
    return pin(storage, run, snapshot_ids, lifetime_s)


def read_pin(storage: Storage, path: str) -> Pin:
    """Read one pin.

    Raises:
        MissingError: it is not there.
        CorruptError: it is not the pin that its name says.
    """
    where = storage.describe(path)
    value = jsonfile.load_sealed(storage.get(path, MAX_BYTES), where)
    found: Pin = jsonfile.build(Pin, value, where)
    named = all(map(SNAPSHOT_ID.fullmatch, found.snapshots))
    if not named or pin_path(found.run) != path:
        expected = "a run, ids of snapshots and a time"
        do = "Restore the file, or remove it if its run has ended."
        raise CorruptError(where, expected, f"{asdict(found)}", do)
    return found


def unpin(storage: Storage, run: str) -> None:
    """Let go of what a run pinned; nothing happens where it pinned nothing."""
    storage.delete(pin_path(run))


def list_pins(storage: Storage) -> list[Pin]:
    """All pins, expired ones too.

    Raises:
        CorruptError: one cannot be read, so nobody knows what it keeps; names it.
    """
    found = []
    for entry in storage.list(FOLDER):
        with suppress(MissingError):  # let go since it was listed
            found.append(read_pin(storage, entry.path))
    return found


def active_pins(storage: Storage, now: float | None = None) -> dict[str, Pin]:
    """Pins that have not expired, by run.

    Args:
        storage: the cache's storage.
        now: seconds since the epoch by the storage's clock; None asks it.

    Raises:
        CorruptError: one cannot be read, so nobody knows what it keeps; names it.
    """
    now = storage.now() if now is None else now
    return {pin.run: pin for pin in list_pins(storage) if pin.expires > now}


def pinned_shards(storage: Storage, now: float | None = None) -> Pinned:
    """What active pins keep; arguments and errors as in `active_pins`."""
    by_run: dict[tuple[str, int], str] = {}
    unknown = None
    for run, found in sorted(active_pins(storage, now).items()):
        for snapshot_id in found.snapshots:
            try:
                snapshot = read_snapshot(storage, snapshot_id)
            except (MissingError, CorruptError) as error:
                unknown = f"run {run} pins a snapshot that cannot be read: {error}"
                continue
            by_run |= {(commit.part, commit.n): run for commit in snapshot.commits}
    return Pinned(by_run, unknown)
