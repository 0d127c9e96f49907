"""The small files of a cache verified: each must be what its name says, and say nothing else."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.canary import read_canary
from stillroom.cache.claims import Claim, claim_path
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.id_map import read_id_map
from stillroom.cache.pins import read_pin
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import FILE as TOMBSTONE
from stillroom.replay.cycle import Cycle
from stillroom.replay.policies import open_policy, policy_path, read_policy
from stillroom.tools.findings import RESTORE, Report

FIELDS = {
    "retired": {"part": str, "reason": str},
    "removed": {"part": str, "n": int, "collector": str},
    "drift": {"run": str, "step": int, "by_policy": dict},
}


def verify_file(cache: Cache, kind: str, path: str, report: Report) -> None:
    """Verify one small file.

    Args:
        cache: the cache.
        kind: as `object_names` tells it from the path.
        path: the file.
        report: takes what is found.
    """
    report.count(kind)
    with report.watch(path), suppress(MissingError):  # claims and pins go; nothing else does
        CHECKS[kind](cache, path)
        if kind == "policies":
            _check_weights(cache, path, report)


def _check_id_map(cache: Cache, path: str) -> None:
    read_id_map(cache.storage, path.removeprefix("id_maps/").removesuffix(".json"))


def _check_canary(cache: Cache, path: str) -> None:
    read_canary(cache, path)


def _check_plan(cache: Cache, path: str) -> None:
    where = cache.storage.describe(path)
    Cycle.from_json(cache.storage.get(path), where)


def _check_claim(cache: Cache, path: str) -> None:
    claim: Claim = jsonfile.build(Claim, _read(cache, path), cache.storage.describe(path))
    _require(claim_path(claim.part) == path, path, "the claim of its name", claim.part)


def _check_pin(cache: Cache, path: str) -> None:
    read_pin(cache.storage, path)


def _check_retired(cache: Cache, path: str) -> None:
    value = _fields(cache, path, "retired")
    _require(f"retired/{value['part']}.json" == path, path, "the part of its name", value["part"])


def _check_removed(cache: Cache, path: str) -> None:
    value = _fields(cache, path, "removed")
    named = f"removed/{value['part']}.{value['n']}.{value['collector']}.json"
    same = named == path and TOMBSTONE.fullmatch(path.removeprefix("removed/")) is not None
    _require(same, path, "the commit of its name", named)


def _check_drift(cache: Cache, path: str) -> None:
    value = _fields(cache, path, "drift")
    named = f"drift/{value['run']}/{value['step']:08d}.json"
    _require(named == path, path, "the run and step of its name", named)


def _check_policy(cache: Cache, path: str) -> None:
    read_policy(cache.storage, int(path.removeprefix("policies/").removesuffix(".json")))


def _check_weights(cache: Cache, path: str, report: Report) -> None:
    """Weights elsewhere may be on another machine; those below the root are the cache's own; those
    of a student in the middle of a run were never kept."""
    version = int(path.removeprefix("policies/").removesuffix(".json"))
    folder = read_policy(cache.storage, version).path
    if folder is None:
        return
    try:
        open_policy(cache.storage, version)
    except MissingError as error:
        if not Path(folder).is_absolute():
            raise CorruptError(path, error.expected, error.got, error.do) from error
        report.note(policy_path(version), f"its weights are not at {folder} on this machine")


CHECKS: dict[str, Callable[[Cache, str], None]] = {
    "id_maps": _check_id_map,
    "canary": _check_canary,
    "units": _check_plan,
    "claims": _check_claim,
    "pins": _check_pin,
    "retired": _check_retired,
    "removed": _check_removed,
    "drift": _check_drift,
    "policies": _check_policy,
}
"""By kind; the other kinds are verified with what they belong to."""


def _read(cache: Cache, path: str) -> dict[str, Any]:
    data = cache.storage.get(path, jsonfile.MAX_BYTES)
    return jsonfile.load_sealed(data, cache.storage.describe(path))


def _fields(cache: Cache, path: str, kind: str) -> dict[str, Any]:
    value = _read(cache, path)
    found = {name: type(entry) for name, entry in value.items()}
    _require(found == FIELDS[kind], path, f"the fields {FIELDS[kind]}", f"{found}"[:200])
    return value


def _require(holds: bool, where: str, expected: str, got: str) -> None:
    if not holds:
        raise CorruptError(where, expected, got, RESTORE)
