"""`gc`, killed and raced: it can always be run again, and nobody loses what is in use."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from stillroom.cache import collect as collect_module
from stillroom.cache.attempt import COMMIT_WITHIN_S
from stillroom.cache.clock import DAY_S, Stopwatch
from stillroom.cache.collect import Collection, collect, plan_collection
from stillroom.cache.commits import put_commit
from stillroom.cache.errors import CorruptError, MissingError, StorageError
from stillroom.cache.pins import pin, pin_path, unpin
from stillroom.cache.score import score
from stillroom.cache.snapshot import snapshot_path
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import removed_commits
from tests.cache.aged_cache import SIZES, AgedCache, Made, Part, Pinned, made_up_commit, make_aged
from tests.cache.conftest import KillAt
from tests.cache.fakes import FakeTeacher, make_meta, random_rollouts

pytestmark = pytest.mark.usefixtures("_no_fsync")
LIVE, RETIRED, PINNED, REPLACED = range(4)
PARTS = (
    Part((Made(),), strays=((30.0, 40.0), (1.0,)), claim=1.0),
    Part((Made(),), retired=30.0),
    Part((Made(),), retired=30.0),
    Part((Made(30.0), Made()), claim=30.0),
)
PINS = (Pinned(((LIVE, 0), (PINNED, 0)), 1.0),)


@pytest.fixture
def world(cache: Cache) -> AgedCache:
    """A part of each kind."""
    return make_aged(cache, PARTS, PINS)


def snapshot_of(world: AgedCache, *numbers: int) -> str:
    """A new snapshot of parts, retired ones too."""
    return world.cache.snapshot([world.name(number) for number in numbers]).id


def shard_files(world: AgedCache, number: int, n: int = 0) -> set[str]:
    """The objects of a commit's attempt that are there."""
    return {path for path in world.files() if world.commits[number, n].attempt in path}


def interrupt(
    monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object], *, after: bool
) -> None:
    """Do something right before or after a step of `gc`, the first time that it is taken."""
    step, acted = getattr(collect_module, name), list[object]()

    def stepping(*args: object, **kwargs: object) -> object:
        if not after and not acted:
            acted.append(act())
        result = step(*args, **kwargs)
        if after and not acted:
            acted.append(act())
        return result

    monkeypatch.setattr(collect_module, name, stepping)


