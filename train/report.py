"""What a training run did, in numbers."""

from dataclasses import dataclass, field
from typing import Any

from stillroom.train.callbacks import StepOutcome


@dataclass(slots=True)
class TrainReport:
    """What a training run did."""

    steps: int = 0
    rows: int = 0
    """Rows of the cache that were replayed by this process's job, all ranks, repeats counted."""
    positions: int = 0
    """Scored tokens replayed, repeats counted."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step since the run was last started or resumed, nats a position."""
    last_loss: float | None = None
    """That of the last step, also where it was taken before the run was resumed."""
    student_step: int = 0
    """Optimiser steps that the student has taken: fewer than `steps` where its best is back."""
    drift: dict[str, Any] = field(default_factory=dict)
    """Drift since the record before the last, by policy version."""
    held_out: dict[str, Any] = field(default_factory=dict)
    """The last held-out measurement and the best one; empty without `eval_root`."""
    pace: dict[str, float] = field(default_factory=dict)
    """Rates, shares and the most memory used, over all ranks."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of the snapshot (the last, of several) that are not replayed, by the first reason."""
    truncated: int = 0
    """Rows of it that lost their last tokens."""
    stopped: str = ""
    """Why it ended before its last step; empty if it did not."""
    train_s: float = 0.0
    """Seconds in the loop."""

    def add(self, outcome: StepOutcome) -> None:
        """Count a step."""
        self.steps = outcome.step
        if outcome.replayed:
            self.rows += outcome.rows
            self.positions += outcome.num_positions
        self.losses.append(outcome.loss)
        self.last_loss = outcome.loss
