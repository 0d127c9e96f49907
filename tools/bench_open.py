"""How opening a cache grows with the number of its shards: time and memory of the first snapshot,
of the next one after a few more commits, and of opening a stored one.

The commits are copies of a real one under other names, with empty files for their shards: opening
reads no scores. Every figure comes from a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache.commits import Commit, attempt_path, commit_path, encode_row_table
from stillroom.cache.identity import Identity
from stillroom.cache.shard_format import shard_format
from stillroom.cache.store import IDENTITY_PATH, Cache

ROWS = 1000
NEW_SHARE = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """One size of cache."""

    commits: int
    first_s: float
    """First snapshot: every commit is read."""
    next_s: float
    """Snapshot after 1 % more commits (at least one): only those are read."""
    open_s: float
    """A stored snapshot opened."""
    open_mb: float
    """What the process grew by for it, MiB."""
    snapshot_mb: float
    """Size of the stored snapshot, MiB."""


def bench_open(identity: Identity, counts: list[int]) -> list[Opening]:
    """Measure opening at each number of commits, with 1,000 rows each."""
    return [_one(identity, count) for count in counts]


def _one(identity: Identity, count: int) -> Opening:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / IDENTITY_PATH).write_bytes(identity.to_json())
        _fabricate(root, identity, range(count))
        first = _child(root, "")
        _fabricate(root, identity, range(count, count + max(1, count // NEW_SHARE)))
        following = _child(root, "")
        opened = _child(root, following["id"])
        size = (root / "snapshots" / f"{following['id']}.parquet").stat().st_size
    return Opening(
        commits=count,
        first_s=first["seconds"],
        next_s=following["seconds"],
        open_s=opened["seconds"],
        open_mb=opened["mb"],
        snapshot_mb=size / 2**20,
    )


def _fabricate(root: Path, identity: Identity, numbers: range) -> None:
    form, rng = shard_format(identity.shard_format), np.random.default_rng(numbers.start)
    for number in numbers:
        lengths = rng.integers(50, 800, (3, ROWS))
        tokens = lengths[0] + lengths[1]
        commit = Commit(
            part=f"v{number // 100:06d}-{number:016x}",
            n=0,
            attempt=f"{number:032x}",
            identity=identity.digest(),
            manifest_hash=f"{number:032x}",
            rollouts_hash=f"{number:032x}",
            rows=ROWS,
            positions=int(lengths[1].sum()),
            tokens=int(tokens.sum()),
            teacher_prompt_tokens=0,
            stored_bytes=0,
            teacher_s=100.0,
            scorer={"host": "bench", "pid": 1, "numeric_class": "none", "time": "2026-01-01"},
            row_table=encode_row_table(tokens, lengths[0], lengths[1]),
        )
        files = {commit_path(commit.part, 0): commit.to_json()}
        folder = attempt_path(commit.part, commit.attempt)
        files |= {f"{folder}/{name}": b"" for name in (form.object_name, "manifest.json")}
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)


def _child(root: Path, snapshot: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "stillroom.tools.bench_open", str(root), snapshot]
    done = subprocess.run(command, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure(root: str, snapshot_id: str) -> dict[str, Any]:
    """In a process of its own: open, and make a snapshot or open the stored one."""
    cache, before = Cache.open(root), _peak_kib()
    start = time.perf_counter()
    snapshot = cache.open_snapshot(snapshot_id) if snapshot_id else cache.snapshot()
    seconds = time.perf_counter() - start
    return {"id": snapshot.id, "seconds": seconds, "mb": (_peak_kib() - before) / 1024}


def _peak_kib() -> int:
    """Largest resident size of this process alone: what getrusage says is inherited."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])


def as_json(openings: list[Opening]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(opening) for opening in openings]


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2])))