@pytest.mark.parametrize(
    ("step", "after"), [("put_tombstone", False), ("put_tombstone", True), ("pinned_shards", False)]
)
def test_a_reader_that_pins_before_gc_looks_keeps_its_bytes(
    world: AgedCache, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    snapshot_id = snapshot_of(world, RETIRED, LIVE)
    interrupt(monkeypatch, step, lambda: pin(world.cache.storage, "r", [snapshot_id]), after=after)
    done = collect(world.cache, plan_collection(world.cache))
    assert {item.part for item in done.rubbish if item.kind == "shard"} == {world.name(REPLACED)}
    kept = {one.why for one in done.kept}
    assert kept == {"pinned by run r", "pinned meanwhile"}
    assert removed_commits(world.cache.storage) == {(world.name(REPLACED), 0)}
    assert world.cache.open_snapshot(snapshot_id).rows == 2
    unpin(world.cache.storage, "r")
    collect(world.cache, plan_collection(world.cache))
    assert shard_files(world, RETIRED) == set()


def test_a_reader_that_pins_later_is_refused_at_opening(
    world: AgedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its bytes are still there when it looks."""
    snapshot_id = snapshot_of(world, RETIRED)
    seen: list[set[str]] = []

    def open_now() -> None:
        pin(world.cache.storage, "late", [snapshot_id])
        seen.append(shard_files(world, RETIRED))
        with pytest.raises(MissingError, match=world.name(RETIRED)):
            world.cache.open_snapshot(snapshot_id)

    interrupt(monkeypatch, "pinned_shards", open_now, after=True)
    collect(world.cache, plan_collection(world.cache))
    assert len(seen[0]) == len(SIZES)
    assert shard_files(world, RETIRED) == set()
    with pytest.raises(MissingError, match=world.name(RETIRED)):
        world.cache.open_snapshot(snapshot_id)


def test_an_attempt_that_was_committed_since_the_plan_is_kept(world: AgedCache) -> None:
    """No scorer does that; but if one did, its shard would not be lost."""
    plan = plan_collection(world.cache)
    (item,) = [item for item in plan.rubbish if item.kind == "attempt"]
    storage = world.cache.storage
    storage.put_new(f"quarantine/{world.name(LIVE)}.0.json", b"{}")
    late = made_up_commit(world.name(LIVE), 1, item.paths[0].split("/")[2])
    assert put_commit(storage, late)
    done = collect(world.cache, plan)
    assert set(item.paths) <= world.files()
    assert "committed meanwhile" in {one.why for one in done.kept}


def test_attempts_beside_a_commit_that_cannot_be_read_are_kept(world: AgedCache) -> None:
    plan = plan_collection(world.cache)
    path = world.cache.storage.folder / f"commits/v000000/{world.name(LIVE)}.0.json"
    path.write_bytes(path.read_bytes()[:-1])
    for done in (collect(world.cache, plan), plan_collection(world.cache)):
        assert "attempt" not in {item.kind for item in done.rubbish}
        assert any("commit cannot be read" in one.why for one in done.kept)


def test_without_any_commit_no_whole_attempt_goes(world: AgedCache) -> None:
    """Someone moved commits/ away."""
    shards = {path for path in world.files() if path.endswith((".json", ".zip"))}
    commits = world.cache.storage.folder / "commits"
    commits.rename(commits.with_name("away"))
    done = collect(world.cache, plan_collection(world.cache))
    kept = {path for path in shards if path.startswith("scores/")}
    assert kept
    assert kept <= world.files()
    reasons = [one.why for one in done.kept] + [o.why for o in plan_collection(world.cache).kept]
    assert any("no commit at all" in why for why in reasons)
    assert any("names it, but its commit is gone" in why for why in reasons)


def test_while_commits_are_restored_in_part_no_whole_attempt_goes(cache: Cache) -> None:
    """No snapshot names them. Once a part is scored again, its old attempt goes."""
    scored_again, restored = (make_meta(number).name for number in (1, 2))
    for number in (0, 1, 2):
        cache.add_part(random_rollouts(number, 4), make_meta(number))
    score(cache, FakeTeacher())
    for name in (scored_again, restored):
        commit = cache.storage.folder / f"commits/v000000/{name}.0.json"
        commit.rename(cache.storage.folder.with_name(commit.name))
    later = time.time() + 2 * DAY_S
    before = cache.storage.list("scores")
    done = collect(cache, plan_collection(cache, clock=lambda: later), clock=lambda: later)
    assert [item.kind for item in done.rubbish if item.kind == "attempt"] == []
    assert cache.storage.list("scores") == before
    kept = [one for one in plan_collection(cache, clock=lambda: later).kept if "whole" in one.why]
    assert [scored_again in kept[0].what, restored in kept[1].what] == [True, True]
    cache.storage.folder.with_name(commit.name).rename(commit)
    assert score(cache, FakeTeacher()).scored == [scored_again]
    done = collect(cache, plan_collection(cache, clock=lambda: later), clock=lambda: later)
    gone = {path for item in done.rubbish for path in item.paths if item.kind == "attempt"}
    assert gone == {entry.path for entry in before if scored_again in entry.path}
    assert cache.snapshot().rows == 12
    assert cache.shard(cache.commit_of(restored)).all_rows()


def test_a_shard_whose_commit_is_lost_is_kept_by_a_snapshot(world: AgedCache) -> None:
    """A stored one will do; nobody pins it."""
    snapshot_id = snapshot_of(world, REPLACED)
    commit = world.commits[REPLACED, 1]
    lost = world.cache.storage.folder / f"commits/v000000/{commit.part}.1.json"
    lost.unlink()
    plan = plan_collection(world.cache)
    assert any(snapshot_id in one.why and commit.attempt in one.what for one in plan.kept)
    collect(world.cache, plan)
    assert len(shard_files(world, REPLACED, 1)) == len(SIZES)


def test_a_snapshot_that_cannot_be_read_keeps_what_it_may_name(world: AgedCache) -> None:
    """A part that was scored again has a commit; the snapshot may be older than that."""
    path = snapshot_path(snapshot_of(world, REPLACED))
    commit = world.commits[REPLACED, 0]
    (world.cache.storage.folder / f"commits/v000000/{commit.part}.0.json").unlink()
    (world.cache.storage.folder / path).write_bytes(b"x")
    done = collect(world.cache, plan_collection(world.cache))
    assert len(shard_files(world, REPLACED, 0)) == len(SIZES)
    assert "attempt" in {item.kind for item in done.rubbish}, "one without a manifest"
    assert any(path in one.why for one in plan_collection(world.cache).kept)


def test_a_pin_that_is_renewed_meanwhile_stays(cache: Cache) -> None:
    make_aged(cache, PARTS, (Pinned(((LIVE, 0),), -30.0), Pinned(((LIVE, 0),), -30.0)))
    plan = plan_collection(cache)
    pin(cache.storage, "run-0", ["0" * 32])
    done = collect(cache, plan)
    assert [item.paths for item in done.rubbish if item.kind == "pin"] == [(pin_path("run-1"),)]
    assert cache.storage.exists(pin_path("run-0"))


def test_a_pin_that_cannot_be_read_stops_gc(world: AgedCache) -> None:
    before = world.files()
    world.cache.storage.put("pins/x.json", b"{")
    with pytest.raises(CorruptError, match=r"pins/x\.json"):
        plan_collection(world.cache)
    assert world.files() == before | {"pins/x.json"}


def test_while_it_is_not_known_what_is_in_use_no_shard_goes(world: AgedCache) -> None:
    pin(world.cache.storage, "lost", ["0" * 32])
    done = collect(world.cache, plan_collection(world.cache))
    assert {item.kind for item in done.rubbish} == {"attempt", "claim", "probe", "temporary"}
    assert all("run lost pins a snapshot that cannot be read" in one.why for one in done.kept[1:])
    assert removed_commits(world.cache.storage) == set()


def test_gc_that_slept_gives_up(world: AgedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may have taken its tombstones for those of a dead one."""
    plan = plan_collection(world.cache)
    monkeypatch.setattr(Stopwatch, "elapsed_s", lambda _: COMMIT_WITHIN_S + 1)
    with pytest.raises(StorageError, match="since its tombstones were put"):
        collect(world.cache, plan, clock=world.cache.storage.now)
    assert shard_files(world, RETIRED)
    monkeypatch.undo()
    collect(world.cache, plan_collection(world.cache))
    assert not shard_files(world, RETIRED)


def copies(world: AgedCache, folder: Path) -> Iterator[AgedCache]:
    """Copies of a cache, with the ages of its objects."""
    for number in range(1000):
        root = shutil.copytree(world.cache.storage.folder, folder / f"copy-{number}")
        yield replace(world, cache=Cache.open(root))


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["before", "after"])
def test_gc_that_is_killed_at_any_point_can_be_run_again(
    world: AgedCache, kill_at: KillAt, tmp_path: Path, mode: str
) -> None:
    ends: list[str] = []
    rubbish = {path for path in world.files() if world.may_go(path)}
    roots = copies(world, tmp_path)
    while "finished" not in ends:
        copy = next(roots)
        before = copy.files()
        ends.append(kill_at("gc", mode, len(ends) + 1, copy.cache.storage.folder))
        gone = before - copy.files()
        assert gone <= rubbish
        removed = removed_commits(copy.cache.storage)
        for (number, n), commit in copy.commits.items():
            if gone & set(shard_files(world, number, n)):
                assert (commit.part, n) in removed
        pinned = snapshot_of(copy, LIVE, PINNED)
        assert copy.cache.open_snapshot(pinned).rows == 2
        collect(copy.cache, plan_collection(copy.cache))
        left = {path for path in copy.files() if not path.rpartition("/")[2].startswith(".")}
        kept = {path for path in before - rubbish if not path.rpartition("/")[2].startswith(".")}
        assert {path for path in left if not path.startswith("removed/")} == kept | {
            f"snapshots/{pinned}.parquet"
        }
        assert plan_collection(copy.cache).rubbish == []
    assert set(ends) >= {"link", "unlink", "rmdir", "finished"}
    assert len(ends) > 20


@pytest.mark.dist
def test_a_run_that_pinned_goes_on_after_gc_died(
    world: AgedCache, kill_at: KillAt, tmp_path: Path
) -> None:
    """A tombstone that a dead `gc` left beside whole bytes that are pinned now is taken back."""
    end, point, roots = "", 0, copies(world, tmp_path)
    while end != "link":
        point += 1
        copy = next(roots)
        end = kill_at("gc", "after", point, copy.cache.storage.folder)
    cache, snapshot_id = copy.cache, snapshot_of(world, RETIRED)
    assert len(removed_commits(cache.storage)) == 1
    shutil.copy(
        world.cache.storage.folder / f"snapshots/{snapshot_id}.parquet",
        cache.storage.folder / "snapshots",
    )
    pin(cache.storage, "run", [snapshot_id])
    with pytest.raises(MissingError):
        cache.open_snapshot(snapshot_id)
    collect(cache, plan_collection(cache))
    with pytest.raises(MissingError):
        cache.open_snapshot(snapshot_id)
    clock = time.time() + 2 * DAY_S
    pin(cache.storage, "run", [snapshot_id], lifetime_s=9 * DAY_S)
    collect(cache, plan_collection(cache, clock=lambda: clock), clock=lambda: clock)
    assert cache.open_snapshot(snapshot_id).rows == 1


def race(*works: Callable[[], object]) -> None:
    """Do several things at once; what one of them raises is raised."""
    barrier = threading.Barrier(len(works))

    def at_once(work: Callable[[], object]) -> None:
        barrier.wait(30)
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(at_once, work) for work in works]:
            future.result()


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064])
def test_two_runs_and_a_reader_at_once(world: AgedCache, delay_s: float) -> None:
    """A reader that pins and opens keeps all of it, or is told at opening."""
    root, snapshot_id = world.cache.storage.root, snapshot_of(world, RETIRED, LIVE)

    def gc() -> None:
        cache = Cache.open(root)
        collect(cache, plan_collection(cache))

    def read() -> None:
        cache = Cache.open(root)
        time.sleep(delay_s)
        pin(cache.storage, "reader", [snapshot_id])
        with suppress(MissingError):
            opened.append(cache.open_snapshot(snapshot_id).id)

    opened: list[str] = []
    race(gc, gc, read)
    removed = (world.name(RETIRED), 0) in removed_commits(world.cache.storage)
    assert not (removed and opened)
    assert len(shard_files(world, RETIRED)) == (0 if removed else len(SIZES))
    assert len(shard_files(world, PINNED)) == len(SIZES)


