"""Snapshots: the same list has the same name, and what is gone is named at opening."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import jsonfile
from stillroom.cache import snapshot as snapshots
from stillroom.cache.commits import Commit, attempt_path, commit_path
from stillroom.cache.errors import CorruptError, MissingError, StillroomError
from stillroom.cache.snapshot import Snapshot, make_snapshot, open_snapshot, snapshot_path
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import put_tombstone
from tests.cache.conftest import QUICK
from tests.cache.fakes import commit_shard, make_meta, random_arrays

NAMES = [make_meta(number).name for number in range(4)]


@pytest.fixture
def commits(cache: Cache) -> list[Commit]:
    """Three committed parts."""
    return [commit_shard(cache, random_arrays(i, 10 + i, 2 + i), i) for i in (2, 0, 1)]


def fixed_commit(part: str, rows: int) -> Commit:
    """A commit of which every field is known."""
    return Commit(
        part=part,
        n=0,
        attempt="a" * 32,
        identity="b" * 32,
        manifest_hash="c" * 32,
        rollouts_hash="d" * 32,
        rows=rows,
        positions=10 * rows,
        tokens=20 * rows,
        teacher_prompt_tokens=0,
        stored_bytes=1000,
        teacher_s=2.5,
        scorer={"host": "h", "pid": 1},
        row_table="AAAA",
    )


def plant(root: Path, commit: Commit) -> None:
    """Write a commit and a shard of two bytes by hand, as puts wait for the disk."""
    folder = attempt_path(commit.part, commit.attempt)
    files = {f"{folder}/manifest.json": b"1", f"{folder}/shard": b"2"}
    commit = replace(commit, stored_bytes=2)
    for path, data in {commit_path(commit.part, commit.n): commit.to_json(), **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def test_the_id_of_a_fixed_list_is_pinned() -> None:
    commits = (fixed_commit(NAMES[0], 3), fixed_commit(NAMES[1], 4))
    assert Snapshot(commits).id == "f1eb353921b292322c75cac97bbdfb5f"
    assert Snapshot(()).id == "39347ff402b6c53d831154110e30ac6a"


def test_the_id_tells_lists_apart() -> None:
    one, two = fixed_commit(NAMES[0], 3), fixed_commit(NAMES[1], 4)
    lists = [(), (one,), (two,), (one, two), (two, one), (replace(one, n=1),)]
    lists += [(replace(one, attempt="e" * 32),), (replace(one, teacher_s=2.0),)]
    assert len({Snapshot(commits).id for commits in lists}) == len(lists)


def test_it_holds_all_scored_parts_in_the_order_of_their_names(
    cache: Cache, commits: list[Commit]
) -> None:
    snapshot = cache.snapshot()
    assert [c.part for c in snapshot.commits] == NAMES[:3]
    assert {c.digest() for c in snapshot.commits} == {c.digest() for c in commits}
    assert snapshot.rows == 2 + 3 + 4
    assert snapshot.positions == 10 + 11 + 12


def test_a_stored_snapshot_opens_as_it_was(cache: Cache, commits: list[Commit]) -> None:
    snapshot = cache.snapshot()
    assert cache.snapshot().id == snapshot.id
    commit_shard(cache, random_arrays(9, 5, 1), 3)
    assert Cache.open(cache.storage.root).open_snapshot(snapshot.id) == snapshot
    assert len(cache.snapshot().commits) == 4
    assert len(cache.storage.list("snapshots")) == 2


def test_parts_can_be_named(cache: Cache, commits: list[Commit]) -> None:
    snapshot = cache.snapshot([NAMES[2], NAMES[0]])
    assert [c.part for c in snapshot.commits] == [NAMES[0], NAMES[2]]
    with pytest.raises(MissingError, match=f"^part {NAMES[3]}: expected a commit"):
        cache.snapshot([NAMES[0], NAMES[3]])


def test_retired_parts_are_left_out_of_new_ones_and_kept_in_old_ones(
    cache: Cache, commits: list[Commit]
) -> None:
    old = cache.snapshot()
    cache.retire(NAMES[1], "too old")
    cache.retire(NAMES[1], "again")
    assert cache.retired() == {NAMES[1]}
    assert [c.part for c in cache.snapshot().commits] == [NAMES[0], NAMES[2]]
    assert cache.open_snapshot(old.id) == old
    assert [c.part for c in cache.snapshot([NAMES[1]]).commits] == [NAMES[1]]


def test_a_quarantined_shard_is_replaced_in_new_ones(cache: Cache, commits: list[Commit]) -> None:
    old = cache.snapshot()
    cache.storage.put_new(f"quarantine/{NAMES[0]}.0.json", b"{}")
    assert [c.part for c in cache.snapshot().commits] == NAMES[1:3]
    again = commit_shard(cache, random_arrays(0, 10, 2), 0)
    new = cache.snapshot()
    assert new.commits[0] == again
    assert new.id != old.id


def test_an_empty_cache_has_an_empty_one(cache: Cache) -> None:
    snapshot = cache.snapshot()
    assert (snapshot.rows, snapshot.positions) == (0, 0)
    assert cache.open_snapshot(snapshot.id) == snapshot


def test_an_unknown_snapshot_is_missing(cache: Cache) -> None:
    with pytest.raises(MissingError, match=re.escape(snapshot_path("0" * 32))):
        cache.open_snapshot("0" * 32)


def test_it_needs_no_commit_beside_it(cache: Cache, root: Path, commits: list[Commit]) -> None:
    snapshot = cache.snapshot()
    for path in (root / "commits").rglob("*.json"):
        path.unlink()
    assert cache.open_snapshot(snapshot.id) == snapshot


@pytest.mark.parametrize("few", [0, 256])
def test_a_part_whose_bytes_are_gone_is_named(
    cache: Cache, root: Path, commits: list[Commit], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "FEW", few)
    snapshot = cache.snapshot()
    folder = root / attempt_path(NAMES[1], snapshot.commits[1].attempt)
    for path in sorted(folder.iterdir()):
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(MissingError, match=f"expected the part {NAMES[1]}; got no ") as caught:
            cache.open_snapshot(snapshot.id)
        assert f"{attempt_path(NAMES[1], snapshot.commits[1].attempt)}/manifest.json" in str(
            caught.value
        )
        path.write_bytes(kept[:-1])
        with pytest.raises(CorruptError, match=f"bytes of the part {NAMES[1]}"):
            cache.open_snapshot(snapshot.id)
        path.write_bytes(kept)
        assert cache.open_snapshot(snapshot.id) == snapshot


def test_a_damaged_part_is_not_opened_again(cache: Cache, commits: list[Commit]) -> None:
    snapshot = cache.snapshot()
    cache.quarantine(NAMES[2], "to be scored by another teacher", damaged=False)
    assert cache.open_snapshot(snapshot.id) == snapshot
    cache.quarantine(NAMES[1], "a flipped bit", damaged=True)
    with pytest.raises(CorruptError, match=f"commit 0 of {NAMES[1]}, which was found damaged"):
        cache.open_snapshot(snapshot.id)
    assert [c.part for c in cache.snapshot().commits] == [NAMES[0]]


def test_a_part_whose_bytes_were_removed_on_purpose_is_named(
    cache: Cache, commits: list[Commit]
) -> None:
    snapshot = cache.snapshot()
    cache.retire(NAMES[1], "too old")
    put_tombstone(cache.storage, NAMES[1], 0, "c" * 32)
    with pytest.raises(MissingError, match=f"the part {NAMES[1]}; got that its bytes were removed"):
        cache.open_snapshot(snapshot.id)
    with pytest.raises(MissingError, match=f"the part {NAMES[1]}; got that its bytes were removed"):
        cache.snapshot([NAMES[1]])
    assert [c.part for c in cache.snapshot().commits] == [NAMES[0], NAMES[2]]


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Earlier snapshots are used however few the commits are; the paths that are read."""
    read: list[str] = []
    get, get_many = Storage.get, Storage.get_many

    def recorded(self: Storage, path: str, max_bytes: int | None = None) -> bytes:
        read.append(path)
        return get(self, path, max_bytes)

    def recorded_many(
        self: Storage, paths: Sequence[str], max_bytes: int | None = None
    ) -> list[bytes | StillroomError]:
        read.extend(paths)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Storage, "get", get)
            return get_many(self, paths, max_bytes)

    monkeypatch.setattr(snapshots, "FEW", 0)
    monkeypatch.setattr(snapshots, "AT_ONCE", 2)
    monkeypatch.setattr(Storage, "get", recorded)
    monkeypatch.setattr(Storage, "get_many", recorded_many)
    return read


