"""Quarantine: which commits do not count, and which of those must not be read."""

from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.quarantine import (
    damaged_commits,
    list_quarantine,
    next_n,
    put_quarantine,
    quarantine_path,
)
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from tests.cache.fakes import commit_shard, make_meta, random_arrays

PART, OTHER = make_meta(1).name, make_meta(17).name


def test_only_damaged_commits_are_named(cache: Cache) -> None:
    put_quarantine(cache.storage, PART, 0, "a flipped bit", damaged=True)
    put_quarantine(cache.storage, PART, 1, "another teacher batch", damaged=False)
    put_quarantine(cache.storage, OTHER, 0, "a flipped bit", damaged=True)
    assert damaged_commits(cache.storage) == {(PART, 0), (OTHER, 0)}
    assert damaged_commits(cache.storage, [(PART, 0), (PART, 1)]) == {(PART, 0)}
    assert damaged_commits(cache.storage, [(OTHER, 7)]) == set()
    assert list_quarantine(cache.storage).keys() == {(PART, 0), (PART, 1), (OTHER, 0)}


def test_the_next_n_follows_those_in_quarantine(cache: Cache) -> None:
    for n in range(3):
        assert next_n(cache.storage, PART) == n
        put_quarantine(cache.storage, PART, n, "again", damaged=False)
    assert next_n(cache.storage, OTHER) == 0


def test_the_next_n_is_found_without_listing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        put_quarantine(cache.storage, make_meta(number).name, 0, "again", damaged=False)
    asked: list[str] = []
    exists = Storage.exists

    def noting(storage: Storage, path: str) -> bool:
        asked.append(path)
        return exists(storage, path)

    monkeypatch.setattr(Storage, "list", lambda *_: pytest.fail("a listing"))
    monkeypatch.setattr(Storage, "exists", noting)
    assert next_n(cache.storage, make_meta(7).name) == 1
    assert len(asked) == 2


def test_a_second_reason_changes_nothing(cache: Cache) -> None:
    put_quarantine(cache.storage, PART, 0, "first", damaged=False)
    before = cache.storage.get(quarantine_path(PART, 0))
    put_quarantine(cache.storage, PART, 0, "second", damaged=True)
    assert cache.storage.get(quarantine_path(PART, 0)) == before


def test_a_commit_that_was_replaced_since_is_not_meant(cache: Cache) -> None:
    """Who found commit 0 bad must not take commit 1 out of use."""
    arrays, name = random_arrays(0, 12, 4), make_meta().name
    commit_shard(cache, arrays)
    cache.quarantine(name, "found bad", damaged=True, n=0)
    commit_shard(cache, arrays)
    cache.quarantine(name, "found bad by another", damaged=True, n=0)
    assert cache.commits() == {name: 1}
    with pytest.raises(MissingError, match=name):
        cache.quarantine(name, "no such commit", damaged=True, n=2)


def test_a_commit_that_cannot_be_read_can_be_put_into_quarantine(cache: Cache) -> None:
    commit = commit_shard(cache, random_arrays(0, 12, 4))
    path = cache.storage.folder / f"commits/v000000/{commit.part}.0.json"
    path.write_bytes(b"\0" * 10)
    cache.quarantine(commit.part, "cannot be read", damaged=True)
    assert damaged_commits(cache.storage) == {(commit.part, 0)}
    assert commit_shard(cache, random_arrays(0, 12, 4)).n == 1


@pytest.mark.parametrize(
    "change",
    [{"damaged": 0}, {"damaged": None}, {"part": OTHER}, {"n": 1}, {"more": 1}, {"reason": None}],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    cache: Cache, change: dict[str, Any]
) -> None:
    good = {"part": PART, "n": 0, "reason": "r", "damaged": True, "time": "t"}
    cache.storage.put_new(quarantine_path(PART, 0), jsonfile.dump_sealed(good | change))
    with pytest.raises(CorruptError, match=rf"{PART}\.0\.json"):
        damaged_commits(cache.storage)
    assert damaged_commits(cache.storage, [(OTHER, 0)]) == set()
