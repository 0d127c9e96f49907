"""Progress: plain lines where there is no terminal, with a rate and the time left."""

import itertools
import sys

import pytest

from stillroom.cache.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its only entry is the time."""
    now = [100.0]
    monkeypatch.setattr("stillroom.cache.progress.time.monotonic", lambda: now[0])
    return now


def test_nothing_is_printed_for_short_work(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("score", 10, "positions") as shown:
        for _ in range(10):
            clock[0] += 1
            shown.advance()
    out, err = capsys.readouterr()
    assert out == err == ""


def test_a_line_says_rate_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("score", 10_000, "positions") as shown:
        for _ in range(4):
            clock[0] += 15
            shown.advance(1500)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "  score: 1,500 of 10,000 positions, 100/s, 85 s left",
        "  score: 4,500 of 10,000 positions, 100/s, 55 s left",
    ]


def test_slow_work_has_a_rate_below_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress("train", 4, "steps")
    for _ in range(2):
        clock[0] += 40
        shown.advance()
    assert capsys.readouterr().err == "  train: 1 of 4 steps, 0.03/s, 120 s left\n"


def test_more_is_said_behind_it(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def more(left: int, rate: float) -> str:
        return f"; {left} and {rate:.0f}"

    shown = Progress("score", 1000, "positions", more)
    for _ in range(2):
        clock[0] += 25
        shown.advance(250)
    line = "  score: 250 of 1,000 positions, 10/s, 75 s left; 750 and 10\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (599, "599 s"), (601, "10.0 min"), (9000, "2.5 h")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("score", 3, "positions") as shown:
        for _ in itertools.repeat(None, 3):
            shown.advance()
    err = capsys.readouterr().err
    assert "score" in err
    assert "positions" in err
