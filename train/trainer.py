"""The training loop: replayed batches in, a trained student out. No teacher anywhere."""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import set_seed

from stillroom.cache.errors import ConfigError, NumericsError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.progress import Progress
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.state import snapshots_in
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.checkpoint import (
    LOWER_RATE,
    Progressed,
    check_same_run,
    checkpoints_of,
    load_checkpoint,
    newest_progress,
    save_checkpoint,
)
from stillroom.train.config import ReplayConfig
from stillroom.train.curves import Curves
from stillroom.train.decisive import decisive_settings
from stillroom.train.fits import check_fits, check_ranks_agree, check_run_name, policy_of
from stillroom.train.launcher import asked_in_vain
from stillroom.train.open_phases import PhaseOpener
from stillroom.train.optimizer import (
    check_sharded,
    check_trainable,
    make_optimizer,
    make_schedule,
    scaled_rate,
)
from stillroom.train.own_callbacks import check_names, own_callbacks
from stillroom.train.parallel import Parallel
from stillroom.train.phase_streams import Opened, PhaseStreams
from stillroom.train.ranks import from_every_rank, join_ranks, rank, world
from stillroom.train.replay_loss import ReplayLoss
from stillroom.train.report import TrainReport
from stillroom.train.run_stream import RunStream
from stillroom.train.step import Tokens, backward
from stillroom.train.student import load_trainable


