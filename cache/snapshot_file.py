"""The file of a snapshot: a Parquet table of commits, each with its own bytes, so that one read
opens all of them.

The file may come from anyone: what it becomes is bounded, and every column must say what the
embedded commits say.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit, commit_path, decode_commit
from stillroom.cache.errors import CorruptError
from stillroom.cache.parquet_seal import HASH_KEY, NO_HASH, check_seal, seal
from stillroom.cache.plain_parquet import BYTE_ARRAY, FLOAT, INT32, INT64, read_groups

SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("commit_hash", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("positions", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("commit", pa.binary(), nullable=False),
    ]
)
COLUMNS = {
    "part": BYTE_ARRAY,
    "n": INT32,
    "commit_hash": BYTE_ARRAY,
    "rows": INT64,
    "positions": INT64,
    "weight": FLOAT,
    "commit": BYTE_ARRAY,
}
"""The same in Parquet's own types."""
GROUP_ROWS = 1024
GROUP_BYTES = 64 << 20
FIXED_BYTES = 68
"""Of a row's values in plain pages, lengths included, besides the bytes of part and commit."""
INFLATION = 16
"""A file may become so many times its bytes, or `SMALL_BYTES` if that is more."""
SMALL_BYTES = 4 << 20
DO = "Make a new snapshot, and delete this one: it holds nothing that the commits do not."


def encode_commits(commits: Sequence[Commit]) -> bytes:
    """The file of a list of commits, which stand in the order of their parts."""
    data, raw_bytes = _write(commits, "zstd")
    if raw_bytes > _raw_limit(data):
        data, _ = _write(commits, "none")
    return data


def decode_commits(data: bytes, where: str) -> tuple[Commit, ...]:
    """Commits of a snapshot's file, each verified against its hash.

    Raises:
        CorruptError: the file is damaged, claims to become far more than its bytes, is not
            sorted by part, or a column says something else than the commit beside it.
    """
    check_seal(data, where, DO)
    commits: list[Commit] = []
    try:
        for row in _rows(data):
            commit = _commit(row, where)
            if commits and commit.part <= commits[-1].part:
                raise ValueError(f"{commit.part} after {commits[-1].part}")
            commits.append(commit)
    except CorruptError:
        raise
    except (OSError, ValueError) as error:
        raise CorruptError(where, "a snapshot", f"{error}", DO) from error
    return tuple(commits)


def _write(commits: Sequence[Commit], compression: str) -> tuple[bytes, int]:
    """The file, and the bytes that its pages become."""
    sink = io.BytesIO()
    raw_bytes = 0
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.add_key_value_metadata({HASH_KEY: NO_HASH})
        for rows in _groups(commits):
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            raw_bytes += sum(FIXED_BYTES + len(r["part"]) + len(r["commit"]) for r in rows)
    return seal(sink.getvalue()), raw_bytes


def _groups(commits: Sequence[Commit]) -> Iterator[list[dict[str, Any]]]:
    """Rows in groups of bounded length and size."""
    rows: list[dict[str, Any]] = []
    size = 0
    for commit in commits:
        row = _columns(commit, commit.to_json())
        size += len(row["commit"])
        if rows and (len(rows) == GROUP_ROWS or size > GROUP_BYTES):
            yield rows
            rows, size = [], len(row["commit"])
        rows.append(row)
    if rows:
        yield rows


def _columns(commit: Commit, blob: bytes) -> dict[str, Any]:
    return {
        "part": commit.part,
        "n": commit.n,
        "commit_hash": jsonfile.digest(blob),
        "rows": commit.rows,
        "positions": commit.positions,
        "weight": 1.0,
        "commit": blob,
    }


def _commit(row: dict[str, Any], where: str) -> Commit:
    path = commit_path(row["part"].decode(), row["n"])
    found = jsonfile.digest(row["commit"])
    if found.encode() != row["commit_hash"]:
        raise CorruptError(f"{where}, {path}", f"hash {row['commit_hash']!r:.40}", found, DO)
    commit = decode_commit(row["commit"], path, f"{where}, {path}")
    says = (row["rows"], row["positions"], row["weight"])
    if says != (commit.rows, commit.positions, 1.0):
        expected = f"{commit.rows} rows, {commit.positions} positions and weight 1"
        raise CorruptError(f"{where}, {path}", expected, f"{says}", DO)
    return commit


def _rows(data: bytes) -> Iterator[dict[str, Any]]:
    for group in read_groups(data, COLUMNS, _raw_limit(data)):
        for values in zip(*group.values(), strict=True):
            yield dict(zip(group, values, strict=True))


def _raw_limit(data: bytes) -> int:
    return max(SMALL_BYTES, INFLATION * len(data))
