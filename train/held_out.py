"""Held-out measurement while training: every so many steps, with early stopping, and the best
student kept."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, MismatchError, NumericsError
from stillroom.cache.pins import pin, renew_pin
from stillroom.cache.snapshot import Snapshot, snapshot_path
from stillroom.cache.store import Cache
from stillroom.train.best import best_of, keep_only, load_best, save_best
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.checkpoint import (
    LOWER_RATE,
    checkpoints_of,
    kept_checkpoints,
    read_progress,
)
from stillroom.train.evaluate import Evaluation, as_json, evaluate, measured_rows
from stillroom.train.fits import place_of
from stillroom.train.ranks import from_first_rank
from stillroom.train.run_snapshot import pin_name

if TYPE_CHECKING:
    from stillroom.train.report import TrainReport
    from stillroom.train.trainer import ReplayTrainer

NAME = "held_out"


@dataclass(slots=True)
class HeldOutState:
    """What a checkpoint keeps of the measurements."""

    snapshot: str = ""
    """What is measured on; the same for the whole run."""
    step: int = -1
    """Of the last measurement; -1 before the first."""
    measured: dict[str, Any] | None = None
    """The last measurement, plain."""
    best_step: int = -1
    best_reverse_kl_nats: float = 0.0
    worse: int = 0
    """Measurements since the best one."""


class HeldOutCallback(Callback):
    """Measures the student on another cache every `eval_steps` and at the end.

    The lowest mean reverse KL over all positions is the best. Its student is kept, and is put into
    the trainer's model at the end where `load_best_model_at_end` says so. The held-out snapshot is
    chosen at the first step and pinned; the pin is renewed with every measurement, checkpoint and
    record of drift, and lapses a week after the last.

    Args:
        cache: the cache that is trained on.
        root: the held-out one.

    Raises:
        ConfigError: both are one.
        MismatchError: it holds scores of another teacher, or other scores.
    """

    name = NAME

    def __init__(self, cache: Cache, root: str) -> None:
        """Open the held-out cache; what is measured is chosen when training begins."""
        self._cache = Cache.open(root)
        if place_of(root) == place_of(cache.storage.root):
            do = "Keep held-out rollouts in a cache of their own."
            raise ConfigError("train.eval_root", "another cache than is trained on", root, do)
        cache.identity.check_same(self._cache.identity, f"train.eval_root, {root}")
        self._state = HeldOutState()
        self._snapshot: Snapshot | None = None

    def on_begin(self, trainer: "ReplayTrainer") -> None:
        """Pin and open what is measured, on a resumed run what it was; forget best students of
        steps that are yet to come.

        Raises:
            InputError: no row of it can be measured, or one is too long and is not to be skipped or
                truncated.
            MismatchError: a resumed run measured on another cache.
        """
        self._state.snapshot = from_first_rank(lambda: self._choose(trainer))
        self._snapshot = self._cache.open_snapshot(self._state.snapshot)
        measured_rows(self._cache, self._snapshot, trainer.config.replay)
        self._forget(trainer)
        self._stop_if_done(trainer)

    def on_step(self, trainer: "ReplayTrainer", outcome: StepOutcome) -> None:
        """Measure when it is time; may stop the training. Renew the pin when the run's own is."""
        if outcome.step % trainer.config.drift_every_steps == 0:
            self._keep(trainer)
        every = trainer.config.eval_steps
        if not every or outcome.step % every:
            return
        self._measure(trainer)
        self._stop_if_done(trainer)

    def on_save(self, trainer: "ReplayTrainer") -> None:
        """Let go of best students that no checkpoint knows any more, and renew the pin."""
        self._forget(trainer)
        self._keep(trainer)

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Measure the last student, and go back to the best one if that is wanted."""
        state = self._state
        if state.step != trainer.step:
            self._measure(trainer)
        report.held_out = asdict(state)
        if trainer.config.load_best_model_at_end and state.best_step not in (-1, trainer.step):
            load_best(_best(trainer), state.best_step, trainer.student.model)
            report.student_step = state.best_step

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, plain."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it.

        Raises:
            CorruptError: it is not such a state.
        """
        self._state = jsonfile.build(HeldOutState, state, "held-out state in a checkpoint")

    def _choose(self, trainer: "ReplayTrainer") -> str:
        earlier = self._state.snapshot
        if earlier and not self._cache.storage.exists(snapshot_path(earlier)):
            expected = f"the cache that the checkpoint measured on, with snapshot {earlier}"
            do = "Give that one, or choose another run name or output."
            raise MismatchError("train.eval_root", expected, self._cache.storage.root, do)
        chosen = earlier or self._cache.snapshot().id
        pin(self._cache.storage, pin_name(trainer.output, trainer.run), {chosen})
        return chosen

    def _stop_if_done(self, trainer: "ReplayTrainer") -> None:
        """Stop after a measurement that ends the training; a resumed run may stand after one."""
        state, config = self._state, trainer.config
        goal, patience = config.stop_reverse_kl, config.early_stopping_patience
        best = f"{state.best_reverse_kl_nats:.4g} nats at step {state.best_step}"
        if goal is not None and state.best_step >= 0 and state.best_reverse_kl_nats <= goal:
            trainer.stop(f"held-out reverse KL {best}, at most {goal:g}")
        elif patience is not None and state.worse >= patience:
            trainer.stop(
                f"{state.worse} measurements without a lower held-out reverse KL than {best}"
            )

    def _measure(self, trainer: "ReplayTrainer") -> None:
        assert self._snapshot is not None
        state = self._state
        self._keep(trainer)
        found = evaluate(
            trainer.student,
            self._cache,
            self._snapshot,
            trainer.config.replay,
            parallel=trainer.parallel,
            max_bytes=trainer.config.loss_bytes,
        )
        reverse, figures = found.reverse_kl_nats, _figures(found)
        for name, value in figures.items():
            if not math.isfinite(value):
                where = f"{trainer.run}, step {trainer.step}, {name}"
                raise NumericsError(where, "a finite measurement", f"{value}", LOWER_RATE)
        trainer.log(figures)
        state.step, state.measured = trainer.step, as_json(found)
        if state.best_step < 0 or reverse < state.best_reverse_kl_nats:
            state.best_step, state.best_reverse_kl_nats, state.worse = trainer.step, reverse, 0
            save_best(_best(trainer), trainer.step, trainer.student.model)
            self._forget(trainer)
        else:
            state.worse += 1

    def _keep(self, trainer: "ReplayTrainer") -> None:
        if trainer.is_main:
            name = pin_name(trainer.output, trainer.run)
            renew_pin(self._cache.storage, name, {self._state.snapshot})

    def _forget(self, trainer: "ReplayTrainer") -> None:
        def forget() -> None:
            named = _known_to_checkpoints(trainer.output, trainer.run)
            keep_only(_best(trainer), {self._state.best_step, *named})

        from_first_rank(forget)


def _best(trainer: "ReplayTrainer") -> Path:
    return best_of(trainer.output, trainer.run)


def _known_to_checkpoints(output: Path, run: str) -> Iterator[int]:
    """Best steps that the run's checkpoints name; a damaged one is no longer resumed from."""
    for folder in kept_checkpoints(checkpoints_of(output, run)):
        with suppress(CorruptError):
            state = read_progress(folder).callbacks.get(NAME, {})
            yield state.get("best_step", -1)


def _figures(found: Evaluation) -> dict[str, float]:
    """What trackers get: `held_out/<measure>`, and the same by source."""
    figures = {f"{NAME}/reverse_kl_nats": found.reverse_kl_nats}
    for source, means in found.sources.items():
        for measure, value in asdict(means).items():
            figures[f"{NAME}/{measure}/{source}"] = float(value)
    return figures
