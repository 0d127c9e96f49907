"""What the trainer tells after each step, and the class of those who listen: a callback.

Shapes: P scored positions of a micro-batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.replay.batch import MicroBatch

if TYPE_CHECKING:
    from stillroom.train.report import TrainReport
    from stillroom.train.trainer import ReplayTrainer


@dataclass(frozen=True, slots=True)
class MicroOutcome:
    """What a micro-batch gave, without gradient."""

    micro: MicroBatch
    """The batch itself, with all that is stored about its positions."""
    loss: np.ndarray
    """(P,) float32 nats: the objective's value at each position."""
    cross_entropy: np.ndarray
    """(P,) float32 nats: -log of the student's probability of the sampled token."""
    student_logprob: np.ndarray
    """(P,) float32 nats: the student's logprob of the sampled token at the sampling temperature,
    or, where that is unknown, at the cache's."""
    student_tail_logprob: np.ndarray
    """(P,) float32 nats: the student's mass outside the cached tokens, at the cache's
    temperature."""

    @property
    def behaviour_logprob(self) -> np.ndarray:
        """(P,) float32 nats; NaN where it, or the temperature that it is at, is unknown."""
        unknown = np.isnan(self.micro.sampling_temperature)
        return np.where(unknown, np.float32(np.nan), self.micro.behaviour_logprob)

    @property
    def policy_version(self) -> np.ndarray:
        """(P,) int64: the oldest policy that sampled the row; -1 if unknown."""
        return self.micro.policy_version

    @property
    def in_topk(self) -> np.ndarray:
        """(P,) bool: the sampled token is among the teacher's kept ones."""
        found: np.ndarray = (self.micro.topk_id == self.micro.sampled_id[:, None]).any(1)
        return found


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an optimiser step did."""

    step: int
    """Optimiser steps taken, this one counted."""
    epoch: int
    loss: float
    """Mean loss of the step over all ranks, nats a position."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    """That the step was taken with."""
    num_positions: int
    """Scored tokens of the step, all ranks."""
    rows: int
    """Rows of the step, all ranks."""
    micro: tuple[MicroOutcome, ...]
    """This rank's micro-batches; idle ones are left out."""
    wait_s: float
    """Seconds this rank waited for data."""
    compute_s: float
    """Seconds of the rest of the step."""
    tokens: int
    """Tokens of this rank's rows."""
    forward_tokens: int
    """Tokens of them that went through the student: a shared prompt counts once."""
    padded_tokens: int
    """What would have gone through it with each micro-batch padded to its longest row."""
    phase: int = 0
    """Index of its phase in the run's list."""
    replayed: bool = True
    """Whether its rows are of the run's own cache, and not of another one or of a dataset."""


class Callback:
    """Listens to a trainer. Every method is called on every rank, in the order of the callbacks.

    `trainer.stop(reason)` ends the training after the step; `trainer.log(values)` adds numbers to
    the step's record for the trackers. A method that calls a collective must do so on all ranks.
    """

    name: str = ""
    """What a checkpoint keeps its state under; without a name it keeps none."""

    def on_open(self, trainer: "ReplayTrainer") -> None:
        """Called once when the trainer is made, before it takes a snapshot and loads the student;
        its settings, cache, run, output and policy are known, and where it is `resumed` from."""

    def on_begin(self, trainer: "ReplayTrainer") -> None:
        """Called once before the first step, after a checkpoint was resumed."""

    def on_step(self, trainer: "ReplayTrainer", outcome: StepOutcome) -> None:
        """Called after each optimiser step, before its record is logged and a checkpoint saved."""

    def on_save(self, trainer: "ReplayTrainer") -> None:
        """Called after each checkpoint."""

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Called once after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; before `on_begin`."""
