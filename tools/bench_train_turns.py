"""Programs that take steps in turns, each in processes of its own, so that the steps of all are
measured under the same conditions."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

ENDLESS = 1_000_000
"""Steps of a program that goes on until it has no more turns."""
END_S = 30.0
"""A program that was told to stop may take so long to end."""

Notes = dict[str, float]


class Turn:
    """A program's side: it asks for its turn before each step.

    Args:
        pipe: to the one who gives turns.
        rank: which of the program's processes this is.
        world: how many there are.
    """

    def __init__(self, pipe: Connection, rank: int = 0, world: int = 1) -> None:
        """Start the clock."""
        self.rank, self.world = rank, world
        self._pipe, self._notes = pipe, Notes()
        self._start = time.perf_counter()

    def note(self, name: str, value: float) -> None:
        """Add to a figure of the step at hand, such as the seconds of a part of it."""
        self._notes[name] = self._notes.get(name, 0.0) + value

    def next(self) -> bool:
        """Say that the step is done (the first time, that all is ready), and wait for the next.

        Returns:
            False if there is none.
        """
        self.note("seconds", time.perf_counter() - self._start)
        self._pipe.send(self._notes)
        self._notes = Notes()
        more: bool = self._pipe.recv()
        self._start = time.perf_counter()
        return more


@dataclass(frozen=True, slots=True)
class Program:
    """One of those that take turns."""

    name: str
    function: str
    """Module and name of what is called in each process, with its Turn and the arguments; imported
    there alone."""
    args: tuple[Any, ...] = ()
    world: int = 1
    """Processes; each finds its place in the variables that torchrun sets."""
    threads: int = 1
    """Threads of each process."""


@dataclass(slots=True)
class _Running:
    processes: list[BaseProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def step(self) -> Notes:
        """Give a turn; returns the slowest process's figures."""
        self.send(True)
        return self.answer()

    def send(self, more: bool) -> None:
        for pipe in self.pipes:
            pipe.send(more)

    def answer(self) -> Notes:
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return max(answers, key=lambda notes: notes["seconds"])


def take_turns(
    programs: list[Program], steps: int, done: Callable[[], None], *, warm_up: int = 1
) -> dict[str, list[Notes]]:
    """Let programs take steps in turns.

    Args:
        programs: who.
        steps: that each takes and that count.
        done: called after each such step.
        warm_up: steps of each before those.

    Returns:
        For each program's name the figures of its steps; `seconds` is always there.

    Raises:
        EOFError: a program ended early.
        Exception: what a program raised.
    """
    with _started(programs) as running:
        found: dict[str, list[Notes]] = {program.name: [] for program in programs}
        for number in range(warm_up + steps):
            for name, one in running.items():
                notes = one.step()
                if number >= warm_up:
                    found[name].append(notes)
                    done()
        for one in running.values():
            one.send(False)
            for process in one.processes:
                process.join(END_S)
        return found


@contextmanager
def _started(programs: list[Program]) -> Iterator[dict[str, _Running]]:
    """Start programs one after another, each once the last one is ready; end them all."""
    running: dict[str, _Running] = {}
    try:
        for program in programs:
            running[program.name] = one = _Running()
            _start(program, one)
            one.answer()
        yield running
    finally:
        for one in running.values():
            for process in one.processes:
                process.kill()
                process.join()
            for pipe in one.pipes:
                pipe.close()


def _start(program: Program, one: _Running) -> None:
    context, port = get_context("spawn"), _free_port()
    for rank in range(program.world):
        ours, theirs = context.Pipe()
        environment = {"OMP_NUM_THREADS": str(program.threads)}
        if program.world > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(program.world),
                "LOCAL_WORLD_SIZE": str(program.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        process = context.Process(target=_run, args=(theirs, program, rank, environment))
        process.start()
        theirs.close()
        one.processes.append(process)
        one.pipes.append(ours)


def _run(pipe: Connection, program: Program, rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the figures
    module, _, name = program.function.rpartition(".")
    try:
        getattr(import_module(module), name)(Turn(pipe, rank, program.world), *program.args)
    except Exception as error:
        pipe.send(error)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port
