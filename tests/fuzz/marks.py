"""The small files of a cache: identity, commits, marks, plans, and what runs leave."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.canary import check_canary
from stillroom.cache.claims import Claims
from stillroom.cache.commits import Commit, decode_commit
from stillroom.cache.identity import Identity
from stillroom.cache.pins import read_pin
from stillroom.cache.quarantine import damaged_commits, quarantine_path
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec
from stillroom.replay.cycle import Cycle
from stillroom.replay.policies import read_policy
from stillroom.tools.findings import Report
from stillroom.tools.verify_files import verify_file
from tests.cache.fakes import FakeTeacher
from tests.fuzz.attempt import attempt
from tests.fuzz.hostile import packed, sealed_json
from tests.fuzz.memory import objects_of, small_cache, with_objects
from tests.fuzz.mutate import mutate_bytes, mutate_sealed
from tests.tools.small_cache import DAMAGED, LIVE

FOLDERS = {"drift": "drift", "retired": "retired", "tombstone": "removed"}
"""Files that only `verify` reads."""


def paths(folder: str) -> list[str]:
    """Paths of the objects in a folder of the small cache."""
    return [entry.path for entry in small_cache("zarr").storage.list(folder)]


def samples(folder: str) -> list[bytes]:
    """The objects in a folder of the small cache."""
    return [objects_of(small_cache("zarr"))[path] for path in paths(folder)]


def _verified(kind: str, read: Callable[[Cache, str], object], data: bytes) -> None:
    """Read a file in place of the first of its kind, then verify it."""
    path = paths(kind)[0]
    changed = with_objects(small_cache("zarr"), {path: data})
    attempt(lambda: read(changed, path))
    verify_file(changed, kind, path, Report())


def _nothing(own: Cache, path: str) -> None:
    """No other reader."""


def _read_identity(data: bytes) -> None:
    identity = Identity.from_json(data, "cache.json")
    attempt(lambda: identity.check_same(small_cache("zarr").identity, "cache.json"))


def _read_commit(data: bytes) -> None:
    path = paths("commits")[0]
    commit = decode_commit(data, path, path)
    commit.row_lengths()
    for shard_format in ("zarr", "parquet"):
        own = small_cache(shard_format)
        live = own.commit_of(LIVE)
        changed = replace(
            commit,
            attempt=live.attempt,
            identity=own.identity.digest(),
            manifest_hash=live.manifest_hash,
        )
        attempt(partial(_read_shard, own, changed))


def _read_shard(own: Cache, commit: Commit) -> None:
    own.shard(commit).all_rows()


def _read_row_table(data: bytes) -> None:
    """Bytes as the compressed table, and as the table itself."""
    own = small_cache("parquet")
    live = own.commit_of(LIVE)
    for blob in (data, zlib.compress(data)):
        changed = replace(live, row_table=packed(blob))
        attempt(partial(_read_shard, own, changed))


def _row_tables() -> list[bytes]:
    table = small_cache("parquet").commit_of(LIVE).row_lengths()
    columns = (table[:, 1], table[:, 2], table[:, 0] - table[:, 1] - table[:, 2])
    raw = b"".join(column.astype("<u4").tobytes() for column in columns)
    return [raw, zlib.compress(raw)]


def _quarantined() -> bytes:
    return objects_of(small_cache("zarr"))[quarantine_path(DAMAGED, 0)]


def _read_quarantine(data: bytes) -> None:
    changed = with_objects(small_cache("zarr"), {quarantine_path(DAMAGED, 0): data})
    damaged_commits(changed.storage, {(DAMAGED, 0)})


def _read_pin(own: Cache, path: str) -> None:
    read_pin(own.storage, path)


def _take(own: Cache, path: str) -> None:
    Claims(own.storage).take(path.removeprefix("claims/").removesuffix(".json"))


def _read_policy(own: Cache, path: str) -> None:
    policy = read_policy(own.storage, 0)
    assert policy.version == 0
    folder = policy.path
    assert folder is None or Path(folder).is_absolute() or ".." not in folder.split("/")


class _Remembers(FakeTeacher):
    """Scores the canary once."""

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        if not self.read:
            self.scores = list(super().score(rows, spec))
        return iter(self.scores)


@cache
def _teacher(numeric_class: str) -> FakeTeacher:
    return _Remembers(numeric_class=numeric_class)


def _check_canary(own: Cache, path: str) -> None:
    """The canary of the teacher's own numeric class, and of another one."""
    for numeric_class in ("fake-1-float32-cpu", "other"):
        attempt(partial(check_canary, own, _teacher(numeric_class), accept_numerics=True))


def _read_plan(own: Cache, path: str) -> None:
    for unit in Cycle.from_json(own.storage.get(path), path).units:
        assert len(unit.id) == 16


def _read_plan_tokens(data: bytes) -> None:
    """Bytes as the compressed prompts of a plan."""
    [sample] = samples("units")
    value = jsonfile.load_sealed(sample, "plan")
    for blob in (data, zlib.compress(data)):
        value["prompts"] |= {"tokens": packed(blob)}
        attempt(partial(Cycle.from_json, jsonfile.dump_sealed(value), "plan"))


def _plan_tokens() -> list[bytes]:
    raw = b"".join(n.to_bytes(4, "little") for n in range(3))
    return [raw, zlib.compress(raw)]


READERS = {
    "pin": ("pins", _read_pin),
    "claim": ("claims", _take),
    "policy": ("policies", _read_policy),
    "plan": ("units", _read_plan),
} | {name: (folder, _nothing) for name, folder in FOLDERS.items()}

KINDS: dict[str, tuple[Any, ...]] = {
    name: (partial(samples, folder), partial(_verified, folder, read), mutate_sealed, sealed_json)
    for name, (folder, read) in READERS.items()
} | {
    "identity": (
        lambda: [small_cache(name).identity.to_json() for name in ("zarr", "parquet")],
        _read_identity,
        mutate_sealed,
        sealed_json,
    ),
    "commit": (lambda: samples("commits")[:1], _read_commit, mutate_sealed, sealed_json),
    "row table": (_row_tables, _read_row_table, mutate_bytes),
    "quarantine": (lambda: [_quarantined()], _read_quarantine, mutate_sealed, sealed_json),
    "canary": (
        partial(samples, "canary"),
        partial(_verified, "canary", _check_canary),
        mutate_sealed,
        sealed_json,
    ),
    "plan tokens": (_plan_tokens, _read_plan_tokens, mutate_bytes),
}
