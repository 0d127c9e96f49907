"""What may be removed: by brute force over made-up caches, it is all of the rubbish and no more."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import list_tombstones
from tests.cache.aged_cache import SIZES, AgedCache, Made, Part, Pinned, make_aged
from tests.cache.conftest import QUICK
from tests.cache.fakes import make_identity

pytestmark = pytest.mark.usefixtures("_no_fsync")
AGES = st.sampled_from([0.0, 0.01, 0.5, 23.9, 24.1, 300.0])
MAYBE_AGE = st.none() | AGES
HALF = Made(objects=tuple(SIZES)[:1], tombstone=30.0)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    """A part in any state."""
    count = draw(st.integers(0, 3))
    commits = []
    for n in range(count):
        aside = draw(AGES if n + 1 < count else MAYBE_AGE)
        objects = draw(st.sampled_from([tuple(SIZES), tuple(SIZES), tuple(SIZES)[:1], ()]))
        commits.append(Made(aside, objects, draw(MAYBE_AGE)))
    return Part(
        commits=tuple(commits),
        strays=tuple(draw(st.lists(st.tuples(AGES) | st.tuples(AGES, AGES), max_size=2))),
        whole=draw(st.booleans()),
        retired=draw(MAYBE_AGE),
        rollouts=draw(st.booleans()),
        claim=draw(MAYBE_AGE),
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[tuple[Part, ...], tuple[Pinned, ...]]:
    """Some parts and pins of their commits."""
    made = tuple(draw(st.lists(parts(), max_size=4)))
    shards = [(i, n) for i, part in enumerate(made) for n in range(len(part.commits))]
    if not shards:
        return made, ()
    names = st.lists(st.sampled_from(shards), min_size=1, unique_by=lambda shard: shard[0])
    expiries = st.sampled_from([-300.0, -24.1, -23.9, -0.1, 0.1, 100.0])
    pinned = st.builds(Pinned, names.map(tuple), expiries)
    return made, tuple(draw(st.lists(pinned, max_size=2)))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache, to be copied."""
    root = tmp_path_factory.mktemp("empty") / "root"
    Cache.create(root, make_identity())
    return root


def check(root: Path, made: tuple[Part, ...], pins: tuple[Pinned, ...]) -> None:
    """Collect, and compare with the rules."""
    world = make_aged(Cache.open(root), made, pins)
    cache, before = world.cache, world.files()
    plan = plan_collection(cache)
    assert world.files() == before, "planning changes nothing"
    planned = [path for item in plan.rubbish for path in item.paths]
    assert len(planned) == len(set(planned)) == plan.objects
    done = collect(cache, plan)
    after = world.files()
    assert before - after == {path for path in before if world.may_go(path)} == set(planned)
    assert done.objects == plan.objects
    assert done.size_bytes == plan.size_bytes
    check_untouched(world, before, after)
    assert plan_collection(cache).rubbish == []


def check_untouched(world: AgedCache, before: set[str], after: set[str]) -> None:
    """What must never go, said in other words; and a tombstone for each shard that went."""
    for folder in ("commits", "quarantine", "retired", "snapshots"):
        assert {p for p in before if p.startswith(folder)} <= after
    gone = {path for path in before - after if path.startswith("scores/")}
    went = set()
    for (number, n), commit in world.commits.items():
        part = world.parts[number]
        mine = {path for path in gone if commit.attempt in path}
        if (part.commits[n].aside is None and part.retired is None) or world.kept((number, n)):
            assert not mine, "live, or pinned"
        if mine:
            went.add((commit.part, n))
    new = after - before
    stones = list_tombstones(world.cache.storage)
    assert {path.split("/")[0] for path in new} <= {"removed"}
    assert {shard for shard, found in stones.items() if {e.path for e in found} & new} == went


