"""The stream as a `torch.utils.data.IterableDataset`: a step an item, also in the worker processes
of a DataLoader, and resumable.

    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")

Worker w of n takes steps w, w + n, and so on, so that the loader, which asks its workers in turn,
gives the steps in order. A worker opens the caches itself; nothing that is open crosses a process.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from stillroom.cache.errors import ConfigError, ForkedError, MissingError
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch
from stillroom.replay.config import StreamConfig
from stillroom.replay.dataset_state import DatasetState
from stillroom.replay.feed import Source, StoredSource
from stillroom.replay.pinned import pinned_empty
from stillroom.replay.state import check_identities, snapshots_in
from stillroom.replay.stream import ReplayStream
from stillroom.replay.tensors import Step, in_one_block, step_tensors

__all__ = ["ReplayDataset", "StoredSource"]


class ReplayDataset(IterableDataset[Step]):
    """Steps of one rank, for a DataLoader with `batch_size=None` (any other adds an axis to every
    tensor, which `from_tensors` refuses), or by themselves.

    Every iteration begins at the beginning, but for the next one after `skip` or a loaded state,
    which begins there: where caches are followed, at the state's snapshots. Memory and threads of
    the settings are divided among workers. Rows that are not replayed are said on standard error,
    by rank 0 and its first worker.

    Args:
        sources: the caches; one or several.
        config: sizes and order, as for `ReplayStream`.
        rank: this process's, 0 to world - 1; workers have the rank of the process that they serve.
        world: number of ranks; say it, as workers cannot find it out.
        num_steps: steps after which the run is over, counted from its beginning; None is never.
            Epochs follow one another inside the stream: it is no number of steps an epoch.
        one_row: whether a micro-batch holds one row only, for students that cannot be packed.
        vocab_size: tokens of the student, if a cache of another vocabulary is to be refused.
        pin: whether tensors lie in page-locked memory, for a trainer on a GPU without workers; with
            workers that is the DataLoader's `pin_memory`.

    Raises:
        ConfigError: the settings contradict one another.
    """

    def __init__(
        self,
        sources: StoredSource | Sequence[StoredSource],
        config: StreamConfig,
        *,
        rank: int = 0,
        world: int = 1,
        num_steps: int | None = None,
        one_row: bool = False,
        vocab_size: int | None = None,
        pin: bool = False,
    ) -> None:
        """Keep the arguments; nothing is opened yet."""
        if num_steps is not None and num_steps < 0:
            raise ConfigError("num_steps", "at least 0, or None", f"{num_steps}", "Raise it.")
        self._sources = (sources,) if isinstance(sources, StoredSource) else tuple(sources)
        self._config, self._rank, self._world = config, rank, world
        self._num_steps, self._one_row, self._pin = num_steps, one_row, pin
        self._vocab_size = vocab_size
        self._start = DatasetState()
        self._running: _Running | None = None
        self._pid = os.getpid()

    def __iter__(self) -> Iterator[Step]:
        """Open the caches, and give the steps from the start on.

        Raises:
            ForkedError: this is a forked worker.
            MismatchError: the loaded state is that of another stream, or another worker's, or the
                caches fit neither each other nor the student.
            MissingError: a cache is gone, or a snapshot.
            ConfigError: a worker is to follow a growing cache.
        """
        self._check_process()
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None and self._config.follow_every_steps:
            do = "Set it to 0, or use no workers: the stream reads ahead in threads of its own."
            got = f"{self._config.follow_every_steps}, where workers cannot agree"
            raise ConfigError("replay.follow_every_steps", "0 in a DataLoader worker", got, do)
        self._running = self._open(self._start.of_worker(worker, workers))
        self._start = DatasetState()
        return self._steps(self._running, shared=info is not None)

    @property
    def snapshots(self) -> list[str]:
        """Ids of the snapshots that the newest iteration of this process reads now, or the next one
        begins with: what is to be pinned."""
        if self._running is not None:
            return self._running.stream.snapshots
        return [source.snapshot for source in self._sources_at(self._start)]

    @property
    def missing(self) -> str:
        """What the newest iteration of this process does not replay, for a person; empty if it
        replays every row, whole, or if there is none yet."""
        return "" if self._running is None else self._running.stream.missing

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration of this process stands, or the next one begins: a small plain
        dict.

        In a worker it is that worker's; `StatefulDataLoader` collects those of all. A process whose
        workers iterate knows the beginning only.
        """
        return (self._start if self._running is None else self._running.state()).plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where another one stood. No step in between is read.

        The state of an iteration without workers, or with one, is good for any number of workers.

        Raises:
            CorruptError: it is no such state.
            MismatchError: it is of another format.
        """
        self._start, self._running = DatasetState.parse(state), None

    def skip(self, steps: int) -> None:
        """Begin the next iteration so many steps later; none of them is read.

        With this alone a trainer that knows how many steps it took resumes on any number of
        workers. Of what a plain DataLoader's workers iterate this process knows nothing: there
        every iteration of the loader begins so many steps later.

        Raises:
            ConfigError: less than 0, or the state that was loaded is that of one worker of several.
        """
        self._start, self._running = self._start.later(steps), None

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a worker: nothing that is open, and not the process's id."""
        return {**self.__dict__, "_running": None, "_pid": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Belong to the process that receives it."""
        self.__dict__.update(state)
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                "replay dataset",
                "the process that made it, or one that it was sent to",
                "a forked child",
                "Give the DataLoader multiprocessing_context='spawn' (or 'forkserver').",
            )

    def _open(self, start: DatasetState) -> "_Running":
        sources = self._opened(start)
        remote = any(not source.cache.storage.is_local for source in sources)
        is_pinned = self._pin and get_worker_info() is None
        pinned: dict[str, Any] = {"empty": pinned_empty} if is_pinned else {}
        stream = ReplayStream(
            sources,
            _share(self._config, start.workers, remote),
            rank=self._rank,
            world=self._world,
            one_row=self._one_row,
            vocab_size=self._vocab_size,
            stride=start.workers,
            say=_say if self._rank == start.worker == 0 else None,
            **pinned,
        )
        try:
            if start.stream is not None:
                stream.load_state_dict(start.stream)
            stream.skip(start.ahead)
        except BaseException:
            stream.close()
            raise
        return _Running(stream, start.step, start.worker, start.workers)

    def _opened(self, start: DatasetState) -> list[Source]:
        sources = self._sources_at(start)
        if start.stream is None or sources is self._sources:
            return [source.open() for source in sources]
        caches = [Cache.open(source.root) for source in sources]
        check_identities(start.stream, [cache.identity.digest() for cache in caches])
        try:
            return [source.open() for source in sources]
        except MissingError as error:
            do = "Restore it, or resume with the caches of the run that saved the state."
            raise MissingError(error.where, error.expected, error.got, do) from error

    def _sources_at(self, start: DatasetState) -> tuple[StoredSource, ...]:
        """The sources; where they are followed, at the snapshots of a state."""
        if start.stream is None or not self._config.follow_every_steps:
            return self._sources
        snapshots = snapshots_in(start.stream)
        if len(snapshots) != len(self._sources):
            return self._sources  # the stream refuses the state, and says why
        pairs = zip(self._sources, snapshots, strict=True)
        return tuple(replace(source, snapshot=one) for source, one in pairs)

    def _steps(self, running: "_Running", *, shared: bool) -> Iterator[Step]:
        try:
            while self._num_steps is None or running.step < self._num_steps:
                step = step_tensors(running.take())
                yield in_one_block(step) if shared else step
        finally:
            running.stream.close()


@dataclass(slots=True)
class _Running:
    """An iteration."""

    stream: ReplayStream
    step: int
    worker: int
    workers: int

    def take(self) -> Batch:
        """The next step of this worker."""
        batch = self.stream.next_batch()
        self.step += self.workers
        return batch

    def state(self) -> DatasetState:
        """Before the next step."""
        return DatasetState(
            step=self.step,
            stream=self.stream.state_dict(),
            worker=self.worker,
            workers=self.workers,
        )


def _share(config: StreamConfig, workers: int, remote: bool) -> StreamConfig:
    """One worker's part of the memory and the threads of all."""
    if workers == 1:
        return config
    return replace(
        config,
        cached_bytes=max(1, config.cached_bytes // workers),
        ahead_bytes=max(1, config.ahead_bytes // workers),
        threads=max(1, config.read_threads(remote) // workers),
    )


def _say(missing: str) -> None:
    print(f"  replay: {missing}", file=sys.stderr, flush=True)
