"""The training loop: replayed batches in, a trained student out. No teacher anywhere.

The loss of a step is the sum over its scored tokens, divided by their number in the whole global
batch, which every rank knows before the first backward. So it depends neither on how rows fall into
micro-batches nor on the number of ranks.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import get_scheduler

from stillroom.cache.errors import ConfigError, MismatchError, NumericsError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.progress import Progress
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch, idle_micro_batch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.follow import Agree, agree_among
from stillroom.replay.pinned import empty_for
from stillroom.replay.policies import check_student
from stillroom.replay.stream import ReplayStream
from stillroom.train.checkpoint import (
    Progressed,
    checkpoints_of,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from stillroom.train.config import RUN_NAME, ReplayConfig
from stillroom.train.drift import DriftMeter, put_drift
from stillroom.train.objectives import divergence, sampled_logprob, token_mean
from stillroom.train.parallel import on_cpu
from stillroom.train.run_snapshot import keep_snapshot
from stillroom.train.student import load_student, to_target


@dataclass(slots=True)
class TrainReport:
    """What a training run did."""

    steps: int = 0
    rows: int = 0
    """Rows replayed by this process's job, all ranks, repeats counted."""
    positions: int = 0
    """Scored tokens replayed, repeats counted."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step, nats a position."""
    drift: dict[str, Any] = field(default_factory=dict)
    """Drift since the record before the last, by policy version."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of the snapshot (the last, of several) that are not replayed, by the first reason."""
    truncated: int = 0
    """Rows of it that lost their last tokens."""
    train_s: float = 0.0
    """Seconds in the loop."""


