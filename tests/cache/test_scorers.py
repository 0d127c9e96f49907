"""Several scorers at once, in processes of their own: no part is left, and few are scored twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import claims, jsonfile
from stillroom.cache.claims import Claims, claim_path
from stillroom.cache.score import score
from stillroom.cache.shared_work import FULL_LOOK_EVERY, LOOK_AFTER_S
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.workers import Worker
from tests.cache.fakes import (
    FakeTeacher,
    commit_shard,
    make_meta,
    random_arrays,
    random_rollouts,
)

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., list[subprocess.Popen[str]]]
pytestmark = pytest.mark.dist


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """While this file is missing, teachers in other processes hang."""
    return tmp_path / "gate"


@pytest.fixture
def start(root: Path, gate: Path) -> Iterator[Start]:
    """Starts scorers in processes of their own, with ranks if asked; they score at once."""
    with ExitStack() as stack:

        def start_some(number: int, *, ranked: bool = False) -> list[subprocess.Popen[str]]:
            command = [sys.executable, "-m", "tests.cache.scorer_child", str(root), str(gate)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            which = [[str(rank), str(number)] if ranked else [] for rank in range(number)]
            started = [
                stack.enter_context(subprocess.Popen(command + own, cwd=ROOT, text=True, **pipes))
                for own in which
            ]
            for process in started:
                stack.callback(process.kill)
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in started:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            return started

        yield start_some


def add_parts(cache: Cache, number: int) -> list[str]:
    """Add tiny parts; their names."""
    for i in range(number):
        assert cache.add_part(random_rollouts(i, 1), make_meta(i))
    return [make_meta(i).name for i in range(number)]


def ended(process: subprocess.Popen[str]) -> dict[str, list[str]]:
    """What a scorer says in the end."""
    assert process.stdout is not None
    report: dict[str, list[str]] = json.loads(process.stdout.readline())
    assert process.wait(timeout=60) == 0
    return report


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def attempts_of(cache: Cache) -> int:
    """Attempts, committed or not."""
    return len({entry.path.split("/")[2] for entry in cache.storage.list("scores")})


def test_live_workers_score_hardly_anything_twice(cache: Cache, gate: Path, start: Start) -> None:
    parts = add_parts(cache, 120)
    gate.touch()
    reports = [ended(process) for process in start(2)]
    scored = [part for report in reports for part in report["scored"]]
    assert sorted(scored) == parts, "each once"
    assert cache.unscored() == []
    assert all(len(report["scored"]) > len(parts) / 10 for report in reports), "both worked"
    twice = sum(len(report["lost"]) for report in reports)
    assert attempts_of(cache) == len(parts) + twice
    assert twice < 0.01 * len(parts)


def test_ranks_score_their_own_share_first(cache: Cache, gate: Path, start: Start) -> None:
    parts = add_parts(cache, 30)
    gate.touch()
    reports = [ended(process) for process in start(2, ranked=True)]
    assert sorted(part for report in reports for part in report["scored"]) == parts, "each once"
    assert attempts_of(cache) == len(parts), "and nothing for nothing"
    for rank, report in enumerate(reports):
        worker = Worker(rank=rank, world_size=2)
        mine = [worker.owns(part) for part in report["scored"]]
        assert mine == sorted(mine, reverse=True), "others' parts come last"
        assert any(mine)


def test_the_other_rank_finishes_what_a_killed_one_had_begun(
    cache: Cache, gate: Path, start: Start
) -> None:
    """Both are in the middle of a part of their share when one is killed."""
    parts = add_parts(cache, 8)
    killed, other = start(2, ranked=True)
    wait_for(lambda: len(cache.storage.list("claims")) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(timeout=60)
    gate.touch()
    report = ended(other)
    assert sorted(report["scored"]) == parts
    assert report["lost"] == []
    assert attempts_of(cache) == len(parts)
    assert set(cache.commits().values()) == {0}


def test_a_scorer_that_is_killed_is_replaced_at_once(
    cache: Cache, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a part and renews its claim when it is killed; the next does not wait for it."""
    parts = add_parts(cache, 3)
    (process,) = start(1)
    seen: list[Any] = []

    def renewed() -> bool:
        found = [(entry.path, entry.modified) for entry in cache.storage.list("claims")]
        seen.extend(claim for claim in found if claim not in seen)
        return len(seen) >= 3

    wait_for(renewed)
    assert len({path for path, _ in seen}) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    report = score(cache, FakeTeacher())
    assert sorted(report.scored) == parts
    assert report.lost == []


