"""Phases: a run as a list of stretches of steps, each with its own data, objective and learning
rate; and the plan that says which one a step is in. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillroom.cache.errors import ConfigError
from stillroom.train.objective import Objective
from stillroom.train.settings import check_setting, convert_fields
from stillroom.train.supervised_data import SupervisedConfig

DATASET = "dataset"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Steps on one kind of data: the run's cache, another cache, or a dataset."""

    supervised: SupervisedConfig | None = None
    """A dataset to fine-tune on; None replays a cache."""
    root: str | None = None
    """The cache that is replayed, of any teacher with the student's tokenizer: a folder or an
    address; None for the run's own. Its rows come as the run's replay settings say."""
    num_train_epochs: float = 1.0
    """Passes over the data, each time that the phase comes; > 0. The number of steps is rounded
    up."""
    max_steps: int = -1
    """Optimiser steps, in place of num_train_epochs; >= 1, and -1 leaves it to the epochs."""
    objective: Objective | None = None
    """What is minimised; None takes the run's objective for replay, and cross-entropy for a
    dataset, which nothing else is defined on."""
    learning_rate: float | None = None
    """Peak learning rate, in place of the run's, whose schedule goes on over all phases; > 0."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        convert_fields(self, "phase")
        expected = "nothing beside supervised: a phase has one kind of data"
        check_setting("phase.root", self.root is None or self.supervised is None, expected, self)
        for name in ("num_train_epochs", "learning_rate"):
            value = getattr(self, name)
            valid = value is None or (value > 0 and math.isfinite(value))
            check_setting(f"phase.{name}", valid, "a finite number above 0", value)
        steps = self.max_steps
        check_setting("phase.max_steps", steps >= 1 or steps == -1, "at least 1, or -1", steps)
        objective = self.objective
        if self.supervised is not None and objective is not None:
            share, sources = objective.cross_entropy, objective.cross_entropy_sources
            expected = "1: no teacher has scored a dataset"
            check_setting("phase.objective.cross_entropy", share == 1, expected, share)
            where, expected = "phase.objective.cross_entropy_sources", f"{DATASET!r} among them"
            check_setting(where, DATASET in sources, expected, sources)

    def objective_of(self, run: Objective) -> Objective:
        """What is minimised in this phase of a run with that objective."""
        if self.objective is not None:
            return self.objective
        return run if self.supervised is None else Objective(cross_entropy=1.0)

    def rate_factor(self, run: float) -> float:
        """What the learning rate of a run with that peak is multiplied by in this phase."""
        return 1.0 if self.learning_rate is None else self.learning_rate / run

    def batches(self, per_epoch: int, per_step: int) -> int:
        """Batches each time that it comes.

        Args:
            per_epoch: batches of an epoch of its data.
            per_step: batches that are accumulated in an optimiser step.
        """
        if self.max_steps > 0:
            return self.max_steps * per_step
        return max(1, math.ceil(self.num_train_epochs * per_epoch))


@dataclass(frozen=True, slots=True)
class PhaseStep:
    """Where an optimiser step of a run is."""

    cycle: int
    """Times that the whole list was gone through before."""
    phase: int
    """Index in the list."""
    step: int
    """Steps of this phase before it, in this cycle."""
    batches: int
    """That are accumulated in it; fewer at a phase's end, where no more are left."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """Which phase each optimiser step of a run is in. Pure."""

    batches: tuple[int, ...]
    """Of each phase, each time that it comes; >= 1."""
    per_step: int = 1
    """Batches of a step; >= 1."""
    cycles: int = 1
    """Times that the list is gone through; >= 1."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.batches or min(*self.batches, self.per_step, self.cycles) < 1:
            got = f"{list(self.batches)}, {self.per_step} and {self.cycles}"
            expected = "at least 1 batch in each phase and step, and 1 cycle"
            raise ConfigError("phases", expected, got, "Change the settings.")

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of each phase, each time that it comes."""
        return tuple(-(-batches // self.per_step) for batches in self.batches)

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return sum(self.steps) * self.cycles

    def at(self, step: int) -> PhaseStep:
        """The phase of a step, 0 to total_steps - 1.

        Raises:
            ConfigError: the run has no such step.
        """
        if not 0 <= step < self.total_steps:
            do = "Raise train.phase_cycles, or the phases' steps."
            raise ConfigError("step", f"0 to {self.total_steps - 1}", f"{step}", do)
        cycle, within = divmod(step, sum(self.steps))
        phase = 0
        while within >= self.steps[phase]:
            within -= self.steps[phase]
            phase += 1
        left = self.batches[phase] - within * self.per_step
        return PhaseStep(cycle, phase, within, min(self.per_step, left))


def sources_of(phases: Sequence[Phase]) -> list[int]:
    """For each phase the index of the first one on the same data: they share its stream."""
    keys = [(phase.supervised, phase.root) for phase in phases]
    return [keys.index(key) for key in keys]
