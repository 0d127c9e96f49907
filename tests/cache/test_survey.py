"""The survey: what it lists, and how little it reads."""

import pytest

from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.survey import commits_of, survey
from tests.cache.aged_cache import AgedCache, Made, Part, make_aged

LIVE, REPLACED, ASIDE, RETIRED, UNSCORED = range(5)
PARTS = (
    Part((Made(),)),
    Part((Made(30.0), Made())),
    Part((Made(30.0),)),
    Part((Made(),), retired=30.0),
    Part(strays=((30.0,),)),
)


@pytest.fixture
def world(cache: Cache) -> AgedCache:
    """A part of each kind."""
    return make_aged(cache, PARTS)


def test_every_part_is_listed(world: AgedCache) -> None:
    found = survey(world.cache.storage, world.cache.storage.now(), 3600.0)
    names = [world.name(number) for number in range(len(PARTS))]
    assert found.live == {names[LIVE]: 0, names[REPLACED]: 1, names[RETIRED]: 0}
    assert found.numbers == {names[0]: [0], names[1]: [0, 1], names[2]: [0], names[3]: [0]}
    assert found.retired.keys() == {names[RETIRED]}
    assert found.quarantine.keys() == {(names[REPLACED], 0), (names[ASIDE], 0)}
    assert found.rollouts.keys() == set(names)
    assert found.unreadable == {}


def test_the_commit_of_a_part_with_one_attempt_is_not_read(
    world: AgedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are nearly all: 10,000 of them would take half a minute on an object store."""
    read: list[str] = []
    get_many = Storage.get_many

    def noting(storage: Storage, paths: list[str], max_bytes: int | None = None) -> object:
        read.extend(paths)
        return get_many(storage, paths, max_bytes)

    monkeypatch.setattr(Storage, "get_many", noting)
    found = survey(world.cache.storage, world.cache.storage.now(), 3600.0)
    assert {path.split("/")[-1] for path in read} == {
        f"{world.name(REPLACED)}.0.json",
        f"{world.name(REPLACED)}.1.json",
        f"{world.name(RETIRED)}.0.json",
    }
    assert found.commits[world.name(REPLACED)] == {n: world.commits[REPLACED, n] for n in range(2)}
    assert world.name(LIVE) not in found.attempts
    assert found.attempts[world.name(UNSCORED)].keys()


def test_commits_are_read_again_by_part(world: AgedCache) -> None:
    name = world.name(REPLACED)
    commits, unreadable = commits_of(world.cache.storage, {name, world.name(UNSCORED)})
    assert commits == {name: {n: world.commits[REPLACED, n] for n in range(2)}}
    assert unreadable == {}
    path = world.cache.storage.folder / f"commits/v000000/{name}.1.json"
    path.write_bytes(b"{}")
    commits, unreadable = commits_of(world.cache.storage, {name})
    assert commits[name].keys() == {0}
    assert "a commit cannot be read" in unreadable[name]


def test_names_that_are_not_ours_are_left_alone(cache: Cache) -> None:
    part = "v000000-0000000000000001"
    strange = [
        f"scores/{part}/notes.txt",
        f"scores/{part}/{'A' * 32}/shard.zarr.zip",
        f"scores/{part}/{'a' * 32}/deep/shard.zarr.zip",
        f"scores/other/{'a' * 32}/shard.zarr.zip",
        "claims/notes.json",
        "rollouts/notes.parquet",
        f"retired/{part}.txt",
    ]
    for path in strange:
        cache.storage.put_new(path, b"x")
    found = survey(cache.storage, cache.storage.now() + 1e6, 3600.0)
    assert found.attempts == {}
    assert found.claims == found.rollouts == found.retired == {}