class ReplayTrainer:
    """Trains one student on one snapshot, on one process or on all that were launched together.

    Args:
        student: folder of a Hugging Face model, or its inspected files.
        cache: the cache, or where it is.
        config: how.
        snapshot: which shards are replayed; None for all that is scored, or what the run's newest
            checkpoint was on. That is pinned until `train` has ended. A given one is the caller's
            to pin, and `release` lets go of it, and of what phases read, once the student is kept.
        policy_version: which policy the student is; None looks among the cache's, and -1 is none of
            them.
        output: folder for checkpoints and TensorBoard logs; None for one of the run's name below
            `runs`.
        run: the run's name.
        callbacks: what is told of each step, after the trainer's own.

    Raises:
        ConfigError: a setting cannot be used, or two callbacks have one name.
        MismatchError: the student, the settings or the other ranks do not fit the cache, or the
            checkpoint that the run would go on from.
        CorruptError: there are checkpoints, and none is whole.
    """

    loss_class = ReplayLoss
    """Makes the loss of the settings; a subclass may have another."""

    def __init__(
        self,
        student: str | Path | ModelFiles,
        cache: str | Cache,
        config: ReplayConfig,
        *,
        snapshot: Snapshot | None = None,
        policy_version: int | None = None,
        output: str | Path | None = None,
        run: str = "replay",
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Load the student and set up optimiser, schedule and stream."""
        check_run_name(run)
        self.config, self.run = config, run
        self.cache = cache if isinstance(cache, Cache) else Cache.open(cache)
        self.files = student if isinstance(student, ModelFiles) else inspect_model(str(student))
        self.output = (Path("runs") / run if output is None else Path(output)).absolute()
        check_fits(self.files, self.cache, config)
        self._join(config)
        self._releases = snapshot is None
        self._replayed = RunStream(self.cache, self.output, run, self.rank, self.world)
        self._checkpoints = checkpoints_of(self.output, run)
        self._settings = decisive_settings(config, "train.")
        self.resumed = resumed = newest_progress(self._checkpoints)
        if resumed is not None:
            check_same_run(resumed, self._checkpoints, self.files.fingerprint, self._settings)
        if policy_version is None:
            policy_version = policy_of(self.files, self.cache)
        self.policy_version = policy_version
        self._logged: dict[str, float] = {}
        self._curves = Curves(self.output / "tensorboard" / run, writes=self.is_main)
        self.step, self.stopped, self._trained = 0, "", False
        self._saved_step = 0
        self.callbacks = (*own_callbacks(self.cache, config), *callbacks)
        check_names([PhaseStreams.name, *(callback.name for callback in self.callbacks)])
        self._tell(lambda callback: callback.on_open(self))
        snapshot = snapshot or self._replayed.choose(config.device, lambda: _snapshot_of(resumed))
        check_ranks_agree(run, self.files, snapshot)
        self._set_up(snapshot, resumed)

    def _join(self, config: ReplayConfig) -> None:
        self.device = join_ranks(config.device)
        self.rank, self.world = rank(), world()
        check_trainable(config, self.device)
        check_sharded(config, self.world)
        if unread := asked_in_vain(config, os.environ):
            self.print(f"  {unread}")

    def _set_up(self, snapshot: Snapshot, resumed: Progressed | None) -> None:
        config = self.config
        set_seed(config.seed)
        self.student = load_trainable(self.files, config, self.device)
        self.parallel = Parallel(
            self.student.model, config.parallel, bf16=config.bf16, device=self.device
        )
        self.stream = self._replayed.open(
            snapshot, config, self.student, self.files.vocab_size, self.print
        )
        self.loss = self.loss_class(
            self.student, self.cache.identity, config, config.loss_bytes, config.bf16
        )
        self.optimizer = make_optimizer(self.student.model.parameters(), config)
        opener = PhaseOpener(
            config=config,
            root=self.cache.storage.root,
            student=self.student,
            files=self.files,
            output=self.output,
            run=self.run,
            rank=self.rank,
            world=self.world,
            say=self.print,
            resumed=None if resumed is None else resumed.callbacks.get(PhaseStreams.name),
        )
        replayed = self._replayed
        self.phases = opener.open(
            Opened(self.stream, self.cache.identity, replayed.keep, replayed.release)
        )
        self._losses = self.phases.losses(self.loss)
        self.callbacks = (self.phases, *self.callbacks)
        self.total_steps = self.phases.plan.total_steps
        self.schedule = make_schedule(self.optimizer, config, self.total_steps)
        set_seed(config.seed + self.rank)  # dropout of its own on each rank

    @property
    def is_main(self) -> bool:
        """Whether this process publishes and writes records for all ranks."""
        return bool(self.rank == 0)

    def print(self, text: str) -> None:
        """Print a line, on one rank."""
        if self.is_main:
            print(text, flush=True)

    def log(self, values: Mapping[str, float]) -> None:
        """Add numbers to the record of this step that trackers get."""
        self._logged.update(values)

    def stop(self, reason: str) -> None:
        """End the training after this step, on all ranks. With `save_steps` it leaves a checkpoint,
        from which the same run goes on."""
        self.stopped = reason or "no reason was given"

    def train(self) -> TrainReport:
        """Train to the end, from the newest checkpoint if there is one. Streams are closed then,
        also where something is raised.

        Raises:
            NumericsError: the loss is not finite.
            CorruptError: cached bytes or the checkpoint are damaged.
            ConfigError: it has trained before.
        """
        if self._trained:
            do = "Make a new trainer: it goes on from the newest checkpoint."
            raise ConfigError(self.run, "a trainer that has not trained", "one that has", do)
        self._trained = True
        try:
            return self._train()
        finally:
            with ExitStack() as closing:  # all, also where one cannot be closed
                for one in (self._curves, self.stream, self.phases):
                    closing.callback(one.close)

    def _train(self) -> TrainReport:
        report = TrainReport()
        self._resume(report)
        self._curves.open(self.step)
        self._tell(lambda callback: callback.on_begin(self))
        start = time.perf_counter()
        with Progress(f"train {self.run}", self.total_steps, "steps") as progress:
            progress.advance(self.step)
            while self.step < self.total_steps and not self._stops():
                self._take_step(report)
                progress.advance()
        if self.config.save_steps and self.step != self._saved_step:
            self._save(report)
        self.stream.close()
        if self.step == self.total_steps:
            self.stopped = ""
        report.train_s = time.perf_counter() - start
        report.steps, report.student_step, report.stopped = self.step, self.step, self.stopped
        (feed,) = self.stream.feeds
        report.left_out, report.truncated = feed.selection.left_out, feed.selection.truncated
        self._tell(lambda callback: callback.on_end(self, report))
        self._write_record()
        if self._releases and not self.stopped:
            self.release()
        return report

    def release(self) -> None:
        """Let go of the snapshots that were replayed; `train` does it where it chose its own and is
        through. Where the student is published later, call it after that."""
        self.phases.release()

    def _take_step(self, report: TrainReport) -> None:
        start = time.perf_counter()
        place = self.phases.plan.at(self.step)
        batches = self.phases.next_batches(place)
        waited = time.perf_counter() - start
        found = backward(self.parallel, self._losses[place.phase], batches)
        norm = self.parallel.clip_gradients(self.config.max_grad_norm)
        if not math.isfinite(found.loss) or not math.isfinite(norm):
            got = f"loss {found.loss}, gradient norm {norm}"
            where = f"{self.run}, step {self.step}"
            raise NumericsError(where, "a finite loss and gradient", got, LOWER_RATE)
        factor = self.phases.phases[place.phase].rate_factor(self.config.learning_rate)
        if norm > 0:  # nothing was scored: momentum and weight decay stand still too
            with scaled_rate(self.optimizer, factor):
                self.optimizer.step()
        rate = float(self.schedule.get_last_lr()[0]) * factor
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = Tokens.of([one.micro for one in found.micro])
        self._finish_step(
            report,
            StepOutcome(
                step=self.step,
                epoch=batches[0].epoch,
                loss=found.loss,
                gradient_norm=norm,
                learning_rate=rate,
                num_positions=found.count.positions,
                rows=sum(len(batch.rows) for batch in batches),
                micro=found.micro,
                wait_s=waited,
                compute_s=time.perf_counter() - start - waited,
                tokens=tokens.rows,
                forward_tokens=tokens.forward,
                padded_tokens=tokens.padded,
                phase=place.phase,
                replayed=self.phases.data(place.phase) is self.phases.own,
            ),
        )

    def _finish_step(self, report: TrainReport, outcome: StepOutcome) -> None:
        report.add(outcome)
        self.log({"loss_nats": outcome.loss, "gradient_norm": outcome.gradient_norm})
        self.log({"epoch": outcome.epoch, "learning_rate": outcome.learning_rate})
        self._tell(lambda callback: callback.on_step(self, outcome))
        self._write_record()
        every = self.config.save_steps
        if every and self.step % every == 0:
            self._save(report)
        elif self.step % self.config.drift_every_steps == 0:
            self.phases.keep()

    def _write_record(self) -> None:
        self._curves.add(self._logged, self.step)
        self._logged = {}

    def _tell(self, what: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            what(callback)

    def _stops(self) -> bool:
        """Whether a callback of any rank has asked for it."""
        asked = torch.tensor(int(bool(self.stopped)), device=self.device)
        if int(self.parallel.sum(asked)):
            self.stopped = next(filter(None, from_every_rank(self.stopped)))
        return bool(self.stopped)

    def _save(self, report: TrainReport) -> None:
        states = {c.name: c.state_dict() for c in self.callbacks if c.name}
        progressed = Progressed(
            step=self.step,
            rows=report.rows,
            positions=report.positions,
            loss=report.last_loss,
            stream=self.stream.state_dict(),
            callbacks=states,
            student=self.files.fingerprint,
            settings=self._settings,
        )
        model, keep = self.student.model, self.config.save_total_limit
        save_checkpoint(self._checkpoints, progressed, model, self.optimizer, self.schedule, keep)
        self._saved_step = self.step
        self.phases.keep()
        self._tell(lambda callback: callback.on_save(self))

    def _resume(self, report: TrainReport) -> None:
        model = self.student.model
        found = load_checkpoint(self._checkpoints, model, self.optimizer, self.schedule)
        if found is None:
            return
        self.step = self._saved_step = found.step
        report.rows, report.positions = found.rows, found.positions
        report.last_loss = found.loss
        for callback in self.callbacks:
            if callback.name in found.callbacks:
                callback.load_state_dict(found.callbacks[callback.name])
        self.stream.load_state_dict(found.stream)
        self.print(f"  resumed from step {self.step} of {self._checkpoints}")


def _snapshot_of(resumed: Progressed | None) -> str | None:
    return None if resumed is None else snapshots_in(resumed.stream)[0]