@settings(QUICK, max_examples=60)
@given(worlds())
@example(((Part((Made(),), retired=300.0), Part((Made(30.0), Made()))), ()))
@example(((Part((Made(),), retired=300.0),), (Pinned(((0, 0),), 1.0),)))
@example(((Part((Made(tombstone=30.0),), retired=300.0),), (Pinned(((0, 0),), 1.0),)))
@example(((Part((Made(tombstone=1.0),), retired=300.0),), (Pinned(((0, 0),), 1.0),)))
@example(((Part((HALF,), retired=300.0),), (Pinned(((0, 0),), 1.0),)))
@example(((Part((Made(30.0), Made(30.0))),), ()))
@example(((Part((Made(),)), Part(strays=((30.0, 30.0),), whole=True)), ()))
@example(((Part((Made(),)), Part(strays=((30.0,),), whole=True, retired=1.0)), ()))
@example(((Part((Made(),)), Part(strays=((30.0,),), whole=True, retired=30.0)), ()))
@example(((Part((Made(),), strays=((30.0, 30.0),), whole=True),), ()))
def test_all_rubbish_and_nothing_else_is_removed(
    empty: Path, world: tuple[tuple[Part, ...], tuple[Pinned, ...]]
) -> None:
    root = empty.with_name("copy")
    shutil.rmtree(root, ignore_errors=True)
    check(shutil.copytree(empty, root), *world)


def reasons(cache: Cache) -> dict[str, str]:
    """Reasons by kind."""
    return {item.kind: item.reason for item in plan_collection(cache).rubbish}


def test_every_kind_has_its_reason(cache: Cache) -> None:
    made = (
        Part((Made(30.0), Made()), strays=((50.0, 40.0),), claim=0.1),
        Part((Made(tombstone=30.0),), retired=90.0),
        Part((Made(),), retired=80.0, claim=30.0),
    )
    make_aged(cache, made, (Pinned(((1, 0),), 1.0), Pinned(((1, 0),), -30.0)))
    plan = plan_collection(cache)
    assert sorted({(item.kind, item.reason) for item in plan.rubbish}) == [
        ("attempt", "no commit names it, and it is 40 h old"),
        ("claim", "its part is scored"),
        ("claim", "not renewed for 30 h"),
        ("pin", "expired 30 h ago"),
        ("probe", "left by a check of the storage 30 h ago"),
        ("rollouts", "its part was retired 80 h ago"),
        ("shard", "its part was retired 80 h ago"),
        ("shard", "put into quarantine 30 h ago; commit 1 took its place"),
        ("temporary", "left by a writer that died 30 h ago"),
        ("tombstone", "its gc died, and the bytes are all there"),
    ]
    kept = {(item.what.split()[0], item.why) for item in plan.kept}
    assert kept == {("shard", "pinned by run run-0"), ("rollouts", "pinned by run run-0")}


def test_a_whole_attempt_without_a_commit_is_kept_for_a_reason(cache: Cache) -> None:
    whole = {"strays": ((50.0,),), "whole": True}
    made = (
        Part((Made(),)),
        Part(**whole),  # type: ignore[arg-type]
        Part((Made(30.0),), **whole),  # type: ignore[arg-type]
        Part(retired=23.0, **whole),  # type: ignore[arg-type]
        Part(retired=25.0, **whole),  # type: ignore[arg-type]
    )
    world = make_aged(cache, made)
    plan = plan_collection(cache)
    unscored = "it is whole, and its part has no live commit: restore that, or score it first"
    retired = "it is whole, and its part was retired only 23 h ago"
    kept = {item.what.split()[-1]: item.why for item in plan.kept}
    names = [world.name(number) for number in range(5)]
    assert kept == dict(zip(names[1:4], (unscored, unscored, retired), strict=True))
    assert [item.part for item in plan.rubbish if item.kind == "attempt"] == names[4:]


def test_the_age_is_a_parameter_and_no_less_than_a_day_by_default(cache: Cache) -> None:
    make_aged(cache, (Part(strays=((23.0,),)),))
    assert "attempt" not in reasons(cache)
    plan: Any = plan_collection(cache, min_age_s=22 * 3600)
    assert "attempt" in {item.kind for item in plan.rubbish}
    later = plan_collection(cache, clock=lambda: cache.storage.now() + 2 * 3600)
    assert "attempt" in {item.kind for item in later.rubbish}