class ReplayTrainer:
    """Trains one student on one snapshot.

    Args:
        files: the student's inspected folder.
        policy_version: which policy it is.
        cache: the cache.
        snapshot: which shards are replayed.
        config: how.
        output: folder for checkpoints and TensorBoard logs.
        run: the run's name.
    """

    def __init__(
        self,
        files: ModelFiles,
        policy_version: int,
        cache: Cache,
        snapshot: Snapshot,
        config: ReplayConfig,
        output: Path,
        run: str,
    ) -> None:
        """Load the student and set up optimiser, schedule and stream."""
        if not RUN_NAME.fullmatch(run):
            do = "Choose another name."
            raise ConfigError("run", "letters, digits, dots, dashes and underscores", repr(run), do)
        self._cache, self._config, self._run, self._output = cache, config, run, output
        set_seed(config.seed)
        self._accelerator = Accelerator(
            cpu=on_cpu(config.device),
            mixed_precision="bf16" if config.bf16 else "no",
            log_with="tensorboard",
            project_dir=str(output / "tensorboard"),
        )
        self._check_ranks_agree(files, snapshot)
        identity = cache.identity
        check_student(
            files, identity.tokenizer_fingerprint, identity.vocab_size, identity.teacher.name
        )
        self.student = load_student(files, "float32", self._accelerator.device).train()
        self.stream = ReplayStream(
            Source(cache, snapshot),
            self._replay_config(),
            rank=self._accelerator.process_index,
            world=self._accelerator.num_processes,
            one_row=not self.student.packs,
            vocab_size=files.vocab_size,
            empty=empty_for(self._accelerator.device),
            agree=self._agree() if config.replay.follow_every_steps else None,
        )
        (feed,) = self.stream.feeds
        if feed.selection.missing:
            self._accelerator.print(f"  {feed.selection.missing}")
        if self.stream.open_bytes > config.replay.cached_bytes:
            self._accelerator.print(
                "  blocks are decoded several times an epoch: "
                f"{self.stream.open_bytes >> 20} MiB of them are in use at once, and "
                f"replay.cached_bytes is {config.replay.cached_bytes >> 20} MiB; raise it, or "
                "lower replay.window_rows and replay.block_rows"
            )
        self.total_steps = max(1, math.ceil(config.num_train_epochs * self.stream.steps_per_epoch))
        self._optimizer = _optimizer(self.student, config)
        self._schedule = _schedule(self._optimizer, config, self.total_steps)
        self._wrapped = self._accelerator.prepare_model(self.student)
        self._drift = DriftMeter(policy_version)
        self._checkpoints = checkpoints_of(output, run)
        self.step = 0

    @property
    def is_main(self) -> bool:
        """Whether this process publishes and writes records for all ranks."""
        return bool(self._accelerator.is_main_process)

    def train(self) -> TrainReport:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            NumericsError: the loss is not finite.
            CorruptError: cached bytes or the checkpoint are damaged.
        """
        report = TrainReport()
        self._resume(report)
        self._accelerator.init_trackers(self._run)
        start = time.perf_counter()
        with Progress(f"train {self._run}", self.total_steps, "steps") as progress:
            progress.advance(self.step)
            while self.step < self.total_steps:
                self._take_step(self.stream.next_batch(), report)
                progress.advance()
        self.stream.close()
        report.train_s = time.perf_counter() - start
        report.steps = self.step
        (feed,) = self.stream.feeds
        report.left_out, report.truncated = feed.selection.left_out, feed.selection.truncated
        # end_training() would take the process group down too, which is not ours to end.
        for tracker in self._accelerator.trackers:
            tracker.finish()
        return report

    def _check_ranks_agree(self, files: ModelFiles, snapshot: Snapshot) -> None:
        mine = (files.fingerprint, snapshot.id)
        for rank, theirs in enumerate(gather_object([mine])):
            if theirs != mine:
                do = "Pin one snapshot, and give it to every rank."
                where = f"{self._run}, rank {rank}"
                raise MismatchError(where, f"student and snapshot {mine}", f"{theirs}", do)

    def _replay_config(self) -> StreamConfig:
        """The settings of replay, with prompts shared where that is wanted and possible."""
        student, config = self.student, self._config.replay
        if not student.packs:
            self._accelerator.print(f"  one row a micro-batch: {student.why_one_row}")
        share = config.share_prompts
        if share is None:
            share = config.group_rows > 1 and self._accelerator.device.type == "cpu"
        if share and not student.shares:
            self._accelerator.print(f"  prompts are not shared: {student.why_unshared}")
        return replace(config, share_prompts=share and student.shares)

    def _take_step(self, batch: Batch, report: TrainReport) -> None:
        loss = self._backward(batch)
        norm = self._accelerator.clip_grad_norm_(
            self.student.parameters(), self._config.max_grad_norm
        )
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            got = f"loss {loss}, gradient norm {float(norm)}"
            do = "Lower the learning rate; the weights before this step are unharmed."
            raise NumericsError(
                f"{self._run}, step {self.step}", "a finite loss and gradient", got, do
            )
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.step += 1
        report.rows += len(batch.rows)
        report.positions += batch.num_positions
        report.losses.append(loss)
        self._record(
            report, {"loss_nats": loss, "gradient_norm": float(norm), "epoch": batch.epoch}
        )

    def _backward(self, batch: Batch) -> float:
        """Accumulate the gradient of the step's mean loss; returns that loss over all ranks."""
        total = torch.zeros((), device=self._accelerator.device)
        last = len(batch.micro_batches) - 1
        for i, micro in enumerate(batch.micro_batches):
            if i < last:
                with self._accelerator.no_sync(self._wrapped):
                    total += self._backward_micro(micro, batch.num_positions)
            else:
                total += self._backward_micro(micro, batch.num_positions)
        return float(self._accelerator.reduce(total, "sum"))

    def _backward_micro(self, micro: MicroBatch | None, num_positions: int) -> torch.Tensor:
        """Gradients are averaged over ranks, so each loss is multiplied by their number."""
        loss = self._idle_loss() if micro is None else self._loss(micro, num_positions)
        self._accelerator.backward(loss * self._accelerator.num_processes)
        return loss.detach()

    def _loss(self, micro: MicroBatch, num_positions: int) -> torch.Tensor:
        with self._accelerator.autocast():
            logits = self._wrapped(micro)
        identity = self._cache.identity
        target = to_target(micro, logits.device)
        loss = divergence(
            logits,
            target,
            self._config.kind,
            self._config.param,
            temperature=identity.temperature,
            vocab_size=identity.vocab_size,
        )
        self._drift.add(*_behaviour(logits.detach(), micro, identity.vocab_size))
        return token_mean(loss, target.mask, num_positions)

    def _idle_loss(self) -> torch.Tensor:
        """Zero, through the wrapped forward, so that this rank meets the others' all-reduce."""
        loss: torch.Tensor = self._wrapped(idle_micro_batch()).sum() * 0.0
        return loss

    def _record(self, report: TrainReport, values: Mapping[str, float]) -> None:
        due = self.step % self._config.drift_every_steps == 0 or self.step == self.total_steps
        if due:
            self._drift.merge(gather_object([self._drift.by_policy]))
            report.drift = self._drift.take()
            if self.is_main:
                put_drift(self._cache.storage, self._run, self.step, report.drift)
                self._keep_snapshots()
        self._accelerator.log(
            {**values, "learning_rate": self._schedule.get_last_lr()[0]}, step=self.step
        )
        every = self._config.save_steps
        if every and self.step % every == 0 and self.step < self.total_steps:
            self._save(report)

    def _save(self, report: TrainReport) -> None:
        sums = gather_object([self._drift.by_policy])
        self._drift.merge(sums if self.is_main else [])
        if self.is_main:
            progressed = Progressed(
                step=self.step,
                rows=report.rows,
                positions=report.positions,
                stream=self.stream.state_dict(),
                drift=self._drift.state(),
            )
            keep = self._config.save_total_limit
            save_checkpoint(
                self._checkpoints, progressed, self.student, self._optimizer, self._schedule, keep
            )
            self._keep_snapshots()
        self._accelerator.wait_for_everyone()

    def _agree(self) -> Agree:
        """How ranks take up newer snapshots: rank 0 pins what it chose before any rank opens it."""
        among = agree_among(self._accelerator.num_processes)
        return lambda choose: among(partial(self._pinned, choose))

    def _pinned(self, choose: Callable[[], list[str]]) -> list[str]:
        chosen = choose()
        self._keep_snapshots(*chosen)
        return chosen

    def _keep_snapshots(self, *more: str) -> None:
        snapshots = (*self.stream.snapshots, *more)
        keep_snapshot(self._cache.storage, self._output, self._run, *snapshots)

    def _resume(self, report: TrainReport) -> None:
        folder = newest_checkpoint(self._checkpoints)
        if folder is not None:
            progressed = load_checkpoint(folder, self.student, self._optimizer, self._schedule)
            self.step = progressed.step
            report.rows, report.positions = progressed.rows, progressed.positions
            self._drift.restore(progressed.drift if self.is_main else {})
            self.stream.load_state_dict(progressed.stream)
            self._accelerator.print(f"  resumed from {folder}")


