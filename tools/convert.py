"""A cache with its shards in another format: rollouts, plans, policies and marks byte for byte, and
every live shard encoded anew, read back and compared bit for bit.

The source is only read. Parts that the destination holds already are left as they are, so an
interrupted conversion goes on where it stopped.
"""

from dataclasses import dataclass, field, replace

from stillroom.cache.commits import Commit, commit_path, read_commit
from stillroom.cache.errors import ConfigError, CorruptError
from stillroom.cache.progress import Progress
from stillroom.cache.schema import BY_NAME, EDGE_OF
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import removed_commits

COPIED = ("canary", "id_maps", "units", "rollouts", "retired", "policies", "drift")


@dataclass(slots=True)
class Converted:
    """What a conversion did."""

    copied: int = 0
    """Objects copied byte for byte."""
    shards: list[str] = field(default_factory=list)
    """Parts whose shards were encoded anew by this run."""
    already: int = 0
    """Parts that the destination held already."""
    source_bytes: int = 0
    """Stored bytes of the converted shards, before..."""
    stored_bytes: int = 0
    """...and after."""


def convert(source: Cache, root: str, shard_format: str) -> Converted:
    """Make a cache at another root that holds the same scores in another shard format.

    Snapshots and pins are not taken over: they name commits, and the commits are new ones.

    Args:
        source: the cache to read.
        root: where the new one is made; empty, or an interrupted conversion of the same cache.
        shard_format: "zarr" or "parquet".

    Raises:
        ConfigError: source and destination are the same.
        MismatchError: the root holds a cache with another identity.
        CorruptError: a shard of the source is damaged, or one does not read back as it was written.
    """
    cache = Cache.create(root, replace(source.identity, shard_format=shard_format))
    if cache.storage.root == source.storage.root:
        do = "Name another root."
        raise ConfigError("destination", "another root than the source's", repr(root), do)
    report = Converted()
    for prefix in COPIED:
        for entry in source.storage.list(prefix):
            if not cache.storage.exists(entry.path):
                cache.storage.put_new(entry.path, source.storage.get(entry.path))
                report.copied += 1
    removed, done = removed_commits(source.storage), cache.commits()
    live = {part: n for part, n in source.commits().items() if (part, n) not in removed}
    with Progress("convert", len(live), "shards") as progress:
        for part, n in sorted(live.items()):
            if part in done:
                report.already += 1
            else:
                commit = read_commit(source.storage, commit_path(part, n))
                _convert_shard(source, cache, commit, report)
            progress.advance(1)
    return report


def _convert_shard(source: Cache, cache: Cache, commit: Commit, report: Converted) -> None:
    arrays = source.shard(commit).all_rows()
    for name in EDGE_OF.values():
        arrays[name] = arrays[name].astype(BY_NAME[name].dtype)
    _, meta, rollouts_hash = cache.read_part(commit.part)
    scored_by = ScoredBy(teacher_s=commit.teacher_s, scorer=commit.scorer)
    made = cache.add_shard(meta, rollouts_hash, arrays, scored_by)
    if made is None:
        report.already += 1
        return
    back = cache.shard(made).all_rows()
    for name, array in arrays.items():
        if back[name].astype(array.dtype).tobytes() != array.tobytes():
            cache.quarantine(commit.part, "not equal to the source", damaged=True)
            where = cache.storage.describe(commit_path(made.part, made.n))
            do = "The commit is in quarantine; convert again, and report this."
            raise CorruptError(where, f"{name} as in the source", "other values", do)
    report.shards.append(commit.part)
    report.source_bytes += commit.stored_bytes
    report.stored_bytes += made.stored_bytes
