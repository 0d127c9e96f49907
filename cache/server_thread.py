"""A coroutine's results as a plain iterator, so that callers need know nothing of asyncio."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def results_of(
    start: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]],
) -> Generator[T, None, None]:
    """What a coroutine delivers, as it comes; its error, if it has one, comes last.

    It runs in a thread of its own, which ends with the iterator: one that is closed early cancels
    the coroutine and waits for it.

    Args:
        start: makes the coroutine, given what to call with each result.
    """
    found: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(start(lambda result: found.put((result,))))
    thread = threading.Thread(target=_run, args=(loop, task, found), daemon=True)
    thread.start()
    try:
        while (item := found.get()) is not None:
            yield item[0]
        task.result()
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the task has ended
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        if not task.cancelled():
            task.exception()  # seen, so that the loop does not report it


def _run(
    loop: asyncio.AbstractEventLoop,
    task: asyncio.Task[None],
    found: "queue.SimpleQueue[tuple[T] | None]",
) -> None:
    try:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
        found.put(None)