def test_only_new_commits_are_read(
    cache: Cache, commits: list[Commit], checkpoints: list[str]
) -> None:
    first = cache.snapshot()
    assert sorted(checkpoints) == [commit_path(name, 0) for name in NAMES[:3]]
    new = commit_shard(cache, random_arrays(9, 5, 1), 3)
    checkpoints.clear()
    second = cache.snapshot()
    assert checkpoints == [snapshot_path(first.id), commit_path(NAMES[3], 0)]
    assert second.commits == (*first.commits, new)
    checkpoints.clear()
    assert cache.snapshot() == second
    assert cache.open_snapshot(second.id) == second
    assert {path.split("/")[0] for path in checkpoints} == {"snapshots"}


def test_a_quarantined_commit_is_not_taken_from_a_checkpoint(
    cache: Cache, commits: list[Commit], checkpoints: list[str]
) -> None:
    first = cache.snapshot()
    cache.quarantine(NAMES[0], "again", damaged=False)
    again = commit_shard(cache, random_arrays(0, 10, 2), 0)
    assert again.n == 1
    checkpoints.clear()
    assert cache.snapshot().commits == (again, *first.commits[1:])
    assert [p for p in checkpoints if p.startswith("commits")] == [commit_path(NAMES[0], 1)]


def test_a_small_snapshot_is_no_checkpoint(
    cache: Cache, root: Path, commits: list[Commit], checkpoints: list[str]
) -> None:
    first = cache.snapshot()
    for number in range(3, 200):
        commit = fixed_commit(make_meta(number).name, 5)
        plant(root, replace(commit, attempt=jsonfile.digest(commit.part.encode())))
    large = cache.snapshot()
    small = cache.snapshot(NAMES[:1])
    checkpoints.clear()
    assert cache.snapshot() == large
    assert checkpoints == [snapshot_path(large.id)]
    assert {first.id, small.id} & set(checkpoints) == set()


