"""Arrays in page-locked memory, from which a GPU copies without stopping the process."""

from typing import Any

import numpy as np
import torch

from stillroom.replay.batch import Empty


def empty_for(device: torch.device) -> Empty:
    """What allocates arrays of batches that go to a device."""
    return pinned_empty if device.type == "cuda" else np.empty


def pinned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As np.empty, in page-locked memory that torch keeps for the next batch."""
    like = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=like, pin_memory=True).numpy()
