"""What a cache holds, part by part and policy by policy.

It comes from listings and commits; no shard is read.
"""

from dataclasses import asdict, dataclass
from typing import Any

from stillroom.cache.commits import Commit, commit_path, read_commit
from stillroom.cache.identity import Identity
from stillroom.cache.part import policy_of
from stillroom.cache.plain_parquet import read_tail
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import removed_commits
from stillroom.replay.policies import policy_versions, read_policy
from stillroom.tools.render import print_table, say

STATUS_COLUMNS = {
    "version": "policy",
    "run": "run",
    "parts": "parts",
    "unscored": "unscored",
    "scored": "scored",
    "retired": "retired",
    "removed": "removed",
    "quarantined": "quarantined",
    "rows": "rollouts",
    "positions": "positions",
    "stored_bytes": "shard bytes",
    "rollouts_bytes": "rollout bytes",
    "teacher_s": "teacher s",
}
TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PartLine:
    """One part."""

    part: str
    policy_version: int
    state: str
    """unscored, scored, retired (out of new snapshots), removed (retired, and `gc` took its bytes),
    or quarantined (to be scored again)."""
    rows: int | None
    """Rollouts; None if neither a commit nor the Parquet file tells."""
    positions: int | None
    """Scored tokens; None where there is no shard, as in all that follow."""
    stored_bytes: int | None
    """Shard and manifest; 0 once they are removed."""
    rollouts_bytes: int | None
    """Parquet file; None if it is gone."""
    bytes_per_position: float | None
    """Of shard and manifest, as they were written."""
    teacher_s: float | None
    scorer_host: str | None
    scored_at: str | None
    """UTC, ISO 8601."""


@dataclass(slots=True)
class PolicyLine:
    """One policy version and the parts that it sampled."""

    version: int
    run: str | None
    """Run that published it; None if only parts of that version are there."""
    parent: int | None
    step: int | None
    """Optimiser steps that the run had taken."""
    path: str | None
    parts: int = 0
    unscored: int = 0
    scored: int = 0
    retired: int = 0
    removed: int = 0
    quarantined: int = 0
    rows: int = 0
    """Rollouts."""
    positions: int = 0
    """Scored tokens."""
    stored_bytes: int = 0
    """Shards and manifests."""
    rollouts_bytes: int = 0
    teacher_s: float = 0.0

    def add(self, line: PartLine) -> None:
        """Count a part."""
        self.parts += 1
        setattr(self, line.state, getattr(self, line.state) + 1)
        for name in ("rows", "positions", "stored_bytes", "rollouts_bytes", "teacher_s"):
            setattr(self, name, getattr(self, name) + (getattr(line, name) or 0))


def list_parts(cache: Cache) -> list[PartLine]:
    """Every part that has rollouts or a live commit, oldest policy first."""
    storage = cache.storage
    live, retired, removed = cache.commits(), cache.retired(), removed_commits(storage)
    quarantined = {e.path.rsplit("/", 1)[1].split(".")[0] for e in storage.list("quarantine")}
    sizes = {e.path: e.size_bytes for e in storage.list("rollouts")}
    lines = []
    for part in sorted({*cache.parts(), *live}):
        commit = read_commit(storage, commit_path(part, live[part])) if part in live else None
        state = "scored" if commit else "quarantined" if part in quarantined else "unscored"
        path = f"rollouts/{part}.parquet"
        state = "retired" if part in retired else state
        state = "removed" if (part, live.get(part)) in removed else state
        lines.append(_line(storage, part, state, commit, sizes.get(path)))
    return lines


def list_policies(cache: Cache) -> list[PolicyLine]:
    """Every policy that was published or has parts."""
    lines = {}
    for version in policy_versions(cache.storage):
        policy = read_policy(cache.storage, version)
        lines[version] = PolicyLine(version, policy.run, policy.parent, policy.step, policy.path)
    for part in list_parts(cache):
        version = part.policy_version
        lines.setdefault(version, PolicyLine(version, None, None, None, None)).add(part)
    return [lines[version] for version in sorted(lines)]


def describe_identity(cache: Cache) -> str:
    """The identity in one line."""
    identity = cache.identity
    teacher = identity.teacher
    return (
        f"{cache.storage.root}: teacher {teacher.name} ({teacher.weight_format} weights, run in "
        f"{teacher.compute_dtype}, fingerprint {teacher.fingerprint[:12]}), "
        f"{describe_kept(identity)}, temperature {identity.temperature}, "
        f"format {identity.format_version}"
    )


def describe_kept(identity: Identity) -> str:
    """What is kept of each position."""
    cut = f" that cover {identity.mass}" if identity.mass < 1 else ""
    whose = "of the student" if identity.student_extra else "drawn from the tail"
    extra = f" and {identity.extra} ids {whose}" if identity.extra else ""
    return f"top {identity.topk} of {identity.vocab_size:,} tokens{cut}{extra}"


def status_as_json(cache: Cache) -> dict[str, Any]:
    """Identity and policies as plain values."""
    return {
        "root": cache.storage.root,
        "identity": asdict(cache.identity),
        "identity_hash": cache.identity.digest(),
        "policies": [asdict(line) for line in list_policies(cache)],
    }


def print_status(cache: Cache) -> None:
    """Print identity, policies and what the teacher took."""
    say(describe_identity(cache))
    policies = list_policies(cache)
    if not policies:
        say("no policy and no part yet: run 'stillroom rollout'")
        return
    rows = [[getattr(line, field) for field in STATUS_COLUMNS] for line in policies]
    print_table(tuple(STATUS_COLUMNS.values()), rows, text=("run",))
    positions = sum(line.positions for line in policies)
    seconds = sum(line.teacher_s for line in policies)
    rate = f", {positions / seconds:,.0f} positions/s" if seconds else ""
    say(f"the teacher took {seconds:,.1f} s for {positions:,} positions{rate}")


def print_parts(lines: list[PartLine]) -> None:
    """Print one line a part."""
    heads = ("part", "policy", "state", "rollouts", "positions", "shard bytes", "rollout bytes")
    more = ("bytes/position", "teacher s", "scored by", "scored at")
    rows = [list(asdict(line).values()) for line in lines]
    print_table((*heads, *more), rows, text=("part", "state", "scored by", "scored at"))


def _line(
    storage: Storage, part: str, state: str, commit: Commit | None, rollouts_bytes: int | None
) -> PartLine:
    rows = positions = stored = per_position = teacher_s = host = at = None
    if commit is not None:
        rows, positions, stored = commit.rows, commit.positions, commit.stored_bytes
        per_position, teacher_s = stored / max(1, positions), commit.teacher_s
        stored = 0 if state == "removed" else stored
        host, at = commit.scorer.get("host"), commit.scorer.get("time")
    elif rollouts_bytes is not None:
        rows = _parquet_rows(storage, f"rollouts/{part}.parquet", rollouts_bytes)
    return PartLine(
        part=part,
        policy_version=policy_of(part),
        state=state,
        rows=rows,
        positions=positions,
        stored_bytes=stored,
        rollouts_bytes=rollouts_bytes,
        bytes_per_position=per_position,
        teacher_s=teacher_s,
        scorer_host=host,
        scored_at=at,
    )


def _parquet_rows(storage: Storage, path: str, size: int) -> int | None:
    """Rows of a Parquet file from its last bytes; None if they are no Parquet footer."""
    length = min(size, TAIL_BYTES)
    (tail,) = storage.get_ranges(path, [size - length], [length])
    try:
        rows = read_tail(tail).get(3)
    except ValueError:
        return None
    return rows if type(rows) is int and rows >= 0 else None
