"""Refreshing in the middle of a training run, on one process: every so many steps the student of
that moment samples prompts, a teacher in memory scores them, and the stream goes on with those.

Nothing is published or started anew, and the optimiser's state lives on. The student of each such
moment takes a version of its own in `policies/`, with run, parent and step but without weights, and
its rollouts name it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillroom.cache.canary import CHECK_EVERY_S
from stillroom.cache.errors import ConfigError, CorruptError, MismatchError
from stillroom.cache.part import policy_of
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import Teacher
from stillroom.replay.load_sampler import load_sampler
from stillroom.replay.policies import Policy, policy_versions, read_policy, record_unkept
from stillroom.replay.prompts import Prompt
from stillroom.replay.refresh import RefreshConfig, refresh, retire_stale
from stillroom.replay.rollout import rollout
from stillroom.replay.sampler import SamplerConfig, StudentSampler
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.replay.vllm_sampler import VllmSampler
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.publish import save_student
from stillroom.train.run_snapshot import pin_name

if TYPE_CHECKING:
    from stillroom.train.report import TrainReport
    from stillroom.train.trainer import ReplayTrainer


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What one refresh did."""

    rollouts: int
    positions: int
    """Tokens that were sampled and scored."""
    sample_s: float
    """Seconds of sampling."""
    teacher_s: float
    """Seconds of the teacher."""
    retired: int
    """Parts that new snapshots leave out from now on."""


class Refresher:
    """Prompts, settings and a teacher in memory: what makes new rows of a student.

    Args:
        cache: where they go.
        teacher: the cache's, loaded.
        prompts: those sampled longest ago come first.
        sampler: how they are sampled.
        config: how many, and how long older rows stay in use.
    """

    def __init__(
        self,
        cache: Cache,
        teacher: Teacher,
        prompts: Sequence[Prompt],
        sampler: SamplerConfig,
        config: RefreshConfig,
    ) -> None:
        """Nothing is sampled yet."""
        self.cache, self.teacher, self.prompts = cache, teacher, prompts
        self.sampler, self.config = sampler, config
        self.positions = 0
        """Tokens that the teacher scored so far."""
        self._checked_at = -float("inf")

    @property
    def rows(self) -> int:
        """Rows of a refresh."""
        chosen = min(len(self.prompts), self.config.prompts_per_cycle)
        return chosen * self.sampler.samples_per_prompt

    def __call__(self, version: int, make_sampler: Callable[[], StudentSampler]) -> Refreshed:
        """Sample a policy, score what it wrote, and then retire what is too old.

        A rerun for the same policy does only what is left to do.

        Raises:
            StillroomError: as `rollout` and `score`; no row is retired then.
        """
        cycle = refresh(self.cache, self.prompts, self.sampler, self.config, version)
        sampled = rollout(self.cache, cycle, make_sampler)
        now = time.monotonic()
        is_due = now - self._checked_at >= CHECK_EVERY_S
        scored = score(self.cache, self.teacher, check_teacher=is_due)
        self._checked_at = now if is_due else self._checked_at
        self.positions += scored.positions
        retired = retire_stale(self.cache, version, self.config.max_lag)
        return Refreshed(
            rollouts=sampled.rollouts,
            positions=scored.positions,
            sample_s=sampled.sample_s,
            teacher_s=scored.teacher_s,
            retired=len(retired),
        )


