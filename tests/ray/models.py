"""What Ray's processes load in tests: a teacher and a student that wait for a file, and say where
they run."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, Teacher
from stillroom.replay.sampler import Sampled, StudentSampler
from tests.cache.fakes import FakeTeacher


def wait_at(gate: Path) -> None:
    """Note the process beside the gate, and wait until the gate is there."""
    gate.with_name(f"waits-{os.getpid()}").touch()
    while not gate.exists():
        time.sleep(0.02)


class GatedTeacher(FakeTeacher):
    """Answers for parts, but not for the canary, once the gate is there.

    Args:
        gate: a file; beside it each process leaves `loaded-PID` and `waits-PID`.
    """

    def __init__(self, gate: Path) -> None:
        """Draw the table."""
        super().__init__()
        with open(gate.with_name(f"loaded-{os.getpid()}"), "a") as log:
            log.write("loaded\n")
        self.gate, self.calls = gate, 0

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        self.calls += 1
        if self.calls > 1:
            wait_at(self.gate)
        yield from super().score(rows, spec)


class GatedSampler:
    """Gives each prompt back, reversed, once the gate is there.

    Args:
        gate: a file.
    """

    def __init__(self, gate: Path) -> None:
        """Nothing is sampled yet."""
        self.gate = gate

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """See `sampler.StudentSampler`."""
        wait_at(self.gate)
        for index, prompt in enumerate(prompts):
            yield index, Sampled(prompt[::-1], np.full(len(prompt), -1.0, np.float32), "length")


def load_teacher(gate: Path, _cache: Cache) -> Teacher:
    """What a process of the pool calls."""
    return GatedTeacher(gate)


class DeadlyTeacher(FakeTeacher):
    """Kills its process at a part of one row of two tokens."""

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        if [len(row.token) for row in rows] == [2]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().score(rows, spec)


def load_deadly(_cache: Cache) -> Teacher:
    """A teacher that kills its process at a part of one row of two tokens."""
    return DeadlyTeacher()


def load_other(_cache: Cache) -> Teacher:
    """A teacher that is not the cache's."""
    return FakeTeacher(seed=1)


def teacher_at(gate: Path) -> Callable[[Cache], Teacher]:
    """Loads a teacher that waits for a gate."""
    return partial(load_teacher, gate)


def sampler_at(gate: Path) -> Callable[[], StudentSampler]:
    """Loads a sampler that waits for a gate."""
    return partial(GatedSampler, gate)
