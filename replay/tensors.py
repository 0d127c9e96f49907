"""A step as PyTorch tensors that share the memory of its arrays, and back."""

from dataclasses import fields
from typing import TypedDict

import numpy as np
import torch

from stillroom.cache.errors import ShapeError
from stillroom.replay.batch import Batch, MicroBatch

ALIGNMENT = 16

MicroTensors = dict[str, torch.Tensor]
"""The fields of a `MicroBatch`, by their names, with its shapes, dtypes and units."""


class Step(TypedDict):
    """One rank's share of one step; what a `ReplayDataset` yields."""

    epoch: int
    first: int
    """Where the step begins in its epoch."""
    rows: torch.Tensor
    """(B,) int64: rows of the whole step, all ranks, in replay order."""
    caches: torch.Tensor
    """(B,) int16: the source of each."""
    num_positions: int
    """N, scored tokens of the whole step, all ranks: what the loss is divided by."""
    micro_batches: list[MicroTensors | None]
    """This rank's; None is one that only keeps step with the other ranks."""


def step_tensors(batch: Batch) -> Step:
    """A step without copies of its arrays; what is written to a tensor is written to its array."""
    return {
        "epoch": batch.epoch,
        "first": batch.first,
        "rows": torch.from_numpy(np.array(batch.rows, np.int64)),
        "caches": torch.from_numpy(np.array(batch.caches, np.int16)),
        "num_positions": batch.num_positions,
        "micro_batches": [None if m is None else to_tensors(m) for m in batch.micro_batches],
    }


def to_tensors(micro: MicroBatch) -> MicroTensors:
    """Every field of a micro-batch as a tensor on the CPU, without a copy."""
    return {f.name: torch.from_numpy(getattr(micro, f.name)) for f in fields(MicroBatch)}


def from_tensors(tensors: MicroTensors) -> MicroBatch:
    """The micro-batch of these tensors, which must be on the CPU; without a copy.

    Raises:
        ShapeError: a loader put steps together.
    """
    if tensors["token"].dim() != 1:
        do = "Give the DataLoader batch_size=None: an item is a step."
        got = f"shape {tuple(tensors['token'].shape)}"
        raise ShapeError("micro-batch, token", "one axis", got, do)
    return MicroBatch(**{name: tensor.numpy() for name, tensor in tensors.items()})


def in_one_block(step: Step) -> Step:
    """A copy whose tensors lie in one block of shared memory.

    A process that takes tensors from another one keeps a file descriptor open for each block; with
    a block a tensor, large steps use up those that a process may have.
    """
    micro_batches = [micro for micro in step["micro_batches"] if micro is not None]
    within = [tensor for micro in micro_batches for tensor in micro.values()]
    size = sum(map(_room, [step["rows"], step["caches"], *within]))
    block, start = torch.empty(size, dtype=torch.uint8), 0
    block.share_memory_()  # type: ignore[no-untyped-call]

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal start
        place = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)
        return place.copy_(tensor)

    return {
        "epoch": step["epoch"],
        "first": step["first"],
        "rows": copied(step["rows"]),
        "caches": copied(step["caches"]),
        "num_positions": step["num_positions"],
        "micro_batches": [
            None if micro is None else {name: copied(tensor) for name, tensor in micro.items()}
            for micro in step["micro_batches"]
        ],
    }


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