def test_a_part_whose_bytes_are_gone_is_neither_sampled_nor_scored_again(cache: Cache) -> None:
    """The whole life of a part, with a real shard."""
    meta = make_meta(1)
    cache.add_part(random_rollouts(1, 4), meta)
    score(cache, FakeTeacher())
    snapshot_id = cache.snapshot().id
    cache.retire(meta.name, "too old")
    later = time.time() + 2 * DAY_S

    def gc() -> Collection:
        plan = plan_collection(cache, clock=lambda: later)
        return collect(cache, plan, clock=lambda: later)

    pin(cache.storage, "run", [snapshot_id])
    assert {item.kind for item in gc().rubbish} == {"claim", "probe"}
    assert cache.shard(cache.open_snapshot(snapshot_id).commits[0]).all_rows()
    unpin(cache.storage, "run")
    done = gc()
    assert {item.kind for item in done.rubbish} == {"shard", "rollouts"}
    assert done.size_bytes > 0
    assert cache.storage.list("scores") == cache.storage.list("rollouts") == []
    assert cache.has_part(meta.policy_version, meta.unit)
    assert cache.unscored() == []
    assert cache.commits() == {meta.name: 0}
    assert score(cache, FakeTeacher()).scored == []
    with pytest.raises(MissingError, match=meta.name):
        cache.open_snapshot(snapshot_id)
    assert os.listdir(cache.storage.folder / "scores") == []
