"""Attempts: each has a folder of its own, and an end."""

import time

import pytest

from stillroom.cache.attempt import COMMIT_WITHIN_S, NAME, Attempt
from stillroom.cache.clock import DAY_S
from stillroom.cache.collect import MIN_AGE_S

PART = "v000003-0123456789abcdef"


def test_two_attempts_at_a_part_share_nothing() -> None:
    first, second = Attempt(PART), Attempt(PART)
    assert first.path == f"scores/{PART}/{first.id}"
    assert first.id != second.id
    assert NAME.fullmatch(first.id)


def test_an_attempt_expires_long_before_gc_may_remove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, start = Attempt(PART), time.time()
    assert not attempt.expired()
    monkeypatch.setattr(time, "time", lambda: start + COMMIT_WITHIN_S - 60)
    assert not attempt.expired()
    monkeypatch.setattr(time, "time", lambda: start + COMMIT_WITHIN_S + 60)
    assert attempt.expired()
    assert COMMIT_WITHIN_S * 4 <= MIN_AGE_S == DAY_S


def test_an_attempt_that_has_no_time_is_expired_at_once() -> None:
    assert Attempt(PART, commit_within_s=-1).expired()