def test_a_damaged_checkpoint_is_passed_over(
    cache: Cache, root: Path, commits: list[Commit], checkpoints: list[str]
) -> None:
    first = cache.snapshot()
    path = root / snapshot_path(first.id)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    commit_shard(cache, random_arrays(9, 5, 1), 3)
    assert [c.part for c in cache.snapshot().commits] == NAMES
    with pytest.raises(CorruptError, match=re.escape(str(path))):
        cache.snapshot(NAMES[:3])
    path.unlink()
    assert cache.snapshot(NAMES[:3]) == first


def test_a_checkpoint_of_the_same_list_is_not_written_again(
    cache: Cache, commits: list[Commit], checkpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache.snapshot()
    monkeypatch.setattr(Storage, "put_new", lambda *_: pytest.fail("written"))
    assert cache.snapshot() == first


def test_parts_named_twice_count_once(cache: Cache, commits: list[Commit]) -> None:
    assert cache.snapshot([NAMES[1], NAMES[0], NAMES[1]]).rows == 2 + 3


@settings(QUICK, max_examples=12)
@given(st.lists(st.tuples(st.sets(st.integers(0, 11)), st.booleans()), min_size=1, max_size=5))
def test_any_rounds_give_what_a_fresh_reader_gets(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[set[int], bool]]
) -> None:
    root = tmp_path_factory.mktemp("root")
    storage = Storage(root)
    with pytest.MonkeyPatch.context() as patch:
        for numbers, checkpoint in rounds:
            patch.setattr(snapshots, "FEW", 0 if checkpoint else 256)
            for number in numbers:
                plant(root, fixed_commit(make_meta(number).name, 3))
            made = make_snapshot(storage)
            assert open_snapshot(storage, made.id) == made
            some = [c.part for c in made.commits[::2]]
            assert make_snapshot(storage, some).commits == made.commits[::2]
    seen = set().union(*(numbers for numbers, _ in rounds))
    assert [c.part for c in made.commits] == sorted(make_meta(i).name for i in seen)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_commits_are_opened_with_few_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for number in range(count):
        plant(tmp_path, fixed_commit(make_meta(number, number // 500).name, 3))
    storage = Storage(tmp_path)
    made = make_snapshot(storage)
    assert made.rows == 3 * count
    (tmp_path / commit_path(made.commits[5].part, 0)).unlink()
    calls: list[str] = []

    def count_calls(name: str) -> None:
        call = getattr(Storage, name)

        def counted(self: Storage, path: str) -> Any:
            calls.append(f"{name} {path.split('/')[0]}")
            return call(self, path)

        monkeypatch.setattr(Storage, name, counted)

    for name in ("get", "list", "size", "entry"):
        count_calls(name)
    assert open_snapshot(storage, made.id) == made
    assert sorted(calls) == ["get snapshots", "list quarantine", "list removed", "list scores"]
    calls.clear()
    assert len(make_snapshot(storage).commits) == count - 1
    assert calls.count("get snapshots") == 1
    assert not [call for call in calls if call == "get commits"]


def test_a_snapshot_under_another_name_is_refused(
    cache: Cache, root: Path, commits: list[Commit]
) -> None:
    snapshot = cache.snapshot()
    other = cache.snapshot(NAMES[:1])
    (root / snapshot_path(snapshot.id)).write_bytes((root / snapshot_path(other.id)).read_bytes())
    with pytest.raises(CorruptError, match=snapshot.id):
        cache.open_snapshot(snapshot.id)


def test_a_damaged_snapshot_is_refused_or_unchanged(
    cache: Cache, root: Path, commits: list[Commit]
) -> None:
    snapshot = cache.snapshot()
    path = root / snapshot_path(snapshot.id)
    data = path.read_bytes()
    messages = list[str]()
    for at in range(0, len(data), 13):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            assert cache.open_snapshot(snapshot.id) == snapshot
        except CorruptError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(str(path)) for message in messages)
    for length in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError, match=re.escape(str(path))):
            cache.open_snapshot(snapshot.id)
