"""A coroutine as an iterator: in order, with its error, and nothing of it left behind."""

import asyncio
import threading
from collections.abc import Callable, Generator

import pytest

from stillroom.cache.server_thread import results_of

Deliver = Callable[[int], None]


async def count(deliver: Deliver, end: int) -> None:
    """Deliver whole numbers."""
    for i in range(end):
        await asyncio.sleep(0)
        deliver(i)


def numbers(end: int) -> list[int]:
    """The same, from the thread."""
    found: Generator[int, None, None] = results_of(lambda deliver: count(deliver, end))
    return list(found)


def test_results_come_in_order_and_the_thread_ends() -> None:
    before = threading.active_count()
    assert numbers(5) == [0, 1, 2, 3, 4]
    assert numbers(0) == []
    assert threading.active_count() == before


def test_an_error_comes_after_the_results() -> None:
    async def fail(deliver: Deliver) -> None:
        deliver(1)
        raise ValueError("late")

    found = results_of(fail)
    assert next(found) == 1
    with pytest.raises(ValueError, match="late"):
        next(found)


def test_one_that_is_closed_early_is_cancelled_and_waited_for() -> None:
    cleaned = []

    async def endless(deliver: Deliver) -> None:
        try:
            deliver(1)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    found = results_of(endless)
    assert next(found) == 1
    before = threading.active_count()
    found.close()
    assert cleaned == [True]
    assert threading.active_count() == before - 1


def test_it_works_where_a_loop_runs_already() -> None:
    async def outer() -> list[int]:
        return numbers(3)

    assert asyncio.run(outer()) == [0, 1, 2]
