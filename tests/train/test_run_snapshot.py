"""A run's pin is its own: it survives a resume, and no other run of its name touches it."""

import shutil
from pathlib import Path

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.errors import CorruptError, StillroomError, StorageError
from stillroom.cache.pins import active_pins, pin_path
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.train.checkpoint import checkpoints_of, seal_folder
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
    collect_in_two_days(cache)
    assert cache.open_snapshot(first.id) == first


def checkpoint(output: Path, step: int, snapshot: Snapshot) -> Path:
    """Leave what a checkpoint says of the snapshot that its stream stands in."""
    folder = checkpoints_of(output, RUN) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    stream = {"sources": [{"snapshot": snapshot.id}]}
    progress = {"step": step, "rows": 1, "positions": 1, "loss": 1.5, "stream": stream}
    state = {**progress, "callbacks": {}, "student": "0" * 32, "settings": {}}
    (folder / "state.json").write_bytes(jsonfile.dump(state))
    seal_folder(folder)
    return folder


def collect_in_two_days(cache: Cache) -> None:
    later = cache.storage.now() + 2 * 24 * 3600
    collect(cache, plan_collection(cache, clock=lambda: later), clock=lambda: later)


def test_a_resumed_run_has_the_pin_that_it_had(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its output is reached by another way."""
    snapshot = snapshot_for(cache, tmp_path / "one", RUN)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    for output in (tmp_path / "one", tmp_path / "link", tmp_path / "link" / ".." / "one"):
        assert snapshot_for(cache, output, RUN).id == snapshot.id
    assert pinned(cache) == [[snapshot.id]]
    release_snapshot(cache.storage, tmp_path / "link", RUN)
    assert pinned(cache) == []
    assert capsys.readouterr().err == ""


def test_a_copied_output_has_a_pin_of_its_own(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two\nlines"
    first = snapshot_for(cache, one, RUN)
    shutil.copytree(one, two)
    cache.retire(make_meta(1).name, "too old")
    second = snapshot_for(cache, two, RUN)
    assert f"{two} is a copy of {one}, or was moved" in capsys.readouterr().err
    assert sorted(pinned(cache)) == sorted([[first.id], [second.id]])
    keep_snapshot(cache.storage, two, RUN, second.id)
    release_snapshot(cache.storage, two, RUN)
    collect_in_two_days(cache)
    assert cache.open_snapshot(first.id) == first
    assert capsys.readouterr().err == "", "said once"


def test_a_snapshot_is_pinned_before_it_is_opened(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gc` runs, much later than the part was retired, at the moment of opening."""
    first = cache.snapshot()
    cache.retire(make_meta(1).name, "too old")
    open_snapshot = Cache.open_snapshot

    def collect_then_open(self: Cache, snapshot_id: str) -> Snapshot:
        collect_in_two_days(cache)
        return open_snapshot(self, snapshot_id)

    monkeypatch.setattr(Cache, "open_snapshot", collect_then_open)
    assert snapshot_for(cache, tmp_path, RUN, first.id) == first


def test_snapshots_of_kept_checkpoints_stay_pinned(cache: Cache, tmp_path: Path) -> None:
    """Those that a run left behind when it followed the cache."""
    first = snapshot_for(cache, tmp_path, RUN)
    older = checkpoint(tmp_path, 10, first)
    cache.retire(make_meta(0).name, "too old")
    second = cache.snapshot()
    keep_snapshot(cache.storage, tmp_path, RUN, second.id)
    collect_in_two_days(cache)
    assert snapshot_for(cache, tmp_path, RUN) == first
    newest = checkpoint(tmp_path, 20, second)
    assert snapshot_for(cache, tmp_path, RUN) == second
    assert pinned(cache) == [sorted([first.id, second.id])]
    (newest / "state.json").write_bytes(b"x")
    keep_snapshot(cache.storage, tmp_path, RUN, first.id)
    assert pinned(cache) == [[first.id]]
    assert snapshot_for(cache, tmp_path, RUN) == first, "the one before is resumed from"
    (older / "state.json").write_bytes(b"x")
    with pytest.raises(CorruptError, match="a whole checkpoint"):
        snapshot_for(cache, tmp_path, RUN)


def test_a_damaged_pin_of_its_own_is_put_again(cache: Cache, tmp_path: Path) -> None:
    snapshot = snapshot_for(cache, tmp_path, RUN)
    cache.storage.put(pin_path(pin_name(tmp_path, RUN)), b"x")
    keep_snapshot(cache.storage, tmp_path, RUN, snapshot.id)
    assert pinned(cache) == [[snapshot.id]]


def test_runs_with_one_output_have_pins_of_their_own(tmp_path: Path) -> None:
    names = [pin_name(tmp_path, run) for run in (RUN, "run-000001", RUN)]
    assert names[0] == names[2] != names[1]
    assert [name.rpartition("-")[0] for name in names] == [RUN, "run-000001", RUN]


@pytest.mark.parametrize(
    "data", [b"", b"../../cache", b"0" * 16, b"0" * 16 + b"\n", b"0" * 15 + b"\n/", b"\xff" * 16]
)
def test_an_owner_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / OWNER_FILE).write_bytes(data)
    with pytest.raises(CorruptError, match=f"{OWNER_FILE}: expected 16 hexadecimal digits"):
        pin_name(tmp_path, RUN)


def test_an_owner_that_is_a_folder_or_has_no_place_is_named(tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).mkdir()
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(StillroomError, match=f"{OWNER_FILE}: expected a file") as raised:
            pin_name(output, RUN)
        assert isinstance(raised.value, StorageError)
