"""`stillroom gc`: prints what may be removed from a cache and why, then removes it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tyro.conf import Positional

from stillroom.cache.collect import Collection, collect, plan_collection
from stillroom.cache.rubbish import Kept
from stillroom.cache.store import Cache
from stillroom.tools.render import print_json, say


@dataclass(frozen=True, kw_only=True, slots=True)
class Gc:
    """Remove what nobody needs: the bytes of retired parts and of replaced shards, attempts that
    were never committed, and what dead processes left. Nothing goes before it is 24 hours old by
    the storage's clock (claims of scored parts: a minute), nor while a run has pinned it."""

    root: Positional[str]
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    dry_run: bool = False
    """Print what would be removed, and remove nothing."""
    json: bool = False
    """Print JSON."""


def run_gc(job: Gc) -> int:
    """`stillroom gc`."""
    cache = Cache.open(job.root)
    plan = plan_collection(cache)
    if not job.json:
        _print_plan(plan)
    done = None if job.dry_run else collect(cache, plan)
    if job.json:
        removed = None if done is None else _as_json(done)
        print_json({"root": cache.storage.root, "planned": _as_json(plan), "removed": removed})
    elif done is None:
        say(f"gc: nothing was removed (--dry-run): {_amount(plan)} would be")
    else:
        _print_kept(done.kept)
        say(f"gc: removed {_amount(done)} of {cache.storage.root}")
    return 0


def _print_plan(plan: Collection) -> None:
    for item in plan.rubbish:
        where = item.paths[0].rpartition("/")[0] if len(item.paths) > 1 else item.paths[0]
        say(f"{item.kind} {where}, {item.size_bytes:,} bytes: {item.reason}")
    _print_kept(plan.kept)


def _print_kept(kept: Sequence[Kept]) -> None:
    for one in kept:
        say(f"kept: {one.what}: {one.why}")


def _amount(collection: Collection) -> str:
    return f"{collection.objects:,} objects, {collection.size_bytes:,} bytes"


def _as_json(collection: Collection) -> dict[str, Any]:
    return {
        **asdict(collection),
        "objects": collection.objects,
        "size_bytes": collection.size_bytes,
    }
