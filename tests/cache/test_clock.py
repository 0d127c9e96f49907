"""Clocks: suspended time and a wall clock that is set count, a clock that is set back does not."""

import time
from pathlib import Path

import pytest

from stillroom.cache import clock
from stillroom.cache.clock import Stopwatch, StoreClock
from stillroom.cache.storage import Storage


class Clocks:
    """Clocks that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of those of `time`."""
        self.since_boot, self.wall = 100.0, 1_000_000.0
        monkeypatch.setattr(time, "clock_gettime", self._read)
        monkeypatch.setattr(time, "time", lambda: self.wall)

    def _read(self, which: int) -> float:
        assert which == clock._STEADY
        return self.since_boot


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Clocks at some time."""
    return Clocks(monkeypatch)


def test_the_clock_counts_suspended_time_where_there_is_one() -> None:
    assert getattr(time, "CLOCK_BOOTTIME", clock._STEADY) == clock._STEADY


@pytest.mark.parametrize(
    ("since_boot", "wall", "elapsed"), [(5, 5, 5), (7, 0, 7), (7, -3600, 7), (0, 9, 9), (2, 9, 9)]
)
def test_the_larger_of_two_clocks_counts(
    clocks: Clocks, since_boot: float, wall: float, elapsed: float
) -> None:
    stopwatch = Stopwatch()
    clocks.since_boot += since_boot
    clocks.wall += wall
    assert stopwatch.elapsed_s() == elapsed


def test_the_store_is_asked_once(
    clocks: Clocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([5000.0])
    monkeypatch.setattr(Storage, "now", lambda _: next(asked))
    store = StoreClock(Storage(tmp_path))
    clocks.since_boot += 50
    assert store.now() == 5000
    clocks.since_boot += 30
    assert store.now() == 5030


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_wall_clock_that_is_set_does_not_move_the_stores(
    clocks: Clocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    monkeypatch.setattr(Storage, "now", lambda _: 5000.0)
    store = StoreClock(Storage(tmp_path))
    assert store.now() == 5000
    clocks.wall += step
    assert store.now() == 5000
    clocks.since_boot += 7
    assert store.now() == 5007