class RefreshCallback(Callback):
    """Refreshes the cache that its trainer replays whenever the stream is about to look for newer
    rows: every `replay.follow_every_steps` batches, the last step excepted.

    The stream takes up the new rows with the next step. What is replayed then is that of the last
    `max_lag + 1` students. Needs a second copy of the student's buffers, but shares its weights; a
    LoRA's are merged into new ones. Where vLLM samples, the student's weights are written to a
    folder below the run's output at each refresh, read by the engine, and removed; a run that was
    killed meanwhile removes it when it starts again. A run that is resumed retires what its
    students after the checkpoint had sampled, and samples anew, so it goes on otherwise than it did
    before. What those students had retired stays so: with a checkpoint at least every
    `follow_every_steps` batches, that is the rows of one student at most. A run that starts again
    without a checkpoint retires all that its students had sampled, and samples first where nothing
    is left to replay. A run is known by its name and its output folder; one that was moved leaves
    alone what it sampled before. No other run refreshes the cache at the same time.

    Args:
        refresher: makes new rows; of the trainer's cache.
        sampler: of the student, with the refresher's settings; None loads one when it is needed.
    """

    name = "refresh"

    def __init__(self, refresher: Refresher, *, sampler: StudentSampler | None = None) -> None:
        """Nothing is loaded yet."""
        self._refresher = refresher
        self._version: int | None = None
        self._sampler = sampler

    def on_open(self, trainer: "ReplayTrainer") -> None:
        """Check that this trainer can be refreshed, and leave what a run that starts again had
        sampled, so that no snapshot of it is taken.

        Raises:
            ConfigError: several processes, or phases; a stream that does not follow its cache by
                whole optimiser steps; or fewer new rows than a batch has.
            MismatchError: another cache, or a student that is none of its policies.
        """
        _check(trainer, self._refresher)
        shutil.rmtree(_weights_folder(trainer), ignore_errors=True)
        if trainer.resumed is not None:
            return
        _retire_from(trainer, 0)
        if not trainer.cache.commits().keys() - trainer.cache.retired():
            policy = _record(trainer)
            self._refresher(policy.version, lambda: self._sampler_of(trainer))
            self._version = trainer.policy_version = policy.version

    def on_begin(self, trainer: "ReplayTrainer") -> None:
        """Leave what was sampled after the checkpoint; a refresh of this very step is done anew."""
        due = _is_due(trainer)
        start = trainer.step if due else trainer.step + 1
        if self._version is not None:
            policy = read_policy(trainer.cache.storage, self._version)
            trainer.policy_version = policy.version
            if policy.step >= start and policy.parent is not None:
                trainer.policy_version = policy.parent
        _retire_from(trainer, start)
        if due:
            self._refresh(trainer)

    def on_step(self, trainer: "ReplayTrainer", outcome: StepOutcome) -> None:
        """Refresh, if it is time."""
        if _is_due(trainer):
            self._refresh(trainer)

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Let go of the sampler."""
        self._sampler = None

    def state_dict(self) -> dict[str, Any]:
        """The newest student's version."""
        return {"version": self._version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that student.

        Raises:
            CorruptError: the state names none.
        """
        version = state.get("version", -1)
        if version is not None and not (type(version) is int and version >= 0):
            do = "Delete the checkpoint to resume from an older one."
            where = "the refresh in a checkpoint"
            raise CorruptError(where, "a policy version", f"{state!r:.60}", do)
        self._version = version

    def _refresh(self, trainer: "ReplayTrainer") -> None:
        policy = _record(trainer)
        done = self._refresher(policy.version, lambda: self._sampler_now(trainer))
        self._version = trainer.policy_version = policy.version
        trainer.log({f"refresh/{name}": value for name, value in asdict(done).items()})

    def _sampler_of(self, trainer: "ReplayTrainer") -> StudentSampler:
        if self._sampler is None:
            self._sampler = load_sampler(trainer.files, self._refresher.sampler)
        return self._sampler

    def _sampler_now(self, trainer: "ReplayTrainer") -> StudentSampler:
        sampler = self._sampler_of(trainer)
        if isinstance(sampler, TransformersSampler):
            sampler.take_weights(plain_weights(trainer))
        elif isinstance(sampler, VllmSampler):
            folder = _weights_folder(trainer)
            try:
                sampler.take_weights(save_student(trainer, folder / "student"))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return sampler


def _weights_folder(trainer: "ReplayTrainer") -> Path:
    """Where vLLM reads a run's student from; a run that was killed meanwhile leaves it behind."""
    return trainer.output / f".sampled-{trainer.run}"


def plain_weights(trainer: "ReplayTrainer") -> dict[str, torch.Tensor]:
    """The weights that a trainer on one process has now, by Hugging Face names: its own tensors,
    and new ones where a LoRA is merged."""
    model = trainer.student.model
    state = model.state_dict()
    if trainer.config.lora is None:
        return state
    from stillroom.train.lora import merged_state

    return merged_state(model, state)


def _check(trainer: "ReplayTrainer", refresher: Refresher) -> None:
    replay, accumulated = trainer.config.replay, trainer.config.gradient_accumulation_steps
    if trainer.world != 1:
        do = "Run 'stillroom refresh' and 'stillroom score' as jobs beside the training."
        raise ConfigError("processes that train", "one, to refresh", f"{trainer.world}", do)
    every = replay.follow_every_steps
    if every < 1 or every % accumulated:
        expected = f"batches between refreshes, a multiple of {accumulated} (an optimiser step)"
        raise ConfigError("replay.follow_every_steps", expected, f"{every}", "Set it.")
    if trainer.config.phases:
        expected, got = "one phase, on the run's cache", f"{len(trainer.config.phases)} phases"
        raise ConfigError("train.phases", expected, got, "Refresh a run without phases.")
    if refresher.rows < replay.batch_rows:
        expected = f"at least replay.batch_rows, {replay.batch_rows} rows a refresh"
        raise ConfigError("refresh.prompts_per_cycle", expected, f"{refresher.rows}", "Raise it.")
    if refresher.cache.storage.root != trainer.cache.storage.root:
        roots = (trainer.cache.storage.root, refresher.cache.storage.root)
        do = "Refresh the cache that is replayed."
        raise MismatchError("the refresher's cache", f"{roots[0]}", f"{roots[1]}", do)
    if trainer.policy_version < 0:
        do = "Name the initial student when the cache is made: 'stillroom init --student'."
        raise MismatchError(str(trainer.files.folder), "a policy of the cache", "none of them", do)


def _is_due(trainer: "ReplayTrainer") -> bool:
    """Whether the stream looks for newer rows before the next step."""
    batches = trainer.step * trainer.config.gradient_accumulation_steps
    follows = batches % trainer.config.replay.follow_every_steps == 0
    return follows and 0 < trainer.step < trainer.total_steps


def _record(trainer: "ReplayTrainer") -> Policy:
    """Give the student of this moment a version."""
    run, parent = pin_name(trainer.output, trainer.run), trainer.policy_version
    return record_unkept(trainer.cache.storage, run=run, parent=parent, step=trainer.step)


def _retire_from(trainer: "ReplayTrainer", step: int) -> None:
    """Retire what students of this run sampled after so many steps or more, before it was ended."""
    cache, run = trainer.cache, pin_name(trainer.output, trainer.run)
    policies = [read_policy(cache.storage, version) for version in policy_versions(cache.storage)]
    own = (p for p in policies if p.path is None and p.run == run and p.step >= step)
    later = {policy.version for policy in own}
    for part in cache.parts() if later else ():
        if policy_of(part) in later:
            cache.retire(part, f"{trainer.run} was resumed from step {trainer.step}")