def test_a_scorer_waits_for_what_others_do(
    cache: Cache,
    gate: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = add_parts(cache, 3)
    (process,) = start(1)
    wait_for(lambda: cache.storage.list("claims"))
    sleep = time.sleep
    looked: list[float] = []

    def sleep_then_open(seconds: float) -> None:
        looked.append(seconds)
        if len(looked) == 3:
            gate.touch()
        sleep(0.05)

    monkeypatch.setattr(time, "sleep", sleep_then_open)
    report = score(cache, FakeTeacher())
    monkeypatch.undo()
    assert cache.unscored() == []
    theirs = ended(process)
    assert len(theirs["scored"]) == 1
    assert sorted([*report.scored, *theirs["scored"]]) == parts
    assert report.lost == theirs["lost"] == []
    assert len(looked) >= 3
    first, longest = LOOK_AFTER_S
    for number, seconds in enumerate(looked):
        wait = min(first * 2**number, longest)
        assert 0.75 * wait <= seconds <= wait
    said = capsys.readouterr().err
    assert said.count("waiting for parts that other workers have claimed: 1, such as") == 1


def test_a_scorer_takes_over_what_another_lets_die(
    cache: Cache, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = add_parts(cache, 2)
    (process,) = start(1)
    wait_for(lambda: cache.storage.list("claims"))

    def kill(_: float) -> None:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(time, "sleep", kill)
    assert sorted(score(cache, FakeTeacher()).scored) == parts


def test_a_scorer_whose_teacher_hangs_is_replaced(
    cache: Cache, gate: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives, and is not stopped. Once its teacher goes on, it finds its part scored."""
    parts = add_parts(cache, 3)
    monkeypatch.setenv("STALLED_AFTER_S", "0.2")
    (process,) = start(1)
    wait_for(lambda: cache.storage.list("claims"))
    monkeypatch.setattr(claims, "DEAD_AFTER_S", 0.5)
    sleep, end = time.sleep, time.monotonic() + 60

    def sleep_briefly(_: float) -> None:
        assert time.monotonic() < end
        sleep(0.02)

    monkeypatch.setattr(time, "sleep", sleep_briefly)
    report = score(cache, FakeTeacher())
    monkeypatch.undo()
    assert sorted(report.scored) == parts
    assert process.poll() is None
    gate.touch()
    theirs = ended(process)
    assert theirs["scored"] == []
    assert len(theirs["lost"]) == 1
    assert set(cache.commits().values()) == {0}


def test_who_waits_asks_little_and_less_and_less(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others hold three of four parts for more than half an hour."""
    parts, owner = add_parts(cache, 4), Claims(cache.storage)
    held, asked, looks = parts[1:], dict[str, int](), list[float]()
    assert all(owner.take(part) for part in held)
    for name in ("get", "entry", "put", "put_new", "list"):
        count_calls(monkeypatch, name, asked)

    def sleep(seconds: float) -> None:
        if not looks:
            asked.clear()
        looks.append(seconds)
        if len(looks) == 100:
            spent.update(asked)
            for part in held:
                owner._put(part, working=False)

    spent: dict[str, int] = {}
    monkeypatch.setattr(time, "sleep", sleep)
    assert sorted(score(cache, FakeTeacher()).scored) == parts
    full = 99 // FULL_LOOK_EVERY
    assert spent == {"get": 99 * len(held), "entry": full * 3 * len(held)}
    assert len(looks) == 100
    assert sum(looks) > 30 * 60


def test_who_waits_looks_often_again_once_it_gets_on(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, owner = add_parts(cache, 3), Claims(cache.storage)
    assert all(owner.take(part) for part in parts[1:])
    looks = list[float]()

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) in (7, 10):
            owner._put(parts[1 if len(looks) == 7 else 2], working=False)

    monkeypatch.setattr(time, "sleep", sleep)
    assert sorted(score(cache, FakeTeacher()).scored) == parts
    first, longest = LOOK_AFTER_S
    assert len(looks) == 10
    assert looks[6] >= 0.75 * longest
    assert looks[7] <= first < looks[8] < looks[9]


@pytest.mark.parametrize("how", ["retired", "committed"])
def test_who_waits_ends_once_there_is_nothing_to_score(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Although the owner of the claim lives, and renews it."""
    parts, owner = add_parts(cache, 2), Claims(cache.storage)
    assert owner.take(parts[1])
    looks = list[float]()

    def sleep(seconds: float) -> None:
        owner._put(parts[1])
        looks.append(seconds)
        assert len(looks) <= FULL_LOOK_EVERY
        if len(looks) == 1 and how == "retired":
            cache.retire(parts[1], "too old")
        elif len(looks) == 1:
            commit_shard(cache, random_arrays(1, 5, 1), 1)

    monkeypatch.setattr(time, "sleep", sleep)
    assert score(cache, FakeTeacher()).scored == parts[:1]
    assert cache.storage.exists(claim_path(parts[1]))


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str, asked: dict[str, int]) -> None:
    """Count the calls of a method of all storages."""
    real = getattr(Storage, name)

    def counting(self: Storage, *args: Any) -> Any:
        asked[name] = asked.get(name, 0) + 1
        return real(self, *args)

    monkeypatch.setattr(Storage, name, counting)


def test_scorers_delete_nothing(cache: Cache, gate: Path, start: Start, root: Path) -> None:
    (part,) = add_parts(cache, 1)
    gate.touch()
    ended(start(1)[0])
    value = jsonfile.load_sealed(cache.storage.get(claim_path(part)), "claim")
    assert value["part"] == part
    assert value["working"] is False
    cache.quarantine(part, "again", damaged=False)
    before = {path for path in root.rglob("*") if path.is_file()}
    assert score(cache, FakeTeacher()).scored == [part]
    assert before < {path for path in root.rglob("*") if path.is_file()}


def test_a_part_that_is_retired_meanwhile_is_left(cache: Cache) -> None:
    parts = add_parts(cache, 3)

    class Retiring(FakeTeacher):
        def score(self, rows: Any, spec: Any) -> Any:
            for part in parts:
                cache.retire(part, "too old")
            yield from super().score(rows, spec)

    assert score(cache, Retiring()).scored == []
