"""Which objects a cache may hold, told from their names."""

import re

from stillroom.cache import attempt
from stillroom.cache.commits import FILE, commit_path
from stillroom.cache.part import NAME as PART
from stillroom.cache.storage_entry import NAME as SAFE
from stillroom.cache.tombstones import FILE as TOMBSTONE

HASH = "[0-9a-f]{32}"
KINDS = {
    "identity": r"cache\.json",
    "id_maps": rf"id_maps/{HASH}\.json",
    "canary": rf"canary/{SAFE}\.json",
    "units": rf"units/{SAFE}\.json",
    "rollouts": rf"rollouts/{PART.pattern}\.parquet",
    "claims": rf"claims/{PART.pattern}\.json",
    "commits": rf"commits/v\d{{6,9}}/{FILE.pattern}",
    "quarantine": rf"quarantine/{FILE.pattern}",
    "retired": rf"retired/{PART.pattern}\.json",
    "removed": rf"removed/{TOMBSTONE.pattern}",
    "snapshots": rf"snapshots/{HASH}\.parquet",
    "pins": rf"pins/{SAFE}\.json",
    "policies": r"policies/\d{6,9}\.json",
    "weights": rf"policies/v\d{{6,9}}-{HASH}/.+",
    "drift": rf"drift/{SAFE}/\d{{8,}}\.json",
    "probe": rf"probe/{HASH}",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


def rollouts_path(part: str) -> str:
    """Object of a part."""
    return f"rollouts/{part}.parquet"


def kind_of(path: str, shard_object: str) -> str | None:
    """What an object is, or None if a cache holds none of that name.

    Args:
        path: below the root.
        shard_object: name of a shard's object in the cache's format.
    """
    if path.startswith("scores/"):
        _, part, own_attempt, name = [*path.split("/", 3), "", "", ""][:4]
        known = name in ("manifest.json", shard_object)
        named = PART.fullmatch(part) and attempt.NAME.fullmatch(own_attempt)
        return "scores" if known and named else None
    kind = next((kind for kind, p in _PATTERNS.items() if p.fullmatch(path)), None)
    return None if kind == "commits" and not _is_in_place(path) else kind


def _is_in_place(path: str) -> bool:
    match = FILE.fullmatch(path.rsplit("/", 1)[1])
    return match is not None and commit_path(match[1], int(match[2])) == path
