"""A replay cell of the quality study: rollouts of the student, scored once, replayed, and refreshed
every so many updates, all in one process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec, Teacher, identity_of
from stillroom.replay.config import StreamConfig
from stillroom.replay.policies import register_initial
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.tools.bench_quality_cells import GROUPED, SHUFFLED, Cell, Study
from stillroom.tools.bench_quality_clock import Clock
from stillroom.tools.bench_quality_held_out import Models, sampler_config
from stillroom.tools.bench_quality_losses import ShuffledLoss, TruncatedReverseLoss
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.refreshing import RefreshCallback, Refresher, plain_weights
from stillroom.train.report import TrainReport
from stillroom.train.trainer import ReplayTrainer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse_kl_rb"},
    "jsd": {"kind": "jsd", "beta": 0.5},
    "reverse_tail": {"kind": "reverse"},
    "reverse_truncated": {"kind": "reverse"},
}
MAX_LAG = 0
"""Only the newest student's rollouts are replayed."""

Measure = Callable[[int, int, Any], None]
"""Called with updates, positions that the teacher scored so far, and the weights."""


def replay_cell(
    study: Study,
    cell: Cell,
    models: Models,
    folder: Path,
    clock: Clock,
    measure: Measure,
) -> None:
    """Train the cell's student.

    Args:
        study: the settings.
        cell: of replay, or a control of it.
        models: the study's.
        folder: empty; gets the cache and the run's output.
        clock: goes while the student is sampled, scored and trained.
        measure: called after every `study.eval_every` updates, with the clock stopped.
    """
    refresher = _refresher(study, cell, models, models.load_teacher(), folder / "cache")
    sampler = TransformersSampler(models.student, refresher.sampler)
    with clock.running():
        refresher(0, lambda: sampler)
    trainer = _trainer_of(cell)(
        models.student,
        refresher.cache,
        train_config(study, cell),
        output=folder / "output",
        run="cell",
        callbacks=(
            _Timed(study, clock, refresher, measure),
            RefreshCallback(refresher, sampler=sampler),
        ),
    )
    trainer.train()


def train_config(study: Study, cell: Cell) -> ReplayConfig:
    """How a replay cell is trained."""
    replay = StreamConfig(
        batch_rows=study.batch_rows,
        max_tokens=study.batch_rows * (study.max_prompt_tokens + study.max_new_tokens),
        block_rows=4,
        window_rows=8,
        group_rows=_samples_per_prompt(study, cell),
        follow_every_steps=cell.interval,
        threads=study.threads,
        seed=cell.seed,
    )
    return ReplayConfig(
        **OBJECTIVES[cell.objective],
        max_steps=study.updates,
        learning_rate=study.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        device="cpu",
        seed=cell.seed,
        replay=replay,
    )


def _refresher(study: Study, cell: Cell, models: Models, teacher: Teacher, root: Path) -> Refresher:
    spec = ScoreSpec(topk=study.topk)
    cache = Cache.create(root, identity_of(models.teacher, models.teacher_config, spec))
    register_initial(cache.storage, models.student, "study")
    prompts = models.training_prompts(study, cell.seed)
    rows, samples = study.rows_of(cell.interval), _samples_per_prompt(study, cell)
    config = RefreshConfig(
        prompts_per_cycle=rows // samples, unit_rollouts=rows, max_lag=MAX_LAG, seed=cell.seed
    )
    sampler = replace(sampler_config(study), samples_per_prompt=samples)
    return Refresher(cache, teacher, prompts, sampler, config)


def _samples_per_prompt(study: Study, cell: Cell) -> int:
    return study.batch_rows if cell.method == GROUPED else 1


class _ShuffledTrainer(ReplayTrainer):
    loss_class = ShuffledLoss


class _TruncatedTrainer(ReplayTrainer):
    loss_class = TruncatedReverseLoss


def _trainer_of(cell: Cell) -> type[ReplayTrainer]:
    if cell.method == SHUFFLED:
        return _ShuffledTrainer
    return _TruncatedTrainer if cell.objective == "reverse_truncated" else ReplayTrainer


class _Timed(Callback):
    """Runs the clock between steps, and measures; comes before the refresh of the same step."""

    def __init__(self, study: Study, clock: Clock, refresher: Refresher, measure: Measure) -> None:
        self._every, self._clock = study.eval_every, clock
        self._refresher, self._measure = refresher, measure

    def on_begin(self, trainer: ReplayTrainer) -> None:
        self._clock.start()

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        if outcome.step % self._every == 0:
            with self._clock.paused():
                self._measure(outcome.step, self._refresher.positions, plain_weights(trainer))

    def on_end(self, trainer: ReplayTrainer, report: TrainReport) -> None:
        self._clock.stop()
