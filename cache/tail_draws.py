"""Draws from what is left of a teacher's distribution, the same whenever a part is scored again
with equal logits.

Shapes: P positions, V logit width, M draws.
"""

import numpy as np
import torch

from stillroom.cache.schema import UNUSED_ID

ROWS = 64
"""Positions whose cumulative weights are held at once: 16 bytes a logit."""


def uniforms(seed: int, positions: int, draws: int) -> np.ndarray:
    """Uniform numbers of one row of positions, a function of seed, position and draw alone.

    Returns:
        (positions, draws) float64 in [0, 1).
    """
    return np.random.Generator(np.random.Philox(key=seed)).random((positions, draws))


def draw_from(logit_PV: torch.Tensor, uniform_PM: torch.Tensor) -> torch.Tensor:
    """Independent draws with replacement from the softmax of each row of logits.

    Weights are whole numbers, so their running sums are exact in whatever order a device adds them:
    a token without probability is never drawn, and equal weights give equal draws. A token less
    likely than 2^-44 of the row's likeliest (at V = 150,000) has weight 0.

    Args:
        logit_PV: (P, V) float32; -inf where there is no probability.
        uniform_PM: (P, M) float64 in [0, 1).

    Returns:
        (P, M) int64 ids; UNUSED_ID in a row without any probability.
    """
    id_PM = torch.empty_like(uniform_PM, dtype=torch.int64)
    for start in range(0, len(id_PM), ROWS):
        rows = slice(start, start + ROWS)
        id_PM[rows] = _draw_block(logit_PV[rows], uniform_PM[rows])
    return id_PM


def _draw_block(logit_PV: torch.Tensor, uniform_PM: torch.Tensor) -> torch.Tensor:
    largest_P1 = logit_PV.amax(1, keepdim=True)
    empty_P1 = largest_P1 == -torch.inf
    scale = 2.0 ** (62 - logit_PV.shape[1].bit_length())
    weight_PV = ((logit_PV - largest_P1.masked_fill(empty_P1, 0)).exp() * scale).long()
    until_PV = weight_PV.cumsum(1)
    total_P1 = until_PV[:, -1:]
    point_PM = torch.minimum((uniform_PM * total_P1).long(), total_P1 - 1)
    return torch.searchsorted(until_PV, point_PM, right=True).masked_fill(empty_P1, UNUSED_ID)
