"""The random generators of a process: Python's, NumPy's, torch's, and those of its GPUs."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Where they stand: numbers, lists and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, words, spare = random.getstate()
    return {
        "python": [version, list(words), spare],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `random_state` gave; GPUs only where there are as many."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
