"""The survey that `gc` makes of a cache before it removes anything: listings, and commits and
snapshots where they are needed to tell whose bytes are whose."""

import re
from collections import defaultdict

from stillroom.cache import attempt, quarantine
from stillroom.cache.commits import (
    MAX_BYTES,
    Commit,
    commit_path,
    decode_commit,
    list_numbers,
    live_numbers,
)
from stillroom.cache.errors import CorruptError, MissingError, StillroomError
from stillroom.cache.part import NAME, policy_of
from stillroom.cache.pins import list_pins, pinned_shards
from stillroom.cache.rubbish import Listing, ShardName
from stillroom.cache.snapshot import read_snapshot, snapshot_path
from stillroom.cache.storage import Entry, Storage
from stillroom.cache.tombstones import list_tombstones

OBJECT = re.compile(rf"scores/({NAME.pattern})/({attempt.NAME.pattern})/[^/]+")


def survey(storage: Storage, now: float, min_age_s: float) -> Listing:
    """List what is there.

    Attempts are listed before commits: what is committed in between is then no rubbish.

    Args:
        storage: the cache's storage.
        now: seconds since the epoch by the storage's clock.
        min_age_s: what is younger is no rubbish.

    Raises:
        CorruptError: a pin cannot be read, so nobody knows what it keeps; names it.
    """
    attempts = _list_attempts(storage)
    aside = quarantine.list_quarantine(storage)
    numbers = list_numbers(storage)
    retired = _by_part(storage, "retired", ".json")
    settled = {
        part
        for part, ids in attempts.items()
        if len(ids) == len(numbers.get(part, ())) == 1 and part not in retired
    }
    unsettled = attempts.keys() - settled
    wanted = [(part, n) for part in unsettled for n in numbers.get(part, ())]
    commits, unreadable = read_commits(storage, wanted)
    committed = {c.attempt for own in commits.values() for c in own.values()}
    orphans = any(attempts[part].keys() - committed for part in unsettled)
    named, unknown = _named_by_snapshots(storage) if orphans else ({}, None)
    return Listing(
        now=now,
        min_age_s=min_age_s,
        attempts={part: attempts[part] for part in unsettled},
        commits=commits,
        unreadable=unreadable,
        numbers=numbers,
        named=named,
        unnamed=unknown,
        live=live_numbers(numbers, aside),
        retired=retired,
        quarantine=aside,
        tombstones=list_tombstones(storage),
        pinned=pinned_shards(storage, now),
        pins=list_pins(storage),
        rollouts=_by_part(storage, "rollouts", ".parquet"),
        claims=_by_part(storage, "claims", ".json"),
        probes=storage.list("probe"),
        temporaries=storage.temporaries(),
    )


Commits = tuple[dict[str, dict[int, Commit]], dict[str, str]]
"""Commits by part and n; and parts of which one cannot be read, with the reason."""


def commits_of(storage: Storage, parts: set[str]) -> Commits:
    """All commits of some parts, from a new listing."""
    found: dict[str, list[int]] = {}
    for policy in sorted({policy_of(part) for part in parts}):
        found |= list_numbers(storage, f"commits/v{policy:06d}")
    return read_commits(storage, [(part, n) for part in parts for n in found.get(part, ())])


def read_commits(storage: Storage, names: list[ShardName]) -> Commits:
    """Named commits."""
    commits: dict[str, dict[int, Commit]] = defaultdict(dict)
    unreadable = {}
    paths = [commit_path(*name) for name in names]
    files = storage.get_many(paths, MAX_BYTES)
    for (part, n), path, data in zip(names, paths, files, strict=True):
        try:
            if isinstance(data, StillroomError):
                raise data
            commits[part][n] = decode_commit(data, path, storage.describe(path))
        except StillroomError as error:
            unreadable[part] = f"a commit cannot be read: {error}"
    return dict(commits), unreadable


def _list_attempts(storage: Storage) -> dict[str, dict[str, list[Entry]]]:
    """Objects by part and attempt."""
    found: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in storage.list("scores"):
        match = OBJECT.fullmatch(entry.path)
        if match is not None:
            found[match[1]][match[4]].append(entry)
    return found


def _named_by_snapshots(storage: Storage) -> tuple[dict[str, str], str | None]:
    """Attempts that stored snapshots name, each with the id of one; and why it is not known what
    else they name, if it is not."""
    named: dict[str, str] = {}
    unknown = None
    for entry in storage.list("snapshots"):
        snapshot_id = entry.path.rsplit("/", 1)[1].removesuffix(".parquet")
        if entry.path != snapshot_path(snapshot_id):
            continue
        try:
            snapshot = read_snapshot(storage, snapshot_id)
        except MissingError:
            continue
        except CorruptError as error:
            unknown = f"a snapshot that may name it cannot be read: {error}"
            continue
        named |= {commit.attempt: snapshot_id for commit in snapshot.commits}
    return named, unknown


def _by_part(storage: Storage, folder: str, ending: str) -> dict[str, Entry]:
    names = {
        entry.path.removeprefix(f"{folder}/").removesuffix(ending): entry
        for entry in storage.list(folder)
        if entry.path.endswith(ending)
    }
    return {name: entry for name, entry in names.items() if NAME.fullmatch(name)}
