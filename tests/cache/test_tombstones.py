"""Tombstones: one for each run of `gc`, and any one of them says that bytes are gone."""

from stillroom.cache.store import Cache
from stillroom.cache.tombstones import (
    list_tombstones,
    put_tombstone,
    removed_commits,
    tombstone_path,
)
from tests.cache.fakes import make_meta

PART, OTHER = make_meta(1).name, make_meta(17).name
FIRST, SECOND = "a" * 32, "b" * 32


def test_every_run_has_its_own(cache: Cache) -> None:
    assert removed_commits(cache.storage) == set()
    put_tombstone(cache.storage, PART, 0, FIRST)
    put_tombstone(cache.storage, PART, 0, SECOND)
    put_tombstone(cache.storage, OTHER, 12, FIRST)
    assert removed_commits(cache.storage) == {(PART, 0), (OTHER, 12)}
    assert [entry.path for entry in list_tombstones(cache.storage)[PART, 0]] == [
        tombstone_path(PART, 0, FIRST),
        tombstone_path(PART, 0, SECOND),
    ]
    cache.storage.delete(tombstone_path(PART, 0, FIRST))
    assert removed_commits(cache.storage) == {(PART, 0), (OTHER, 12)}
    cache.storage.delete(tombstone_path(PART, 0, SECOND))
    assert removed_commits(cache.storage) == {(OTHER, 12)}


def test_other_names_are_ignored(cache: Cache) -> None:
    for name in (f"{PART}.0.json", f"{PART}.x.{FIRST}.json", f"{PART}.0.{FIRST}", f"x.0.{FIRST}"):
        cache.storage.put_new(f"removed/{name}", b"{}")
    assert removed_commits(cache.storage) == set()
