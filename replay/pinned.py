"""Arrays of batches in page-locked memory, and their copies to a device, during which the process
goes on."""

from typing import Any

import numpy as np
import torch

from stillroom.cache.recycler import Empty


def empty_for(device: torch.device) -> Empty | None:
    """What allocates arrays of batches that go to a device; None where any memory will do."""
    return pinned_empty if device.type == "cuda" else None


def pinned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As np.empty, in page-locked memory that torch keeps for the next batch."""
    like = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=like, pin_memory=True).numpy()


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array there; on the CPU itself, without a copy.

    Out of page-locked memory the copy may still be under way: don't write to the array afterwards.
    It may be let go, as torch waits for the copy before it gives the memory to others.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)
