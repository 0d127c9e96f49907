"""The stream of a run, opened for what its student can read, with its snapshot pinned while it is
replayed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.follow import Agree, agree_among
from stillroom.replay.pinned import empty_for
from stillroom.replay.stream import ReplayStream
from stillroom.train.config import ReplayConfig
from stillroom.train.parallel import same_on_all_ranks
from stillroom.train.run_snapshot import keep_snapshot, release_snapshot, snapshot_for
from stillroom.train.student import Student


class RunStream:
    """Opens a run's stream and keeps its pin; one rank of several writes.

    Args:
        cache: the cache.
        output: the run's folder.
        run: its name.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, cache: Cache, output: Path, run: str, rank: int, world: int) -> None:
        """Open nothing yet."""
        self._cache, self._output, self._run = cache, output, run
        self._rank, self._world = rank, world

    def choose(self, device: str, resumed: Callable[[], str | None] = lambda: None) -> Snapshot:
        """What the run's newest checkpoint was on, or all that is scored: the same on all ranks,
        and pinned. `device` is the setting; `resumed` names the snapshot of a checkpoint that is
        kept elsewhere, and is called on one rank."""

        def first_rank() -> str:
            return snapshot_for(self._cache, self._output, self._run, resumed()).id

        return self._cache.open_snapshot(same_on_all_ranks(first_rank, device))

    def open(
        self,
        snapshot: Snapshot,
        config: ReplayConfig,
        student: Student,
        vocab_size: int,
        say: Callable[[str], None],
    ) -> ReplayStream:
        """The stream of this rank.

        Raises:
            InputError, MismatchError: as `ReplayStream`.
        """
        device = student.model.device
        self._stream = ReplayStream(
            Source(self._cache, snapshot),
            stream_config(config.replay, student, device, say, bf16=config.bf16),
            rank=self._rank,
            world=self._world,
            one_row=not student.packs,
            vocab_size=vocab_size,
            empty=empty_for(device),
            agree=self._agree() if config.replay.follow_every_steps else None,
            say=lambda missing: say(f"  {missing}"),
        )
        _warn_of_rereads(self._stream, config.replay, say)
        return self._stream

    def keep(self, *more: str) -> None:
        """Renew the pin of what is read now, and pin these snapshots too."""
        if self._rank == 0:
            snapshots = (*self._stream.snapshots, *more)
            keep_snapshot(self._cache.storage, self._output, self._run, *snapshots)

    def release(self) -> None:
        """Let go of the pin."""
        if self._rank == 0:
            release_snapshot(self._cache.storage, self._output, self._run)

    def _agree(self) -> Agree:
        """How ranks take up newer snapshots: rank 0 pins what it chose before any rank opens it."""
        among = agree_among(self._world)
        return lambda choose: among(partial(self._pinned, choose))

    def _pinned(self, choose: Callable[[], list[str]]) -> list[str]:
        chosen = choose()
        self.keep(*chosen)
        return chosen


def stream_config(
    replay: StreamConfig,
    student: Student,
    device: torch.device,
    say: Callable[[str], None],
    *,
    bf16: bool,
) -> StreamConfig:
    """The settings of replay, with prompts shared where that is wanted and possible; unless it was
    said, on a CPU in float32 only, where gradients are the same to 1e-5."""
    if not student.packs:
        say(f"  one row a micro-batch: {student.why_one_row}")
    share = replay.share_prompts
    if share is None:
        share = replay.group_rows > 1 and device.type == "cpu" and not bf16
    if share and not student.shares:
        say(f"  prompts are not shared: {student.why_unshared}")
    return replace(replay, share_prompts=share and student.shares)


def _warn_of_rereads(
    stream: ReplayStream, replay: StreamConfig, say: Callable[[str], None]
) -> None:
    """Say whether blocks do not fit in memory."""
    if stream.open_bytes > replay.cached_bytes:
        say(
            "  blocks are decoded several times an epoch: "
            f"{stream.open_bytes >> 20} MiB of them are in use at once, and "
            f"replay.cached_bytes is {replay.cached_bytes >> 20} MiB; raise it, or "
            "lower replay.window_rows and replay.block_rows"
        )
