"""The survey that `gc` makes of a cache before it removes anything: listings, and commits where
they are needed to tell whose bytes are whose."""

import re
from collections import defaultdict

from stillroom.cache import attempt, quarantine
from stillroom.cache.commits import FILE, Commit, commit_path, decode_commit
from stillroom.cache.errors import StillroomError
from stillroom.cache.part import NAME, policy_of
from stillroom.cache.pins import list_pins, pinned_shards
from stillroom.cache.rubbish import Listing, ShardName
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
    numbers = _list_numbers(storage)
    free = {part: [n for n in ns if (part, n) not in aside] for part, ns in numbers.items()}
    retired = _by_part(storage, "retired", ".json")
    settled = {
        part
        for part, ids in attempts.items()
        if len(ids) == len(numbers.get(part, ())) == 1 and part not in retired
    }
    unsettled = attempts.keys() - settled
    wanted = [(part, n) for part in unsettled for n in numbers.get(part, ())]
    commits, unreadable = read_commits(storage, wanted)
    return Listing(
        now=now,
        min_age_s=min_age_s,
        attempts={part: attempts[part] for part in unsettled},
        commits=commits,
        unreadable=unreadable,
        numbers=numbers,
        live={part: max(ns) for part, ns in free.items() if ns},
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
        found |= _list_numbers(storage, f"commits/v{policy:06d}")
    return read_commits(storage, [(part, n) for part in parts for n in found.get(part, ())])


def read_commits(storage: Storage, names: list[ShardName]) -> Commits:
    """Named commits."""
    commits: dict[str, dict[int, Commit]] = defaultdict(dict)
    unreadable = {}
    paths = [commit_path(*name) for name in names]
    for (part, n), path, data in zip(names, paths, storage.get_many(paths), strict=True):
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


def _list_numbers(storage: Storage, prefix: str = "commits") -> dict[str, list[int]]:
    """Every n of each part's commits, those in quarantine too."""
    found: dict[str, list[int]] = defaultdict(list)
    for entry in storage.list(prefix):
        match = FILE.fullmatch(entry.path.rsplit("/", 1)[1])
        if match is not None and entry.path == commit_path(match[1], int(match[2])):
            found[match[1]].append(int(match[2]))
    return found


def _by_part(storage: Storage, folder: str, ending: str) -> dict[str, Entry]:
    names = {
        entry.path.removeprefix(f"{folder}/").removesuffix(ending): entry
        for entry in storage.list(folder)
        if entry.path.endswith(ending)
    }
    return {name: entry for name, entry in names.items() if NAME.fullmatch(name)}
