"""Figures of a whole cache: bytes, how much of the teacher is kept, and what the rollouts are like.

Shards are read one after another and their positions in blocks, so memory does not grow with the
cache. Parts that are retired are left out, as new snapshots leave them out.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillroom.cache.commits import Commit, commit_path, read_commit
from stillroom.cache.schema import FINISH_REASONS, SOURCES
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
from stillroom.tools.stats_kept import Kept

BLOCK_ROWS = 65_536
MASS_AT = (1, 8, 64)


@dataclass(slots=True)
class Stats:
    """Sums over shards; `as_json` makes means of them."""

    root: str
    topk: int
    mass_cut: float
    """The identity's mass; 1 keeps all K entries."""
    kept: Kept
    retired: int = 0
    """Scored parts that are left out."""
    unscored: int = 0
    shards: int = 0
    rollouts: int = 0
    positions: int = 0
    tokens: int = 0
    object_bytes: int = 0
    manifest_bytes: int = 0
    rollouts_bytes: int = 0
    teacher_s: float = 0.0
    raw_bytes: int = 0
    """Of all columns as plain arrays."""
    stored: Counter[str] = field(default_factory=Counter)
    """Bytes of each array of a shard's object, as encoded. Ids are stored as codes with lists, and
    Parquet has columns of its own."""
    mass: dict[int, float] = field(default_factory=dict)
    """Sum over positions of the probability of the likeliest k kept tokens, by k."""
    tail_mass: float = 0.0
    outside: int = 0
    """Positions whose sampled token is not among the kept entries."""
    sampled_logprob: float = 0.0
    policies: Counter[int] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; means are None where there is no position."""
        mean = 1 / self.positions if self.positions else float("nan")
        stored = self.object_bytes + self.manifest_bytes
        return {
            "root": self.root,
            "shards": self.shards,
            "retired_parts": self.retired,
            "unscored_parts": self.unscored,
            "rollouts": self.rollouts,
            "positions": self.positions,
            "tokens": self.tokens,
            "teacher_s": self.teacher_s,
            "bytes": {
                "shard_objects": self.object_bytes,
                "manifests": self.manifest_bytes,
                "rollouts": self.rollouts_bytes,
            },
            "bytes_per_position": stored * mean,
            "raw_bytes_per_position": self.raw_bytes * mean,
            "compression": self.raw_bytes / stored if stored else None,
            "stored_bytes_per_position": {n: size * mean for n, size in self.stored.items()},
            "topk": self.topk,
            "mass_cut": self.mass_cut,
            **self.kept.as_json(),
            "mean_mass": {k: total * mean for k, total in sorted(self.mass.items())},
            "mean_tail_mass": self.tail_mass * mean,
            "sampled_outside_topk": self.outside * mean,
            "mean_sampled_logprob": self.sampled_logprob * mean,
            "policy_versions": dict(sorted(self.policies.items())),
            "finish_reasons": dict(self.finish_reasons),
            "sources": dict(self.sources),
            "lengths": {name: _spread(parts) for name, parts in self.lengths.items()},
        }


def collect(cache: Cache) -> Stats:
    """Read every shard that a new snapshot would hold.

    Raises:
        CorruptError: stored bytes are damaged; names the object.
    """
    identity = cache.identity
    kept = Kept(identity.vocab_size, np.zeros(identity.topk + 1, np.int64))
    unscored = len(cache.unscored())
    stats = Stats(cache.storage.root, identity.topk, identity.mass, kept, unscored=unscored)
    live, retired = cache.commits(), cache.retired()
    rollouts_bytes = {e.path: e.size_bytes for e in cache.storage.list("rollouts")}
    for part in sorted(live):
        if part in retired:
            stats.retired += 1
            continue
        commit = read_commit(cache.storage, commit_path(part, live[part]))
        shard = cache.shard(commit)
        stats.rollouts_bytes += rollouts_bytes.get(f"rollouts/{part}.parquet", 0)
        _add_sizes(stats, commit, shard)
        _add_sequences(stats, commit, shard)
        _add_positions(stats, commit, shard)
    return stats


def _add_sizes(stats: Stats, commit: Commit, shard: Shard) -> None:
    stats.shards += 1
    stats.rollouts += commit.rows
    stats.positions += commit.positions
    stats.tokens += commit.tokens
    stats.teacher_s += commit.teacher_s
    stats.object_bytes += shard.manifest.size
    stats.manifest_bytes += commit.stored_bytes - shard.manifest.size
    stats.raw_bytes += shard.raw_bytes
    for name, entry in shard.manifest.arrays.items():
        stats.stored[name] += sum(chunk.length for chunk in entry.chunks)


def _add_sequences(stats: Stats, commit: Commit, shard: Shard) -> None:
    table = commit.row_lengths()
    lengths = {"prompt": table[:, 1], "completion": table[:, 0] - table[:, 1]}
    for name, values in lengths.items():
        stats.lengths.setdefault(name, []).append(values.astype(np.int64))
    names = ("policy_version_min", "finish_reason", "source")
    policy, reason, source = (shard.read(name).tolist() for name in names)
    stats.policies.update(policy)
    stats.finish_reasons.update(FINISH_REASONS[code] for code in reason)
    stats.sources.update(SOURCES[code] for code in source)


def _add_positions(stats: Stats, commit: Commit, shard: Shard) -> None:
    sampled_id = shard.read("token")[shard.read("scored") == 1]
    names = ("topk_id", "topk_logprob", "topk_count", "tail_logprob", "sampled_logprob")
    depths = sorted({k for k in (*MASS_AT, stats.topk) if k <= stats.topk})
    for start in range(0, commit.positions, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, commit.positions)
        ids, top, count, tail, sampled = shard.read_ranges([(name, start, stop) for name in names])
        covered = np.exp(top.astype(np.float32)).cumsum(axis=1, dtype=np.float64)
        for k in depths:
            stats.mass[k] = stats.mass.get(k, 0.0) + float(covered[:, k - 1].sum())
        stats.kept.add(count, top, tail)
        stats.tail_mass += float(np.exp(tail.astype(np.float64)).sum())
        stats.outside += int((ids != sampled_id[start:stop, None]).all(axis=1).sum())
        stats.sampled_logprob += float(sampled.sum(dtype=np.float64))


def _spread(parts: list[np.ndarray]) -> dict[str, float]:
    values = np.concatenate(parts)
    return {
        "mean": float(values.mean()),
        "p50": float(np.percentile(values, 50)),
        "p95": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }
