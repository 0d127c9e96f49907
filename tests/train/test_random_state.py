"""Random generators go on where they were."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from stillroom.train.random_state import random_state, set_random_state


def drawn() -> list[float]:
    """One number of each generator, and one that depends on a spare normal draw."""
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    return [*map(float, numbers), float(torch.rand(()))]


def test_goes_on_after_being_stored() -> None:
    """Also in the middle of a pair of normal draws, through a file without arbitrary pickles."""
    random.gauss(0, 1)
    np.random.randn()
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [drawn() for _ in range(3)]
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert [drawn() for _ in range(3)] == expected
