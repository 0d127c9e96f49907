"""The gradient of one optimiser step: that of the mean loss over all ranks, batches and
micro-batches. For the trainer, and for loops of your own.

The sum over the step's scored tokens is divided by their number on all ranks, which is known before
the first backward. So neither how rows fall into micro-batches, nor accumulation, nor the number of
ranks changes the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.tensors import Step, from_tensors
from stillroom.train.callbacks import MicroOutcome
from stillroom.train.fused import FusedLoss
from stillroom.train.parallel import Parallel
from stillroom.train.replay_loss import ReplayLoss, StepCount


@dataclass(frozen=True, slots=True)
class StepGradient:
    """What `backward` found beside the gradient."""

    loss: float
    """Mean loss over all ranks, nats."""
    count: StepCount
    """What it was divided by."""
    micro: tuple[MicroOutcome, ...]
    """Of this rank's micro-batches, in their order, without idle ones."""


def backward(parallel: Parallel, loss: ReplayLoss, batches: Sequence[Batch]) -> StepGradient:
    """Add the gradient of a step's mean loss to the parameters' `grad`.

    Every rank calls it with its share of the same batches, which has as many micro-batches on each.

    Args:
        parallel: the student's model.
        loss: of a micro-batch.
        batches: those whose gradient is accumulated; one at least.
    """
    micro_batches = [micro for batch in batches for micro in batch.micro_batches]
    count = count_of(parallel, loss, batches)
    total = torch.zeros((), dtype=torch.float64, device=parallel.model.device)
    found = list[tuple[MicroBatch, FusedLoss]]()
    for i, micro in enumerate(micro_batches):
        with parallel.reducing(last=i == len(micro_batches) - 1):
            part = parallel.run(loss, micro, count, float(parallel.world))
            part.total.backward()
        total += part.total.detach()
        if micro is not None:
            found.append((micro, part._replace(total=part.total.detach())))
    mean = float(parallel.sum(total)) / parallel.world
    return StepGradient(mean, count, tuple(_outcome(*pair) for pair in found))


def count_of(parallel: Parallel, loss: ReplayLoss, batches: Sequence[Batch]) -> StepCount:
    """What the loss of a step is divided by; asks other ranks only where there is cross-entropy."""
    positions = sum(batch.num_positions for batch in batches)
    if not loss.objective.cross_entropy:
        return StepCount(positions)
    own = [loss.crossed(micro) for batch in batches for micro in batch.micro_batches if micro]
    crossed = torch.tensor(sum(int(x.sum()) for x in own), device=parallel.model.device)
    return StepCount(positions, int(parallel.sum(crossed)))


def batch_of(step: Step) -> Batch:
    """A step of a `ReplayDataset` as a batch, without copies."""
    return Batch(
        epoch=step["epoch"],
        first=step["first"],
        rows=tuple(step["rows"].tolist()),
        caches=tuple(step["caches"].tolist()),
        num_positions=step["num_positions"],
        micro_batches=tuple(m if m is None else from_tensors(m) for m in step["micro_batches"]),
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of micro-batches."""

    rows: int = 0
    """In all their rows."""
    forward: int = 0
    """That go through the student: a shared prompt counts once."""
    padded: int = 0
    """That would if each micro-batch were padded to its longest row."""

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> "Tokens":
        """Count those of some micro-batches."""
        lengths = [_row_tokens(micro) for micro in micro_batches]
        return cls(
            rows=sum(int(rows.sum()) for rows in lengths),
            forward=sum(len(micro.token) for micro in micro_batches),
            padded=sum(len(rows) * int(rows.max()) for rows in lengths),
        )


def _row_tokens(micro: MicroBatch) -> np.ndarray:
    """Tokens of each row, its prompt included where that is shared."""
    length, prefix = np.diff(micro.row_start), micro.prefix
    whole = length + np.where(prefix >= 0, length[prefix], 0)
    is_row = ~np.isin(np.arange(len(prefix)), prefix)
    rows: np.ndarray = whole[is_row]
    return rows


def _outcome(micro: MicroBatch, loss: FusedLoss) -> MicroOutcome:
    value, crossed, sampled, tail = (x.float().cpu().numpy() for x in loss[1:])
    return MicroOutcome(micro, value, crossed, sampled, tail)
