"""Snapshots: the exact list of shards that a reader uses, stored and named by its own hash.

The same snapshot and seed give the same batches for as long as its parts exist. A snapshot holds
its commits, so a stored one is also the checkpoint from which the next is made: only commits that
are new since then are read.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from stillroom.cache import jsonfile
from stillroom.cache.commits import (
    MAX_BYTES,
    Commit,
    attempt_path,
    commit_path,
    decode_commit,
    list_commits,
)
from stillroom.cache.errors import CorruptError, MissingError, StillroomError
from stillroom.cache.quarantine import damaged_commits
from stillroom.cache.snapshot_file import decode_commits, encode_commits
from stillroom.cache.storage import Entry, Storage
from stillroom.cache.tombstones import removed_commits

FEW = 256
"""So many objects are asked for one by one, which is less than a long listing or a large file."""
AT_ONCE = 1024
"""Commits fetched before they are parsed."""
THREADS = 16
MANIFEST = "manifest.json"
DO = "Restore it, or make a new snapshot."


@dataclass(frozen=True)
class Snapshot:
    """A list of commits, in the order in which their rows are numbered."""

    commits: tuple[Commit, ...]

    @cached_property
    def id(self) -> str:
        """Hash of the list: 32 hexadecimal digits."""
        rows = [[c.part, c.n, c.digest()] for c in self.commits]
        return jsonfile.digest(jsonfile.dump(rows))

    @property
    def rows(self) -> int:
        """Sequences in all."""
        return sum(c.rows for c in self.commits)

    @property
    def positions(self) -> int:
        """Scored tokens in all."""
        return sum(c.positions for c in self.commits)


def snapshot_path(snapshot_id: str) -> str:
    """Object of a snapshot."""
    return f"snapshots/{snapshot_id}.parquet"


def make_snapshot(storage: Storage, parts: Collection[str] | None = None) -> Snapshot:
    """Pin shards, and store the list under its own hash.

    Commits that an earlier snapshot holds are taken from there, if there are more than `FEW`; an
    earlier snapshot that is damaged is passed over. Whether the shards' bytes are there is seen
    when the snapshot is opened.

    Args:
        storage: the cache's storage.
        parts: names of the parts; None for all that are scored and not retired.

    Raises:
        MissingError: a named part is not scored, or its bytes were removed.
        CorruptError: a commit is damaged, or the stored snapshot of this very list is.
    """
    live = list_commits(storage)
    if parts is None:
        retired = {
            entry.path.rsplit("/", 1)[1].removesuffix(".json") for entry in storage.list("retired")
        }
        parts = live.keys() - retired
    unscored = sorted(set(parts) - live.keys())
    if unscored:
        raise MissingError(
            f"part {unscored[0]}", "a commit", "none", "Score it with 'stillroom score'."
        )
    names = [(part, live[part]) for part in sorted(set(parts))]
    _refuse_removed(storage, names, "a new snapshot")
    known = _checkpoint(storage) if len(names) > FEW else None
    snapshot = Snapshot(tuple(_read_commits(storage, names, known.commits if known else ())))
    path = snapshot_path(snapshot.id)
    if snapshot != known and not storage.put_new(path, encode_commits(snapshot.commits)):
        read_snapshot(storage, snapshot.id)
    return snapshot


def open_snapshot(storage: Storage, snapshot_id: str) -> Snapshot:
    """Read a stored snapshot, and see that all of its shards are there.

    Raises:
        MissingError: the snapshot or the bytes of one of its shards are gone; names the part.
        CorruptError: the snapshot is damaged, or one of its shards is: by its size, or because it
            was quarantined as damaged.
    """
    snapshot = read_snapshot(storage, snapshot_id)
    where = storage.describe(snapshot_path(snapshot_id))
    names = [(commit.part, commit.n) for commit in snapshot.commits]
    _refuse_removed(storage, names, where)
    damaged = damaged_commits(storage, names)
    if damaged:
        part, n = min(damaged)
        got = f"commit {n} of {part}, which was found damaged (see quarantine/{part}.{n}.json)"
        raise CorruptError(where, "sound parts", got, "Make a new snapshot.")
    _check_shards(storage, snapshot.commits, where)
    return snapshot


def read_snapshot(storage: Storage, snapshot_id: str) -> Snapshot:
    """Read a stored snapshot; whether its shards are there is not looked at.

    Raises:
        MissingError: there is none of that id.
        CorruptError: it is damaged.
    """
    path = snapshot_path(snapshot_id)
    where = storage.describe(path)
    snapshot = Snapshot(decode_commits(storage.get(path), where))
    if snapshot.id != snapshot_id:
        do = "Make a new snapshot, and delete this one."
        raise CorruptError(where, f"a list with hash {snapshot_id}", snapshot.id, do)
    return snapshot


def _refuse_removed(storage: Storage, names: Collection[tuple[str, int]], where: str) -> None:
    removed = removed_commits(storage).intersection(names)
    if removed:
        part, n = min(removed)
        got = f"that its bytes were removed (see removed/{part}.{n}.*)"
        raise MissingError(where, f"the part {part}", got, "Make a snapshot without the part.")


def _checkpoint(storage: Storage) -> Snapshot | None:
    """The newest stored snapshot of those at least half as large as the largest.

    A small one holds few of the commits that a large one would spare reading.
    """
    entries = storage.list("snapshots")
    large = max((entry.size_bytes for entry in entries), default=0) / 2
    for entry in sorted(entries, key=lambda e: e.modified, reverse=True):
        if entry.size_bytes >= large:
            name = entry.path.rsplit("/", 1)[1].removesuffix(".parquet")
            try:
                return read_snapshot(storage, name)
            except CorruptError:
                continue
    return None


def _read_commits(
    storage: Storage, names: Sequence[tuple[str, int]], known: Sequence[Commit]
) -> Iterator[Commit]:
    """Commits in the order of their names, of which the unknown ones are fetched concurrently."""
    found = {(commit.part, commit.n): commit for commit in known}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        paths = [commit_path(*name) for name in some if name not in found]
        fetched = dict(zip(paths, storage.get_many(paths, MAX_BYTES), strict=True))
        for name in some:
            yield found.get(name) or _decode(storage, commit_path(*name), fetched)


def _decode(storage: Storage, path: str, fetched: dict[str, bytes | StillroomError]) -> Commit:
    data = fetched[path]
    if isinstance(data, StillroomError):
        raise data
    return decode_commit(data, path, storage.describe(path))


def _check_shards(storage: Storage, commits: Sequence[Commit], where: str) -> None:
    """See that each attempt has its manifest and shard, of the size that its commit says."""
    folders = [attempt_path(commit.part, commit.attempt) for commit in commits]
    if len(folders) <= FEW:
        with ThreadPoolExecutor(THREADS) as pool:
            entries = [entry for found in pool.map(storage.list, folders) for entry in found]
    else:
        entries = storage.list("scores")
    objects: dict[str, list[Entry]] = {folder: [] for folder in folders}
    for entry in entries:
        objects.get(entry.path.rpartition("/")[0], []).append(entry)
    for commit, folder in zip(commits, folders, strict=True):
        paths = {entry.path for entry in objects[folder]}
        manifest = f"{folder}/{MANIFEST}"
        if manifest not in paths or len(paths) < 2:
            gone = f"a shard beside {manifest}" if manifest in paths else manifest
            raise MissingError(where, f"the part {commit.part}", f"no {gone}", DO)
        size = sum(entry.size_bytes for entry in objects[folder])
        if size != commit.stored_bytes:
            expected = f"{commit.stored_bytes} bytes of the part {commit.part} in {folder}"
            raise CorruptError(where, expected, f"{size}", DO)
