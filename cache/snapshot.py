"""Snapshots: the exact list of shards that a reader uses, stored and named by its own hash.

The same snapshot and seed give the same batches for as long as its parts exist.
"""

import io
from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache import jsonfile
from stillroom.cache.commits import (
    Commit,
    attempt_path,
    commit_path,
    list_commits,
    read_commit,
)
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.manifest import OBJECT_NAME
from stillroom.cache.part import read_parquet
from stillroom.cache.storage import Storage

SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("commit_hash", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("positions", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A list of commits, in the order in which their rows are numbered."""

    commits: tuple[Commit, ...]

    @property
    def id(self) -> str:
        """Hash of the list: 32 hexadecimal digits."""
        return _list_id([(c.part, c.n, c.digest()) for c in self.commits])

    @property
    def rows(self) -> int:
        """Sequences in all."""
        return sum(c.rows for c in self.commits)

    @property
    def positions(self) -> int:
        """Scored tokens in all."""
        return sum(c.positions for c in self.commits)


def make_snapshot(storage: Storage, parts: Collection[str] | None = None) -> Snapshot:
    """Pin shards, and store the list under its own hash.

    Args:
        storage: the cache's storage.
        parts: names of the parts; None for all that are scored and not retired.

    Raises:
        MissingError: a named part is not scored.
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
    snapshot = Snapshot(
        tuple(read_commit(storage, commit_path(part, live[part])) for part in sorted(parts))
    )
    storage.put_new(snapshot_path(snapshot.id), _encode(snapshot))
    return snapshot


def open_snapshot(storage: Storage, snapshot_id: str) -> Snapshot:
    """Read a stored snapshot and the commits that it names.

    Raises:
        MissingError: the snapshot or one of its commits or attempts is gone; names it.
        CorruptError: a commit is not the one that was listed.
    """
    path = snapshot_path(snapshot_id)
    where = storage.describe(path)
    data = storage.get(path)
    try:
        table = read_parquet(data)
        if table.schema.remove_metadata() != SCHEMA:
            raise ValueError(f"columns {table.schema.names}")
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptError(where, "a snapshot", str(error), "Make a new snapshot.") from error
    listed = _list_id([(row["part"], row["n"], row["commit_hash"]) for row in rows])
    if listed != snapshot_id:
        do = "Make a new snapshot."
        raise CorruptError(where, f"a list with hash {snapshot_id}", listed, do)
    commits, objects = [], {entry.path for entry in storage.list("scores")}
    for row in rows:
        try:
            commit = read_commit(storage, commit_path(row["part"], row["n"]))
        except MissingError as error:
            do = "Restore it, or make a new snapshot."
            raise MissingError(where, f"the part {row['part']}", "no commit of it", do) from error
        if commit.digest() != row["commit_hash"]:
            raise CorruptError(
                where,
                f"commit {row['commit_hash']} of {row['part']}",
                commit.digest(),
                "Restore it.",
            )
        attempt = attempt_path(commit.part, commit.attempt)
        if not {f"{attempt}/{OBJECT_NAME}", f"{attempt}/manifest.json"} <= objects:
            do = "Restore it, or make a new snapshot."
            raise MissingError(where, f"the part {commit.part}", "no shard of it", do)
        commits.append(commit)
    return Snapshot(tuple(commits))


def _list_id(rows: list[tuple[str, int, str]]) -> str:
    return jsonfile.digest(jsonfile.dump([list(row) for row in rows]))


def snapshot_path(snapshot_id: str) -> str:
    """Object of a snapshot."""
    return f"snapshots/{snapshot_id}.parquet"


def _encode(snapshot: Snapshot) -> bytes:
    rows = [
        {
            "part": c.part,
            "n": c.n,
            "commit_hash": c.digest(),
            "rows": c.rows,
            "positions": c.positions,
            "weight": 1.0,
        }
        for c in snapshot.commits
    ]
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
