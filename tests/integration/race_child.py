"""Scorers, collectors and repairers that are to be killed: run as `python -m
tests.integration.race_child` by test_kill_scorers.

Reads lines `task root`, forks a child for each, which does the task, and answers with its pid. It
starts no thread of its own, so that it may fork.
"""

import os
import signal
import sys
import time
from collections.abc import Callable

from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.errors import StillroomError
from stillroom.cache.part import encode_part
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.tools.repair import repair
from stillroom.tools.verify import verify
from tests.cache.fakes import FakeTeacher, make_meta, random_rollouts


def score_all(root: str) -> None:
    """Score what is not scored."""
    score(Cache.open(root), FakeTeacher())


def clean(root: str) -> None:
    """Remove rubbish again and again."""
    while True:
        cache = Cache.open(root)
        collect(cache, plan_collection(cache))
        time.sleep(0.01)


def mend(root: str) -> None:
    """Verify and repair again and again."""
    while True:
        cache = Cache.open(root)
        repair(cache, verify(cache, threads=1), deep=False)
        time.sleep(0.01)


TASKS: dict[str, Callable[[str], None]] = {"score": score_all, "clean": clean, "mend": mend}


def run(task: str, root: str) -> None:
    """Do a task in this process, and end."""
    try:
        TASKS[task](root)
    except StillroomError as error:
        print(f"{task}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    encode_part(random_rollouts(0, 1), make_meta())  # what pyarrow imports late takes 0.5 s
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are nobody's zombies
    for line in sys.stdin:
        chosen, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            run(chosen, folder)
        os.write(1, f"{child}\n".encode())
