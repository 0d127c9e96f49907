"""Snapshots: the same list has the same name, and what is gone is named at opening."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.commits import Commit, attempt_path, commit_path
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.manifest import OBJECT_NAME
from stillroom.cache.snapshot import Snapshot, snapshot_path
from stillroom.cache.store import Cache
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


def test_the_id_of_a_fixed_list_is_pinned() -> None:
    commits = (fixed_commit(NAMES[0], 3), fixed_commit(NAMES[1], 4))
    assert Snapshot(commits).id == "3cef72a3d450b80c78ee90e68018ec3f"
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


def test_a_part_whose_commit_is_gone_is_named(
    cache: Cache, root: Path, commits: list[Commit]
) -> None:
    snapshot = cache.snapshot()
    (root / commit_path(NAMES[1], 0)).unlink()
    with pytest.raises(MissingError, match=f"expected the part {NAMES[1]}; got no commit"):
        cache.open_snapshot(snapshot.id)


@pytest.mark.parametrize("name", [OBJECT_NAME, "manifest.json"])
def test_a_part_whose_bytes_are_gone_is_named(
    cache: Cache, root: Path, commits: list[Commit], name: str
) -> None:
    snapshot = cache.snapshot()
    (root / attempt_path(NAMES[1], snapshot.commits[1].attempt) / name).unlink()
    with pytest.raises(MissingError, match=f"expected the part {NAMES[1]}; got no shard"):
        cache.open_snapshot(snapshot.id)


def test_another_commit_under_the_name_is_refused(
    cache: Cache, root: Path, commits: list[Commit]
) -> None:
    snapshot = cache.snapshot()
    other = replace(snapshot.commits[1], teacher_s=9.0)
    (root / commit_path(NAMES[1], 0)).write_bytes(other.to_json())
    with pytest.raises(CorruptError, match=f"of {NAMES[1]}"):
        cache.open_snapshot(snapshot.id)


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
    rng, messages = np.random.default_rng(0), list[str]()
    for at in rng.choice(len(data), 150).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert cache.open_snapshot(snapshot.id) == snapshot
        except (CorruptError, MissingError) as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(str(path)) for message in messages)
    for length in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError, match=re.escape(str(path))):
            cache.open_snapshot(snapshot.id)
