"""Verification finds every damage, names the object, and finds nothing in a sound cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.commits import commit_path
from stillroom.cache.errors import StorageError
from stillroom.cache.storage import Entry, Storage
from stillroom.cache.store import Cache
from stillroom.replay.policies import record_unkept
from stillroom.tools.verify import verify
from tests.cache.fakes import make_meta
from tests.tools import small_cache
from tests.tools.small_cache import (
    AGAIN,
    DAMAGED,
    GONE,
    LIVE,
    OTHER,
    RETIRED,
    UNSCORED,
    attempt,
    edit,
    fill,
    flip,
    make_cache,
    shard_object,
)

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with an object of every kind."""
    root = tmp_path_factory.mktemp("made") / "cache"
    fill(make_cache(root, "zarr"))
    return root


@pytest.fixture(scope="module")
def made_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of Parquet shards."""
    root = tmp_path_factory.mktemp("made") / "cache"
    make_cache(root, "parquet")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of the first, to be damaged."""
    return shutil.copytree(made, tmp_path / "cache")


@pytest.fixture
def parquet_root(made_parquet: Path, tmp_path: Path) -> Path:
    """A copy of the second."""
    return shutil.copytree(made_parquet, tmp_path / "cache")


def found(root: Path, **settings: Any) -> list[str]:
    """Findings, one line each."""
    report = verify(Cache.open(root), **settings)
    assert report.errors == []
    return [f"{finding.object}: {finding.problem}" for finding in report.findings]


def rollouts(root: Path, part: str = LIVE) -> Path:
    return root / "rollouts" / f"{part}.parquet"


def commit_file(root: Path, part: str = LIVE, n: int = 0) -> Path:
    return root / commit_path(part, n)


