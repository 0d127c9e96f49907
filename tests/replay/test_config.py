"""Settings of replay: ranges, each named in its error."""

import math
import os
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.replay.config import LEAST, MAX_THREADS, StreamConfig


@pytest.mark.parametrize("name", LEAST)
def test_the_least_is_taken_and_less_is_refused(name: str) -> None:
    least = LEAST[name]
    assert getattr(StreamConfig(**{name: least}), name) == least  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"replay.{name}: expected at least {least}; got"):
        StreamConfig(**{name: least - 1})  # type: ignore[arg-type]


def test_every_number_has_its_least() -> None:
    numbers = {field.name for field in fields(StreamConfig) if type(field.default) is int}
    assert numbers == {*LEAST, "seed"}, "any whole number is a seed"
    assert StreamConfig(seed=-(2**70)).seed == -(2**70)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"over_long": "cut"}, "replay.over_long: expected one of .*'truncate'"),
        ({"last_batch": "fill"}, "replay.last_batch: expected one of .*'carry'"),
        ({"batch_rows": 10, "group_rows": 4}, "replay.batch_rows: expected a multiple of"),
        ({"batch_rows": 2, "group_rows": 4}, "replay.batch_rows: expected a multiple of"),
        ({"share_prompts": True}, "replay.share_prompts: expected group_rows above 1"),
        ({"lag_half_life": 0.0}, "replay.lag_half_life: expected a finite number above 0"),
        ({"lag_half_life": -1.0}, "replay.lag_half_life"),
        ({"lag_half_life": math.inf}, "replay.lag_half_life"),
        ({"lag_half_life": math.nan}, "replay.lag_half_life"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        StreamConfig(**changes)


def test_what_fits_is_taken() -> None:
    config = StreamConfig(batch_rows=12, group_rows=4, share_prompts=True, lag_half_life=0.5)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_threads_are_those_asked_for_or_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = set(range(3))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    assert StreamConfig(threads=5).read_threads(remote=False) == 5
    assert StreamConfig(threads=5).read_threads(remote=True) == 5
    assert StreamConfig().read_threads(remote=False) == 3
    assert StreamConfig().read_threads(remote=True) == 2 * MAX_THREADS
    cores |= set(range(64))
    assert StreamConfig().read_threads(remote=False) == MAX_THREADS


def test_cores_are_counted_where_a_process_cannot_be_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, threads in ((2, 2), (None, 1), (99, MAX_THREADS)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert StreamConfig().read_threads(remote=False) == threads
