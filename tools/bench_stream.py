"""One measurement of a replay stream, made in a process of its own: what it delivers, how long a
trainer waits for it, and how long it takes to resume."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay import Batch, ReplayStream, Source, StreamConfig
from stillroom.tools.bench_peers import Rows, rows_of

FAR = 1_000_000
RESUMES = 3
END_S = 10.0
"""A process that has answered may take so long to end."""
Result = TypeVar("Result")


WARM_UP = 32
"""Steps, of one row a lane, in which about half of a lane's first window goes by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What is replayed."""

    root: str
    parts: tuple[str, ...]
    copies: int = 1
    """How often the parts are listed: a small cache read as one so many times as large."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set before the root is opened."""

    def source(self) -> Source:
        """The cache, and the parts as a snapshot that is stored nowhere."""
        os.environ.update(self.environment)
        cache = Cache.open(self.root)
        live = cache.commits()
        paths = [commit_path(part, live[part]) for part in self.parts]
        commits = tuple(read_commit(cache.storage, path) for path in paths)
        return Source(cache, Snapshot(commits * self.copies))

    def rows(self) -> Rows:
        """The sequences of the parts, once each."""
        source = self.source()
        commits = source.snapshot.commits[: len(self.parts)]
        return [row for commit in commits for row in rows_of(source.cache.shard(commit).all_rows())]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered:
    """Packed rows."""

    positions: int
    seconds: float
    cores: float
    """Processor time by wall time."""
    memory_mb: float
    """What the process grew by at most, MiB."""

    @property
    def positions_s(self) -> float:
        """Positions a second."""
        return self.positions / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Waited:
    """A trainer that takes so many tokens a second, and does nothing else."""

    tokens_s: float
    first_batch_s: float
    share: float
    """Of its time, the first batch left out, in which it waits for a batch."""
    later_share: float
    """The same without the first WARM_UP steps, in which all lanes open their first blocks."""
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """From a state to the first batch after it, medians."""

    step: int
    load_s: float
    first_batch_s: float


def alone(measure: Callable[..., Result], *args: Any, most_s: float | None = None) -> Result:
    """Call a function in a new process.

    Raises:
        TimeoutError: it took longer than that; the process was ended.
        EOFError: the process ended without an answer.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, measure, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(most_s):
            raise TimeoutError(f"no answer within {most_s} s")
        answer = ours.recv()
        process.join(END_S)
    except EOFError:
        process.join(END_S)
        raise EOFError(f"no answer: its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(answer, Exception):
        raise answer
    return cast("Result", answer)


def deliver(replayed: Replayed, config: StreamConfig) -> Delivered:
    """Take one epoch of a stream that has decoded nothing yet."""
    return deliver_epochs(replayed, config, 1)[0]


def deliver_epochs(replayed: Replayed, config: StreamConfig, epochs: int) -> list[Delivered]:
    """Take epochs one after another, each measured by itself."""
    found = []
    with ReplayStream(replayed.source(), config) as stream:
        for _ in range(epochs):
            with measuring() as measured:
                batches = (stream.next_batch() for _ in range(stream.steps_per_epoch))
                measured.positions = sum(map(_positions, batches))
            found.append(measured.found())
    return found


def wait(replayed: Replayed, config: StreamConfig, tokens_s: float, most_s: float) -> Waited:
    """Take batches as a trainer would, for an epoch or so many seconds.

    Args:
        replayed: what to read.
        config: how.
        tokens_s: what the trainer takes.
        most_s: end after about so long.
    """
    with ReplayStream(replayed.source(), config) as stream:
        start = time.perf_counter()
        batch = stream.next_batch()
        begun = now = time.perf_counter()
        taken: list[tuple[float, float]] = []
        while len(taken) + 1 < stream.steps_per_epoch and now - begun < most_s:
            before = now
            time.sleep(_tokens(batch) / tokens_s)
            asked = time.perf_counter()
            batch = stream.next_batch()
            now = time.perf_counter()
            taken.append((now - asked, now - before))
    return Waited(
        tokens_s=tokens_s,
        first_batch_s=begun - start,
        share=_share(taken),
        later_share=_share(taken[WARM_UP:]),
        steps=len(taken) + 1,
    )


def _share(taken: list[tuple[float, float]]) -> float:
    """Seconds of waiting in all seconds; 0 without any."""
    waited, seconds = map(sum, zip(*taken, strict=True)) if taken else (0.0, 1.0)
    return waited / seconds


def resume(replayed: Replayed, config: StreamConfig) -> list[Resumed]:
    """Restore states at steps 1 and FAR, and take a batch."""
    source = replayed.source()
    return [_resumed(source, config, step) for step in (1, FAR)]


def checksum(ids: np.ndarray) -> int:
    """Of token ids, whatever their order."""
    return int(ids.sum(dtype=np.int64))


def delivered_ids(replayed: Replayed, config: StreamConfig) -> int:
    """Checksum of an epoch's teacher ids."""
    with ReplayStream(replayed.source(), config) as stream:
        batches = (stream.next_batch() for _ in range(stream.steps_per_epoch))
        return sum(checksum(m.topk_id) for batch in batches for m in batch.micro_batches if m)


class Measured:
    """What `measuring` measures; who measures sets the positions."""

    def __init__(self) -> None:
        """Start the clocks."""
        self.positions = 0
        self._peak, self._cpu, self._wall = peak_kib(), time.process_time(), time.perf_counter()
        self._seconds = self._cores = self._grown = 0.0

    def stop(self) -> None:
        """Read the clocks."""
        self._seconds = time.perf_counter() - self._wall
        self._cores = (time.process_time() - self._cpu) / self._seconds
        self._grown = (peak_kib() - self._peak) / 1024

    def found(self) -> Delivered:
        """What was measured."""
        return Delivered(
            positions=self.positions,
            seconds=self._seconds,
            cores=self._cores,
            memory_mb=self._grown,
        )


@contextmanager
def measuring() -> Iterator[Measured]:
    """Measure time, processor time and memory of a block."""
    measured = Measured()
    yield measured
    measured.stop()


def peak_kib() -> int:
    """Largest resident size of this process alone: what getrusage says is inherited."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])


def _answer(pipe: Any, measure: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send(measure(*args))
    except Exception as error:
        pipe.send(error)


def _resumed(source: Source, config: StreamConfig, step: int) -> Resumed:
    loads, firsts = [], []
    for seed in range(RESUMES):
        with ReplayStream(source, replace(config, seed=seed)) as stream:
            state = _state_at(stream, config, step)
            start = time.perf_counter()
            stream.load_state_dict(state)
            loaded = time.perf_counter()
            stream.next_batch()
            loads.append(loaded - start)
            firsts.append(time.perf_counter() - loaded)
    return Resumed(
        step=step, load_s=float(np.median(loads)), first_batch_s=float(np.median(firsts))
    )


def _state_at(stream: ReplayStream, config: StreamConfig, step: int) -> dict[str, Any]:
    """The state after so many steps of whole epochs, without taking them."""
    state = stream.state_dict()
    epoch, within = divmod(step, stream.steps_per_epoch)
    place = {"epoch": epoch, "first": within * config.batch_rows}
    sources = [source | place for source in state["sources"]]
    return state | {"step": step, "drawn": step * config.batch_rows, "sources": sources}


def _positions(batch: Batch) -> int:
    return sum(m.num_positions for m in batch.micro_batches if m)


def _tokens(batch: Batch) -> int:
    return sum(len(m.token) for m in batch.micro_batches if m)
