"""Repair takes damaged shards out of use and nothing else; scoring once more completes all."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.commits import commit_path
from stillroom.cache.errors import CorruptError, StorageError
from stillroom.cache.quarantine import damaged_commits, put_quarantine, quarantine_path
from stillroom.cache.score import score
from stillroom.cache.storage import Entry, Storage
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import put_tombstone
from stillroom.tools.findings import Report
from stillroom.tools.repair import repair
from stillroom.tools.verify import verify
from stillroom.tools.verify_part import read_marks
from tests.cache.fakes import FakeTeacher, make_meta
from tests.tools.small_cache import (
    FORMATS,
    LIVE,
    OTHER,
    UNSCORED,
    attempt,
    edit,
    fill,
    flip,
    make_cache,
    shard_object,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache in each format."""
    roots = {form: tmp_path_factory.mktemp(form) / "cache" for form in FORMATS}
    for form, root in roots.items():
        make_cache(root, form)
    return roots


@pytest.fixture
def root(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(made["zarr"], tmp_path / "cache")


def run_repair(root: Path, *, deep: bool = False) -> Report:
    cache = Cache.open(root)
    report = verify(cache, deep=deep)
    repair(cache, report, deep=deep)
    return report


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("gone", ["manifest.json", "shard", "commit", "bit"])
def test_a_damaged_shard_is_scored_again(
    form: str, gone: str, made: dict[str, Path], tmp_path: Path, tree: Any
) -> None:
    root = shutil.copytree(made[form], tmp_path / "cache")
    before = Cache.open(root).read(LIVE)
    if gone == "manifest.json":
        (attempt(root, LIVE) / gone).unlink()
    elif gone == "shard":
        shard_object(root, LIVE).unlink()
    elif gone == "commit":
        flip(root / commit_path(LIVE, 0), 30)
    else:
        flip(shard_object(root, LIVE), 300)
    there = tree(root)
    report = run_repair(root)
    assert report.findings
    assert [(r.object, r.do) for r in report.repaired] == [
        (commit_path(LIVE, 0), "Run 'stillroom score', which scores its part again.")
    ]
    now = tree(root)
    assert {path for path in now if now[path] != there.get(path)} == {
        "quarantine",
        quarantine_path(LIVE, 0),
    }
    cache = Cache.open(root)
    assert damaged_commits(cache.storage) == {(LIVE, 0)}
    again = verify(cache)
    assert (again.findings, again.errors) == ([], [])
    assert any("does not open any more" in note.problem for note in again.notes)
    assert cache.unscored() == [LIVE]
    assert score(cache, FakeTeacher()).scored == [LIVE]
    assert cache.read(LIVE).keys() == before.keys()
    assert all(cache.read(LIVE)[name].tobytes() == before[name].tobytes() for name in before)


def test_it_changes_nothing_the_second_time(root: Path, tree: Any) -> None:
    flip(shard_object(root, LIVE), 300)
    assert len(run_repair(root).repaired) == 1
    before = tree(root)
    again = run_repair(root)
    assert (again.findings, again.repaired) == ([], [])
    assert tree(root) == before


def test_a_sound_cache_is_left_alone(root: Path, tree: Any) -> None:
    fill(Cache.open(root))
    before = tree(root)
    assert run_repair(root, deep=True).repaired == []
    assert tree(root) == before


def test_what_cannot_be_repaired_says_what_to_do(root: Path, tree: Any) -> None:
    fill(Cache.open(root))
    flip(root / f"rollouts/{UNSCORED}.parquet", 300)
    for folder in ("canary", "snapshots", "units", "policies"):
        flip(sorted((root / folder).glob("*.*"))[0], 20)
    before = tree(root)
    report = run_repair(root)
    assert report.repaired == []
    assert len(report.findings) == 5
    assert all(finding.do for finding in report.findings)
    assert tree(root) == before


def test_damaged_rollouts_alone_cost_no_scores(root: Path) -> None:
    flip(root / f"rollouts/{LIVE}.parquet", 300)
    report = run_repair(root)
    assert [finding.shard for finding in report.findings] == [None]
    assert report.repaired == []
    assert Cache.open(root).is_scored(LIVE)


def test_a_shard_and_its_rollouts(root: Path) -> None:
    flip(root / f"rollouts/{LIVE}.parquet", 300)
    flip(shard_object(root, LIVE), 300)
    [repaired] = run_repair(root).repaired
    assert "cannot be scored again" in repaired.do
    assert "retire" in repaired.do


def test_a_retired_part(root: Path) -> None:
    Cache.open(root).retire(LIVE, "too old")
    flip(shard_object(root, LIVE), 300)
    [repaired] = run_repair(root).repaired
    assert "retired" in repaired.do
    assert Cache.open(root).unscored() == []


def test_a_second_live_commit_is_set_aside(root: Path) -> None:
    """Its bytes are right, so snapshots that name it still open."""
    first, second = (root / commit_path(LIVE, n) for n in (0, 1))
    second.write_bytes(first.read_bytes())
    edit(second, lambda value: value.update(n=1))
    cache = Cache.open(root)
    [snapshot] = cache.storage.list("snapshots")
    [repaired] = run_repair(root).repaired
    assert repaired.object == commit_path(LIVE, 1)
    assert damaged_commits(cache.storage) == set()
    assert cache.commits()[LIVE] == 0
    assert cache.is_scored(LIVE)
    cache.open_snapshot(snapshot.path.split("/")[1].removesuffix(".parquet"))
    assert verify(cache).findings == []


@pytest.mark.parametrize("second", [False, True])
def test_a_commit_of_another_identity_is_left_alone(root: Path, tree: Any, second: bool) -> None:
    """Also where it is live and a commit of this cache stands behind it."""
    path = root / commit_path(LIVE, 0)
    if second:
        (root / commit_path(LIVE, 1)).write_bytes(path.read_bytes())
        edit(root / commit_path(LIVE, 1), lambda value: value.update(n=1))
    edit(path, lambda value: value.update(identity="0" * 32))
    before = tree(root)
    report = run_repair(root)
    assert report.repaired == []
    assert tree(root) == before
    [finding] = [one for one in report.findings if one.object == commit_path(LIVE, 0)]
    assert "Restore the commit or cache.json" in finding.do


def test_a_wrong_identity_repairs_nothing(root: Path, tree: Any) -> None:
    edit(root / "cache.json", lambda value: value.update(temperature=0.5))
    before = tree(root)
    assert run_repair(root).repaired == []
    assert tree(root) == before


def test_damage_that_is_gone_when_it_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that returned wrong bytes once is no reason to score again."""
    get_ranges, lies = Storage.get_ranges, [True]

    def lying(self: Storage, path: str, *args: Any) -> list[bytes]:
        found = get_ranges(self, path, *args)
        return [bytes(len(found[0]))] if LIVE in path and lies and lies.pop() else found

    monkeypatch.setattr(Storage, "get_ranges", lying)
    report = run_repair(root)
    assert len(report.findings) == 1
    assert report.repaired == []
    assert [note.object for note in report.notes] == [commit_path(LIVE, 0)]
    assert Cache.open(root).is_scored(LIVE)


def test_a_storage_that_fails_at_the_second_look(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(shard_object(root, LIVE), 300)
    cache = Cache.open(root)
    report = verify(cache)

    def failing(self: Storage, path: str, *args: Any) -> list[bytes]:
        raise StorageError(path, "to read it", "a timeout", "Try again.")

    monkeypatch.setattr(Storage, "get_ranges", failing)
    repair(cache, report, deep=False)
    assert report.repaired == []
    assert len(report.errors) == 1
    assert cache.is_scored(LIVE)


def test_what_was_set_aside_before_a_failure_stays_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are looked at and set aside one after the other."""
    for part in (LIVE, OTHER):
        flip(shard_object(root, part), 300)
    cache = Cache.open(root)
    report = verify(cache)
    first, last = sorted((LIVE, OTHER))
    list_objects, looked = Storage.list, list[str]()

    def failing(self: Storage, prefix: str) -> list[Entry]:
        if prefix.startswith("commits"):
            looked.append(prefix)
        if len(looked) == 2:
            raise StorageError(prefix, "to list it", "a timeout", "Try again.")
        return list_objects(self, prefix)

    monkeypatch.setattr(Storage, "list", failing)
    with pytest.raises(StorageError):
        repair(cache, report, deep=False)
    monkeypatch.undo()
    assert damaged_commits(cache.storage) == {(first, 0)}
    assert [one.object for one in run_repair(root).repaired] == [commit_path(last, 0)]


def test_bytes_that_gc_removes_during_the_second_look_are_not_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, tree: Any
) -> None:
    flip(shard_object(root, LIVE), 300)
    cache = Cache.open(root)
    report = verify(cache)
    list_objects = Storage.list

    def collecting(self: Storage, prefix: str) -> list[Entry]:
        found = list_objects(self, prefix)
        if prefix == "removed" and not found:
            put_tombstone(cache.storage, LIVE, 0, "0" * 32)
            shard_object(root, LIVE).unlink()
        return found

    monkeypatch.setattr(Storage, "list", collecting)
    repair(cache, report, deep=False)
    assert report.repaired == []
    assert not (root / quarantine_path(LIVE, 0)).exists()


