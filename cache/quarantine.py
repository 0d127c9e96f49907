"""Quarantine: which commits were taken out of use, and whether their bytes were found bad.

A commit in quarantine stays where it is; the part may get a commit n + 1. One that is `damaged`
must not be read again. One that is only to be scored again has right bytes: snapshots that name it
open.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from stillroom.cache import jsonfile
from stillroom.cache.commits import FILE
from stillroom.cache.errors import CorruptError, StillroomError
from stillroom.cache.storage import Entry, Storage

FOLDER = "quarantine"
MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """Why a commit is out of use."""

    part: str
    n: int
    reason: str
    damaged: bool
    """Found bad; otherwise it was set aside on purpose, to be scored again."""
    time: str
    """UTC, ISO 8601, by the clock of the host that put it."""


def quarantine_path(part: str, n: int) -> str:
    """Object that takes commit n of a part out of use."""
    return f"{FOLDER}/{part}.{n}.json"


def put_quarantine(storage: Storage, part: str, n: int, reason: str, *, damaged: bool) -> None:
    """Take a commit out of use; nothing changes where it is out of use already."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    value = Quarantine(part=part, n=n, reason=reason, damaged=damaged, time=now)
    storage.put_new(quarantine_path(part, n), jsonfile.dump_sealed(asdict(value)))


def next_n(storage: Storage, part: str) -> int:
    """The first n of a part that is not in quarantine: that of its live commit, or of its next one.

    Asks for one object, and for one more for each commit that is in quarantine.
    """
    n = 0
    while storage.exists(quarantine_path(part, n)):
        n += 1
    return n


def list_quarantine(storage: Storage) -> dict[tuple[str, int], Entry]:
    """Commits in quarantine, (part, n), from a listing."""
    found = {}
    for entry in storage.list(FOLDER):
        match = FILE.fullmatch(entry.path.removeprefix(f"{FOLDER}/"))
        if match is not None:
            found[match[1], int(match[2])] = entry
    return found


def damaged_commits(
    storage: Storage, among: Collection[tuple[str, int]] | None = None
) -> set[tuple[str, int]]:
    """Commits, (part, n), that were found bad.

    Args:
        storage: the cache's storage.
        among: commits to ask about; None for all. Only the files of those are read.

    Raises:
        CorruptError: a file in quarantine is not what it should be; names it.
    """
    names = sorted(n for n in list_quarantine(storage) if among is None or n in among)
    files = get_quarantine(storage, names)
    return {name for name in names if decode_quarantine(storage, name, files[name]).damaged}


def get_quarantine(
    storage: Storage, names: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], bytes | StillroomError]:
    """Files in quarantine of commits, (part, n), or the error that reading one would raise."""
    files = storage.get_many([quarantine_path(*name) for name in names], MAX_BYTES)
    return dict(zip(names, files, strict=True))


def decode_quarantine(
    storage: Storage, name: tuple[str, int], data: bytes | StillroomError
) -> Quarantine:
    """What a file in quarantine says.

    Args:
        storage: where it was read, for messages.
        name: the commit, (part, n), that it must be about.
        data: from `get_quarantine`; an error is raised.

    Raises:
        CorruptError: it is not what it should be.
    """
    if isinstance(data, StillroomError):
        raise data
    where = storage.describe(quarantine_path(*name))
    value: Quarantine = jsonfile.build(Quarantine, jsonfile.load_sealed(data, where), where)
    if (value.part, value.n) != name:
        got = f"{value.part}.{value.n}"
        raise CorruptError(where, "the commit that its name says", got, "Restore the file.")
    return value
