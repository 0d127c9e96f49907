"""Shared work: a worker's own share first, then what others left; nothing twice."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stillroom.cache.claims import Claims
from stillroom.cache.shared_work import LOOK_AFTER_S, SharedWork, pauses
from stillroom.cache.storage import Storage
from stillroom.cache.workers import Worker
from tests.cache.fakes import make_meta

NAMES = [make_meta(number).name for number in range(12)]
RANKS = [Worker(rank=rank, world_size=2) for rank in range(2)]


class Done:
    """What was done, by whom, in order."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.by: list[tuple[int, str]] = []

    def work(self, rank: int) -> SharedWork:
        """The work, as one worker sees it."""

        def do(name: str, progress: Callable[[], None]) -> None:
            progress()
            self.by.append((rank, name))

        return SharedWork(
            job="try",
            claims=Claims(self.storage),
            is_left=lambda name: name not in self.names,
            do=do,
            worker=RANKS[rank],
        )

    @property
    def names(self) -> list[str]:
        """The pieces."""
        return [name for _, name in self.by]


@pytest.fixture
def done(tmp_path: Path) -> Done:
    """Nothing yet."""
    return Done(Storage(tmp_path))


def test_a_workers_own_share_comes_first(done: Done) -> None:
    done.work(0).do_all(NAMES)
    share = [name for name in NAMES if RANKS[0].owns(name)]
    assert 0 < len(share) < len(NAMES)
    assert sorted(done.names[: len(share)]) == sorted(share)
    assert sorted(done.names) == sorted(NAMES), "and then it helps"


def test_who_comes_later_does_what_is_left(done: Done) -> None:
    first, second = done.work(0), done.work(1)
    assert first.do_free(NAMES[:5]) == []
    assert second.do_free(NAMES) == []
    assert sorted(done.names) == sorted(NAMES), "each once"


def test_what_another_holds_is_left_to_it_and_waited_for(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Claims(done.storage)
    assert other.take(NAMES[3])
    assert done.work(0).do_free(NAMES) == [NAMES[3]]
    looks: list[float] = []

    def finish(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            done.by.append((1, NAMES[3]))
            other._put(NAMES[3], working=False)

    monkeypatch.setattr(time, "sleep", finish)
    done.work(0).do_all(NAMES)
    assert sorted(done.names) == sorted(NAMES)
    assert len(looks) == 2
    assert "try: waiting for parts that other workers have claimed: 1" in capsys.readouterr().err


def test_a_claim_of_who_does_something_else_with_a_piece_delays_nobody(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of the scorer of a part that another rank has sampled."""
    other = Claims(done.storage)
    assert other.take(NAMES[3])
    looks: list[float] = []

    def finish(seconds: float) -> None:
        looks.append(seconds)
        assert len(looks) < 9
        if len(looks) == 2:
            done.by.append((1, NAMES[3]))

    monkeypatch.setattr(time, "sleep", finish)
    replace(done.work(0), full_look_every=1).do_all(NAMES)
    assert len(looks) == 2
    assert sorted(done.names) == sorted(NAMES)


@pytest.mark.parametrize("longest", [0.5, 30.0])
def test_pauses_grow_to_the_longest(longest: float) -> None:
    waits = pauses(longest)
    found = [next(waits) for _ in range(12)]
    assert all(0 < wait <= longest for wait in found)
    assert found[0] <= min(LOOK_AFTER_S[0], longest)
    assert min(found[-4:]) >= 0.75 * longest