def test_another_process_repaired_it_meanwhile(root: Path) -> None:
    flip(shard_object(root, LIVE), 300)
    cache = Cache.open(root)
    report = verify(cache)
    run_repair(root)
    score(cache, FakeTeacher())
    repair(cache, report, deep=False)
    assert report.repaired == []
    assert cache.commits()[LIVE] == 1
    assert damaged_commits(cache.storage) == {(LIVE, 0)}


def test_the_command_says_what_it_did(root: Path, run: Any) -> None:
    [snapshot] = [path.stem for path in (root / "snapshots").iterdir()]
    flip(shard_object(root, OTHER), 300)
    ran = run("verify", root, "--repair")
    assert ran.status == 1
    assert f"repaired: {commit_path(OTHER, 0)}: put into quarantine" in ran.out
    assert "Run 'stillroom score'" in ran.out
    assert "repaired: 1" in ran.out.splitlines()[-1]
    assert run("verify", root, "--repair").status == 0
    with pytest.raises(CorruptError, match="damaged"):
        Cache.open(root).open_snapshot(snapshot)


def test_the_second_look_reads_the_marks_of_its_own_part_only(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(root)
    for part in (LIVE, OTHER):
        flip(shard_object(root, part), 300)
    for number in range(50, 55):
        put_quarantine(cache.storage, make_meta(number).name, 0, "again", damaged=False)
    report = verify(cache)
    asked: list[str] = []
    get, list_objects = Storage.get, Storage.list

    def noting(self: Storage, path: str, *args: Any) -> bytes:
        asked.append(path)
        return get(self, path, *args)

    def noting_lists(self: Storage, prefix: str) -> list[Entry]:
        asked.append(prefix)
        return list_objects(self, prefix)

    monkeypatch.setattr(Storage, "get", noting)
    monkeypatch.setattr(Storage, "list", noting_lists)
    read_marks(cache, Report())
    marks = [path for path in asked if path.startswith("quarantine")]
    assert len(marks) == len(set(marks)) == 6, "one listing, and each file once"
    asked.clear()
    repair(cache, report, deep=False)
    assert len(report.repaired) == 2
    assert {path for path in asked if path.startswith("quarantine")} == {
        quarantine_path(LIVE, 0),
        quarantine_path(OTHER, 0),
    }
