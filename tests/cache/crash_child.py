"""A job that kills itself: run by test_crash as `python -m tests.cache.crash_child`.

Reads lines `task mode point root`. For each it forks a child, which does the task and dies at its
change of the disk of that number. Answers with the change at hand, or "finished". It starts no
thread of its own, so that it may fork.
"""

import os
import signal
import stat
import sys
from collections.abc import Callable
from typing import Any

from stillroom.cache.canary import check_canary
from stillroom.cache.collect import Collection, collect, plan_collection
from stillroom.cache.part import encode_part
from stillroom.cache.score import ScoreReport, score
from stillroom.cache.store import Cache
from tests.cache.fakes import (
    FakeTeacher,
    make_identity,
    make_meta,
    random_rollouts,
)

PARTS = 2
CHANGES = ("mkdir", "fsync", "link", "replace", "unlink", "rmdir")
MODES = ("before", "after", "torn")


def plan(root: str) -> Cache:
    """Make the cache, its canary and its parts, as far as they are not there."""
    cache = Cache.create(root, make_identity())
    check_canary(cache, FakeTeacher())
    for number in range(PARTS):
        cache.add_part(random_rollouts(number, 3), make_meta(number))
    return cache


def score_all(root: str) -> ScoreReport:
    """Score what is not scored."""
    return score(Cache.open(root), FakeTeacher())


def collect_all(root: str) -> Collection:
    """Remove what nobody needs."""
    cache = Cache.open(root)
    return collect(cache, plan_collection(cache))


TASKS: dict[str, Callable[[str], object]] = {"plan": plan, "score": score_all, "gc": collect_all}


class Killer:
    """Dies at a change of the disk: before it, after it, or with the file at hand half written."""

    def __init__(self, mode: str, point: int) -> None:
        """Count from 1."""
        self.mode, self.left = mode, point

    def wrap(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        """A change that may be the last."""

        def changing(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.mode == "torn" and name == "fsync":
                tear(args[0])
            if self.left == 0 and self.mode != "after":
                die(name)
            try:
                return change(*args, **kwargs)
            finally:
                if self.left == 0:
                    die(name)

        return changing


def tear(handle: int) -> None:
    """Cut a file in half."""
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode):
        os.ftruncate(handle, status.st_size // 2)


def no_fsync(fd: object) -> None:
    """Do nothing: what a killed process wrote is seen by others all the same."""


def die(name: str) -> None:
    """Say where, and end at once."""
    os.write(1, f"{name}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def run(task: str, mode: str, point: int, root: str) -> None:
    """Do a task in a forked child until that ends."""
    child = os.fork()
    if child == 0:
        killer = Killer(mode, point)
        os.fsync = no_fsync
        for name in CHANGES:
            setattr(os, name, killer.wrap(name, getattr(os, name)))
        TASKS[task](root)
        os.write(1, b"finished\n")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        os.write(1, b"failed\n")


if __name__ == "__main__":
    encode_part(random_rollouts(0, 1), make_meta())  # what pyarrow imports late takes 0.5 s
    for line in sys.stdin:
        chosen_task, chosen_mode, number, folder = line.rstrip("\n").split(" ", 3)
        run(chosen_task, chosen_mode, int(number), folder)