def _behaviour(
    logits: torch.Tensor, micro: MicroBatch, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The student's and the behaviour policy's logprobs of the sampled tokens, at the sampling
    temperature; where that is unknown, so is the behaviour policy's logprob."""
    unknown = np.isnan(micro.sampling_temperature)
    temperature = np.where(unknown, np.float32(1), micro.sampling_temperature)
    scaled = logits.float() / torch.from_numpy(temperature).to(logits.device)[:, None]
    sampled = torch.from_numpy(micro.sampled_id).to(logits.device)
    student = sampled_logprob(scaled, sampled, vocab_size=vocab_size)
    behaviour = np.where(unknown, np.float32(np.nan), micro.behaviour_logprob)
    return student.cpu().numpy(), behaviour, micro.policy_version


def check_trainable(config: ReplayConfig) -> None:
    """Refuse settings that no optimiser or schedule can be made of.

    Raises:
        ConfigError: names the setting.
    """
    parameter = torch.nn.Linear(1, 1)
    _schedule(_optimizer(parameter, config), config, total_steps=1)


def _optimizer(model: torch.nn.Module, config: ReplayConfig) -> torch.optim.Optimizer:
    cls: Any = getattr(torch.optim, config.optimizer, None)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    do = "Name one such as AdamW, Adam or SGD."
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        where, got = "train.optimizer", repr(config.optimizer)
        raise ConfigError(where, "a class in torch.optim", got, do)
    try:
        return cls(model.parameters(), **settings)
    except (TypeError, ValueError) as error:
        expected = f"an optimiser that takes {', '.join(settings)}"
        raise ConfigError("train.optimizer", expected, str(error), do) from error


def _schedule(
    optimizer: torch.optim.Optimizer, config: ReplayConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    try:
        made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            config.lr_scheduler_type, optimizer, config.warmup_steps, total_steps
        )
    except (TypeError, ValueError) as error:
        do = "Name one such as constant_with_warmup, linear or cosine."
        expected, got = "a schedule of transformers", f"{config.lr_scheduler_type!r}: {error}"
        raise ConfigError("train.lr_scheduler_type", expected, got, do) from error
    return made
