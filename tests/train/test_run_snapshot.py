"""A run's pin is its own: it survives a resume, and no other run of its name touches it."""

import shutil
from pathlib import Path

import pytest

from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.errors import CorruptError
from stillroom.cache.pins import active_pins
from stillroom.cache.store import Cache
from stillroom.train.run_snapshot import (
    OWNER_FILE,
    keep_snapshot,
    pin_name,
    release_snapshot,
    snapshot_for,
)
from tests.cache.fakes import commit_shard, make_identity, make_meta, random_arrays

RUN = "run-000000"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Two scored parts."""
    cache = Cache.create(tmp_path / "root", make_identity())
    for number in range(2):
        commit_shard(cache, random_arrays(number, 12, 4), number)
    return cache


def pinned(cache: Cache) -> list[list[str]]:
    """What each pin keeps, in the order of their names."""
    return [found.snapshots for _, found in sorted(active_pins(cache.storage).items())]


def test_runs_of_one_name_with_other_outputs_have_pins_of_their_own(
    cache: Cache, tmp_path: Path
) -> None:
    first = snapshot_for(cache, tmp_path / "one", RUN)
    cache.retire(make_meta(1).name, "too old")
    second = snapshot_for(cache, tmp_path / "two", RUN)
    assert first.id != second.id
    assert sorted(pinned(cache)) == sorted([[first.id], [second.id]])
    keep_snapshot(cache.storage, tmp_path / "two", RUN, second.id)
    release_snapshot(cache.storage, tmp_path / "two", RUN)
    assert pinned(cache) == [[first.id]]
    later = cache.storage.now() + 2 * 24 * 3600
    collect(cache, plan_collection(cache, clock=lambda: later), clock=lambda: later)
    assert cache.open_snapshot(first.id) == first


def test_a_resumed_run_has_the_pin_that_it_had(cache: Cache, tmp_path: Path) -> None:
    """Also where its output is mounted elsewhere."""
    snapshot = snapshot_for(cache, tmp_path / "one", RUN)
    shutil.move(tmp_path / "one", tmp_path / "elsewhere")
    assert snapshot_for(cache, tmp_path / "elsewhere", RUN).id == snapshot.id
    assert pinned(cache) == [[snapshot.id]]
    release_snapshot(cache.storage, tmp_path / "elsewhere", RUN)
    assert pinned(cache) == []


def test_runs_with_one_output_have_pins_of_their_own(tmp_path: Path) -> None:
    names = [pin_name(tmp_path, run) for run in (RUN, "run-000001", RUN)]
    assert names[0] == names[2] != names[1]
    assert [name.rpartition("-")[0] for name in names] == [RUN, "run-000001", RUN]


@pytest.mark.parametrize("data", [b"", b"../../cache", b"0" * 15 + b"\n", b"\xff" * 16])
def test_an_owner_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / OWNER_FILE).write_bytes(data)
    with pytest.raises(CorruptError, match=f"{OWNER_FILE}: expected 16 hexadecimal digits"):
        pin_name(tmp_path, RUN)