def only(root: Path, folder: str) -> Path:
    return sorted((root / folder).iterdir())[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def copy(one: Path, other: Path) -> None:
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(one.read_bytes())


def copy_attempt(root: Path) -> None:
    folder = attempt(root, LIVE)
    shutil.copytree(folder, folder.with_name("a" * 32))


SHARD_DAMAGES: list[tuple[str, Damage, str]] = [
    ("a flipped bit of a shard", lambda r: flip(shard_object(r, LIVE), 1000), "scores/"),
    ("a shard cut short", lambda r: truncate(shard_object(r, LIVE)), "scores/"),
    ("a shard emptied", lambda r: shard_object(r, LIVE).write_bytes(b""), "scores/"),
    ("a shard gone", lambda r: shard_object(r, LIVE).unlink(), "scores/"),
    ("two shards swapped", lambda r: swap(shard_object(r, LIVE), shard_object(r, OTHER)), "scores"),
]  # fmt: skip
DAMAGES: list[tuple[str, Damage, str]] = [
    *SHARD_DAMAGES,
    ("a shard of a retired part", lambda r: flip(shard_object(r, RETIRED), 100), "scores/"),
    ("a manifest", lambda r: flip(attempt(r, LIVE) / "manifest.json", 50), "manifest.json"),
    ("a manifest gone", lambda r: (attempt(r, LIVE) / "manifest.json").unlink(), "manifest.json"),
    ("a commit", lambda r: flip(commit_file(r), 20), commit_path(LIVE, 0)),
    ("a commit emptied", lambda r: commit_file(r).write_bytes(b""), commit_path(LIVE, 0)),
    ("a commit gone", lambda r: commit_file(r).unlink(), commit_path(LIVE, 0)),
    ("two commits swapped", lambda r: swap(commit_file(r), commit_file(r, OTHER)), "commits/"),
    ("rollouts", lambda r: flip(rollouts(r), 300), f"rollouts/{LIVE}"),
    ("rollouts gone", lambda r: rollouts(r).unlink(), f"rollouts/{LIVE}"),
    ("rollouts to be scored", lambda r: flip(rollouts(r, UNSCORED), -9), f"rollouts/{UNSCORED}"),
    ("two parts swapped", lambda r: swap(rollouts(r), rollouts(r, OTHER)), "rollouts/"),
    ("a snapshot", lambda r: flip(only(r, "snapshots"), 99), "snapshots/"),
    ("a canary", lambda r: flip(only(r, "canary"), 99), "canary/"),
    ("a plan", lambda r: flip(r / "units/v000000.json", 9), "units/"),
    ("a policy", lambda r: flip(r / "policies/000000.json", 9), "policies/"),
    ("a drift record", lambda r: flip(r / "drift/run/00000007.json", 9), "drift/"),
    ("a claim", lambda r: flip(only(r, "claims"), 9), "claims/"),
    ("a pin", lambda r: flip(r / "pins/run.json", 9), "pins/"),
    ("a retired mark", lambda r: flip(r / f"retired/{RETIRED}.json", 9), "retired/"),
    ("a mark in quarantine", lambda r: flip(only(r, "quarantine"), 9), "quarantine/"),
    ("a tombstone", lambda r: flip(only(r, "removed"), 9), "removed/"),
    ("an unknown name", lambda r: (r / "notes.txt").write_text("x"), "notes.txt"),
    ("a name of another program", lambda r: (r / "commits/a copy").write_text("x"), "commits/a"),
    ("a copied commit", lambda r: copy(commit_file(r), commit_file(r, n=1)), "commits/"),
    ("a misplaced commit", lambda r: copy(commit_file(r), r / "commits/x.0.json"), "commits/x"),
    ("a copied part", lambda r: copy(rollouts(r), rollouts(r, "v000000-" + "9" * 16)), "rollouts/"),
    ("a copied attempt", copy_attempt, "a" * 32),
    ("a copied snapshot", lambda r: copy(only(r, "snapshots"), r / f"snapshots/{'b' * 32}.parquet"),
     "b" * 32),
    ("a copied plan", lambda r: copy(r / "units/v000000.json", r / "units/v000001.json"), "units/"),
    ("a copied canary", lambda r: copy(only(r, "canary"), r / "canary/z.json"), "canary/z"),
    ("a copied policy", lambda r: copy(r / "policies/000000.json", r / "policies/000001.json"),
     "policies/000001"),
    ("a copied mark", lambda r: copy(r / f"retired/{RETIRED}.json", r / f"retired/{OTHER}.json"),
     f"retired/{OTHER}"),
    ("an index beside a shard", lambda r: (attempt(r, LIVE) / "more").write_text("x"), "/more"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "name"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES]
)
def test_damage_is_found_and_named(root: Path, damage: Damage, name: str, tree: Any) -> None:
    damage(root)
    before = tree(root)
    lines = found(root)
    assert [line for line in lines if name in line.split(": ")[0]], lines
    assert tree(root) == before


@pytest.mark.parametrize(
    ("damage", "name"),
    [case[1:] for case in SHARD_DAMAGES],
    ids=[case[0] for case in SHARD_DAMAGES],
)
def test_damage_of_a_parquet_shard(parquet_root: Path, damage: Damage, name: str) -> None:
    damage(parquet_root)
    lines = found(parquet_root)
    assert [line for line in lines if name in line.split(": ")[0]], lines


def test_a_sound_cache_has_no_findings(made: Path, tree: Any) -> None:
    before = tree(made)
    for deep in (False, True):
        report = verify(Cache.open(made), deep=deep)
        assert (report.findings, report.errors) == ([], [])
        assert report.checked["shards"] == 6
        assert report.checked["commits"] == 7
        assert report.checked["parts"] == 6
    assert tree(made) == before


def test_a_sound_parquet_cache_has_no_findings(made_parquet: Path) -> None:
    for deep in (False, True):
        assert found(made_parquet, deep=deep) == []


def test_a_student_whose_weights_nobody_kept_is_no_finding(made: Path, tmp_path: Path) -> None:
    root = shutil.copytree(made, tmp_path / "cache")
    before = verify(Cache.open(root))
    record_unkept(Cache.open(root).storage, run="run", parent=0, step=4)
    after = verify(Cache.open(root))
    assert (after.findings, after.notes) == (before.findings, before.notes)


def test_what_harms_no_reader_is_noted(made: Path) -> None:
    notes = [f"{note.object}: {note.problem}" for note in verify(Cache.open(made)).notes]
    expected = [
        f"{commit_path(DAMAGED, 0)}: in quarantine as damaged",
        f"{commit_path(GONE, 0)}: its bytes were removed by gc",
        "policies/000000.json: its weights are not at",
        f"scores/{UNSCORED}/{'e' * 32}: an attempt that no commit names",
    ]
    assert len(notes) == len(expected)
    assert all(a.startswith(b) for a, b in zip(notes, expected, strict=True)), notes


def test_the_order_of_findings_is_fixed(root: Path) -> None:
    for part in (LIVE, OTHER, RETIRED, AGAIN):
        flip(shard_object(root, part), 500)
    once = found(root, threads=1)
    assert once == found(root, threads=8)
    assert [line.split("/")[1] for line in once] == [LIVE, OTHER, RETIRED, AGAIN]


def test_one_part_alone(root: Path) -> None:
    flip(shard_object(root, LIVE), 500)
    flip(only(root, "canary"), 99)
    assert found(root, part=OTHER) == []
    assert len(found(root, part=LIVE)) == 1


def test_a_second_live_commit(root: Path) -> None:
    first, second = commit_file(root), commit_file(root, n=1)
    copy(first, second)
    edit(second, lambda value: value.update(n=1))
    [line] = found(root)
    assert line == f"{commit_path(LIVE, 1)}: a second live commit besides n = 0, which readers take"


def test_a_commit_behind_one_that_is_gone(root: Path) -> None:
    """Readers do not take it, and the part is to be scored."""
    commit_file(root).rename(commit_file(root, n=1))
    edit(commit_file(root, n=1), lambda value: value.update(n=1))
    assert LIVE not in Cache.open(root).commits()
    lines = found(root, part=LIVE)
    assert lines == [
        f"{commit_path(LIVE, 1)}: not live: commit 0 is neither there nor in quarantine"
    ]


def test_a_commit_of_another_cache(root: Path) -> None:
    edit(commit_file(root), lambda value: value.update(identity="0" * 32))
    lines = found(root)
    assert any(line.startswith(f"{commit_path(LIVE, 0)}: of the identity 000") for line in lines)
    assert not any(line.startswith("cache.json") for line in lines)


def test_another_identity_is_the_fault_of_no_shard(root: Path) -> None:
    edit(root / "cache.json", lambda value: value.update(temperature=0.5))
    report = verify(Cache.open(root))
    assert any(finding.object == "cache.json" for finding in report.findings)
    assert all(finding.shard is None for finding in report.findings)


def test_a_commit_changed_after_a_snapshot(root: Path) -> None:
    edit(commit_file(root), lambda value: value.update(teacher_s=3.5))
    lines = found(root)
    assert lines
    assert all(line.startswith("snapshots/") and commit_path(LIVE, 0) in line for line in lines)


def test_bytes_that_gc_removes_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there when the marks are read, and gone when the shard is."""
    cache, removed = Cache.open(root), cache_of_gc(root)
    get_ranges = Storage.get_ranges

    def racing(self: Storage, path: str, *args: Any) -> list[bytes]:
        if path.startswith(f"scores/{LIVE}"):
            removed()
        return get_ranges(self, path, *args)

    monkeypatch.setattr(Storage, "get_ranges", racing)
    report = verify(cache, part=LIVE)
    assert report.findings == []
    assert [note.problem for note in report.notes] == ["its bytes are being removed by gc"]


def test_the_marks_of_gc_are_listed_as_often_for_four_damaged_shards_as_for_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, real = list[str](), Storage.list

    def noting(self: Storage, prefix: str) -> list[Entry]:
        listed.append(prefix)
        return real(self, prefix)

    def looks(parts: tuple[str, ...]) -> int:
        cache = Cache.open(shutil.copytree(root, root.with_name(f"copy-{len(parts)}")))
        for part in parts:
            flip(shard_object(cache.storage.folder, part), 500)
        before = listed.count("removed")
        assert len(verify(cache).findings) == len(parts)
        return listed.count("removed") - before

    monkeypatch.setattr(Storage, "list", noting)
    assert looks((LIVE, OTHER, RETIRED, AGAIN)) == looks((LIVE,))


def cache_of_gc(root: Path) -> Callable[[], None]:
    """What gc does to a part, as another process would."""
    from stillroom.cache.tombstones import put_tombstone

    storage, path = Storage(root), shard_object(root, LIVE)

    def remove() -> None:
        put_tombstone(storage, LIVE, 0, "c" * 32)
        path.unlink(missing_ok=True)

    return remove


def test_a_failing_storage_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, get = Cache.open(root), Storage.get

    def failing(self: Storage, path: str, max_bytes: int | None = None) -> bytes:
        if path.endswith("manifest.json"):
            raise StorageError(path, "to read it", "a timeout", "Try again.")
        return get(self, path, max_bytes)

    monkeypatch.setattr(Storage, "get", failing)
    report = verify(cache, part=LIVE)
    assert report.findings == []
    assert [error.object.split("/")[1] for error in report.errors] == [LIVE]


def test_the_command(root: Path, run: Any) -> None:
    ran = run("verify", root, "--deep", "--threads", 2)
    assert (ran.status, ran.err) == (0, "")
    assert "no findings" in ran.out
    flip(shard_object(root, LIVE), 500)
    ran = run("verify", root)
    assert (ran.status, ran.err) == (1, "")
    assert "1 finding" in ran.out.splitlines()[-1]
    value = run("verify", root, "--part", LIVE, "--json").json()
    assert [finding["shard"] for finding in value["findings"]] == [[LIVE, 0]]
    assert run("verify", root, "--part", "v000009-" + "0" * 16).status == 2
    assert run("verify", root, "--threads", 0).status == 2


def test_a_damaged_identity_is_an_error_that_names_it(root: Path, run: Any) -> None:
    flip(root / "cache.json", 5)
    ran = run("verify", root)
    assert ran.status == 2
    assert "cache.json" in ran.err


def test_a_missing_cache_is_no_finding(tmp_path: Path, run: Any) -> None:
    ran = run("verify", tmp_path / "nothing")
    assert ran.status == 2
    assert ran.err.startswith("stillroom: error: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("name", ["root", "parquet_root"])
def test_deep_names_every_damaged_column(name: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(name)
    path = shard_object(root, LIVE)
    arrays = json.loads((attempt(root, LIVE) / "manifest.json").read_bytes())["arrays"]
    names = ("rollout_id", "tail_logprob", "group")
    for name in names:
        flip(path, arrays[name]["chunks"][0][0] + 2)
    problems = [line.split(": ", 1)[1] for line in found(root, deep=True)]
    assert problems[0].startswith("object: expected hash")
    assert all(any(problem.startswith(name) for problem in problems) for name in names), problems


def test_rollouts_that_are_not_those_that_were_scored(root: Path) -> None:
    edit(commit_file(root), lambda value: value.update(rollouts_hash="0" * 32))
    report = verify(Cache.open(root), part=LIVE, deep=True)
    [finding] = report.findings
    assert finding.object == f"rollouts/{LIVE}.parquet"
    assert finding.shard is None
    assert jsonfile.digest(rollouts(root).read_bytes()) in finding.problem


def test_a_rollout_id_of_two_parts_is_found(root: Path) -> None:
    cache = Cache.open(root)
    number = int(LIVE[-16:], 16)
    rows = small_cache.rollouts(number)
    table = pa.concat_tables([rows.slice(1, 2), small_cache.rollouts(99)])
    cache.add_part(table, make_meta(99))
    part, twice = make_meta(99).name, rows["rollout_id"][1]
    (finding,) = verify(cache).findings
    assert finding.object == f"rollouts/{part}.parquet"
    assert finding.problem == f"2 rollout ids that others have, {twice} in {LIVE} too"
    cache.retire(part, "twice")
    assert verify(cache).findings == []
