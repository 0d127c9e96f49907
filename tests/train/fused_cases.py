"""Objectives of all kinds, and rows for them, that tests of the closed forms share."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.train.objective import (
    COMPARED,
    DIVERGENCES,
    IMPORTANCE,
    PARAMETERS,
    WEIGHTED,
    Objective,
)
from stillroom.train.target import TeacherTarget
from stillroom.train.testing import exact_target

Array = NDArray[np.float64]


def _divergences() -> list[Objective]:
    made = []
    for kind in DIVERGENCES:
        parameter = {PARAMETERS[kind]: 0.3} if kind in PARAMETERS else {}
        for mode in ("tail", "renorm"):
            made.append(Objective(kind=kind, mode=mode, **parameter))  # type: ignore[arg-type]
    return made + [Objective(mode=mode) for mode in COMPARED]


def _estimators() -> list[Objective]:
    made = [Objective(kind=kind, importance=name) for kind in WEIGHTED for name in IMPORTANCE]
    for kind in ("policy_gradient", "multi_sample_policy_gradient"):
        made.append(Objective(kind=kind, clip_range=0.2, baseline=True))
    return [*made, Objective(kind="forward_kl_tail_samples")]


DIVERGENCE_CASES = _divergences()
OBJECTIVES = DIVERGENCE_CASES + _estimators()


def name_of(objective: Objective) -> str:
    """What a test of it is called."""
    extra = "-baseline" if objective.baseline else ""
    return f"{objective.kind}-{objective.mode}-{objective.importance}{extra}"


def rows(seed: int, num_rows: int, vocab_size: int, scale: float = 2.0) -> Array:
    """Random logits."""
    return np.random.default_rng(seed).normal(0.0, scale, (num_rows, vocab_size))


def target_for(
    objective: Objective, num_rows: int, vocab_size: int, num_kept: int = 3, seed: int = 0
) -> TeacherTarget:
    """A target with all that the objective needs: extra ids, some of them unused or repeated, and
    behaviour logprobs at a temperature that some rows do not know."""
    rng = np.random.default_rng(seed)
    teacher, behaviour = rows(seed + 1, num_rows, vocab_size), rows(seed + 2, num_rows, vocab_size)
    sampled = [int(i) for i in rng.integers(0, vocab_size, num_rows)]
    if objective.kind == "forward_kl_tail_samples":
        rest = np.argsort(-teacher, axis=1)[:, num_kept:]
        extra = [[int(row[i]) for i in rng.integers(0, len(row), 4)] for row in rest]
    else:
        extra = rng.integers(0, vocab_size, (num_rows, 4)).tolist()
    for row in range(0, num_rows, 3):
        extra[row][2:] = [extra[row][0], -1]
    target = exact_target(teacher, num_kept, sampled, extra, behaviour)
    temperature = torch.full((num_rows,), 1.3, dtype=torch.float64)
    temperature[::2] = math.nan
    return replace(target, sampling_temperature=temperature)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Fail where |got - wanted| > tolerance (1 + |wanted|), or either is not finite."""
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs() / (1.0 + wanted.double().abs())
    assert bool((error <= tolerance).all()), f"{float(error.max()):.3g}"
