"""The score job as a service: it scores what arrives, and lets go of its part when it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import canary, jsonfile
from stillroom.cache.claims import Claims, claim_path
from stillroom.cache.errors import NumericsError
from stillroom.cache.score import Scorer, score
from stillroom.cache.store import Cache
from stillroom.cache.watch import watch
from tests.cache.fakes import FakeTeacher, make_meta, make_rollout, make_table, random_rollouts
from tests.cache.test_score import Failing

ROOT = Path(__file__).resolve().parents[2]


def add(cache: Cache, number: int) -> str:
    """Add a tiny part; its name."""
    assert cache.add_part(random_rollouts(number, 2), make_meta(number))
    return make_meta(number).name


def watch_until(
    monkeypatch: pytest.MonkeyPatch, scorer: Scorer, events: dict[int, Callable[[], object]]
) -> list[float]:
    """Watch until the look after the last event; an event happens during the pause of its number.
    The pauses."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > max(events, default=0):
            raise KeyboardInterrupt
        events.get(len(slept), lambda: None)()

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch(scorer, 30.0)
    monkeypatch.undo()
    return slept


def test_what_arrives_is_scored_and_pauses_grow_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, scorer = add(cache, 1), Scorer(cache, FakeTeacher())
    slept = watch_until(monkeypatch, scorer, {6: lambda: add(cache, 2), 7: lambda: None})
    assert scorer.report.scored == [first, make_meta(2).name]
    assert slept[0] <= 2
    assert slept[5] >= 0.75 * 30
    assert slept[6] <= 2, "it looks often again once something came"
    assert capsys.readouterr().err.count("score: waiting for new parts\n") == 2, "once a wait"


def test_a_part_that_another_holds_delays_nothing_that_is_new(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, other = add(cache, 1), Claims(cache.storage)
    assert other.take(held)
    scorer = Scorer(cache, FakeTeacher())
    events: dict[int, Callable[[], object]] = {
        1: lambda: add(cache, 2),
        3: lambda: other._put(held, working=False),
    }
    watch_until(monkeypatch, scorer, events)
    assert scorer.report.scored == [make_meta(2).name, held]
    assert "new parts; other workers have claimed 1" in capsys.readouterr().err


def test_a_part_that_cannot_be_scored_ends_no_service(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = add(cache, 1), make_meta(2).name
    assert cache.add_part(make_table([make_rollout(prompt=[39], completion=[1])]), make_meta(2))
    error = NumericsError("row 0", "finite teacher logits", "nan", "Do.")
    scorer = Scorer(cache, Failing(error, token=39))
    watch_until(monkeypatch, scorer, {2: lambda: add(cache, 3)})
    assert scorer.report.scored == [good, make_meta(3).name]
    said = capsys.readouterr().err
    assert said.count(f"score: {bad} is left out: {bad}, row 0: expected finite") == 1
    assert not Claims(cache.storage).is_held(bad)
    assert score(cache, FakeTeacher()).scored == [bad], "another teacher may do it"


def test_the_teacher_stays_and_its_canary_is_scored_every_hour(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(cache, 1)
    teacher, now = FakeTeacher(), [0.0]
    scorer = Scorer(cache, teacher)
    monkeypatch.setattr(canary, "time", type("Clock", (), {"monotonic": lambda: now[0]}))
    scorer.score_free(cache.unscored())
    rows = len(canary.canary_rows(cache.identity.vocab_size, cache.identity.max_length))
    read = [len(teacher.read)]
    for hour in (0.9, 1.1):
        now[0] = hour * canary.CHECK_EVERY_S
        add(cache, int(10 * hour))
        scorer.score_free(cache.unscored())
        read.append(len(teacher.read))
    assert read == [rows + 2, rows + 4, 2 * rows + 6]


@pytest.mark.dist
def test_a_service_that_is_told_to_end_lets_go_of_its_part(
    cache: Cache, root: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    command = [sys.executable, "-m", "tests.cache.scorer_child", str(root), str(gate), "watch"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    seen: set[float] = set()
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        first = add(cache, 1)
        wait_for(lambda: cache.is_scored(first))
        gate.unlink()
        second = add(cache, 2)
        wait_for(lambda: len(renewals(cache, second, seen)) > 2)
        os.kill(process.pid, signal.SIGTERM)
        said = json.loads(process.stdout.readline())
        assert process.wait(timeout=60) == 0
    assert said == {"scored": [first], "lost": []}
    claim = jsonfile.load_sealed(cache.storage.get(claim_path(second)), "claim")
    assert claim["working"] is False
    assert score(cache, FakeTeacher()).scored == [second]


def renewals(cache: Cache, part: str, seen: set[float]) -> set[float]:
    """Times at which a part's claim was found to be put."""
    entry = cache.storage.entry(claim_path(part))
    if entry is not None:
        seen.add(entry.modified)
    return seen


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
