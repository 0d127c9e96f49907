"""Weights of draws that a behaviour policy made, so that they stand for draws of the student."""

# Shapes: T positions, D draws of a position.

import math

import torch
from torch import Tensor

from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.train.draws import Draws, refuse, refuse_behaviour, refuse_impossible
from stillroom.train.objective import IMPORTANCE, Objective
from stillroom.train.target import TeacherTarget

MAX_LOG_RATIO = 20.0
"""Log-ratios of student to behaviour policy are clamped to this, so that no weight overflows."""


@torch.no_grad()
def importance_weight(
    student_logprob: Tensor,
    behaviour_logprob: Tensor,
    kind: str = "full",
    cap: float = 2.0,
    bounds: tuple[float, float] = (0.5, 5.0),
) -> Tensor:
    """Weight of draws, from the ratio r of the student's probability to the behaviour policy's.

        none: 1;  full: r;  tis: min(r, cap);  icepop: r inside the bounds, else 0

    Args:
        student_logprob: (T,) or (T, D) float, nats.
        behaviour_logprob: of the same shape, nats; not read by "none".
        kind: "none", "full", "tis" or "icepop".
        cap: greatest weight of "tis".
        bounds: least and greatest ratio that "icepop" counts, both included.

    Returns:
        (T,) or (T, D) float, >= 0, without gradient; log r is clamped to -20 to 20.

    Raises:
        ConfigError: if the kind is unknown.
        NumericsError: if a behaviour logprob is NaN, which is to say unknown, -inf or above 0.
    """
    if kind not in IMPORTANCE:
        raise ConfigError("importance", f"one of {IMPORTANCE}", repr(kind), "Choose one of them.")
    if kind == "none":
        return torch.ones_like(student_logprob)
    refuse_behaviour(behaviour_logprob)
    return ratio_weight(student_logprob, behaviour_logprob, kind, cap, bounds)


def ratio_weight(
    student_logprob: Tensor,
    behaviour_logprob: Tensor,
    kind: str,
    cap: float,
    bounds: tuple[float, float],
) -> Tensor:
    """Return `importance_weight` of a kind that is known and not "none", unchecked: NaN stays."""
    log_ratio = student_logprob - behaviour_logprob.to(student_logprob.dtype)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if kind == "tis":
        return ratio.clamp(max=cap)
    if kind == "icepop":
        return torch.where((ratio >= bounds[0]) & (ratio <= bounds[1]), ratio, 0.0)
    return ratio


@torch.no_grad()
def draw_weight(
    target: TeacherTarget, draws: Draws, logprob: Tensor, objective: Objective
) -> Tensor:
    """Return the weight of each draw that an objective wants.

    At whatever temperature draws were made, they are weighted to stand for draws of the student at
    the loss's temperature, which is where the loss is an expectation.

    Args:
        target: T positions.
        draws: of the same positions.
        logprob: (T, D) nats, the student's, at the loss's temperature.
        objective: the kind of weights, and their limits.

    Returns:
        (T, D) float, without gradient.

    Raises:
        MismatchError, NumericsError: as `check_weighted`.
    """
    check_weighted(draws, objective, target)
    if objective.importance == "none":
        return torch.ones_like(logprob)
    cap, bounds = objective.importance_cap, objective.importance_range
    behaviour = draws.known_behaviour()
    return ratio_weight(logprob, behaviour, objective.importance, cap, bounds)


def check_weighted(draws: Draws, objective: Objective, target: TeacherTarget) -> None:
    """Refuse draws that have no advantage or no importance weight.

    Raises:
        MismatchError: if behaviour logprobs are needed and missing, or draws were made greedily.
        NumericsError: if the teacher gives a draw no probability, or a behaviour logprob is needed
            and unknown, -inf or above 0.
    """
    refuse_impossible(draws)
    if objective.importance == "none":
        return
    refuse_behaviour(draws.known_behaviour())
    if target.sampling_temperature is not None:
        do = "Set importance='none': a ratio to a policy without randomness means nothing."
        wrong = draws.used.any(1) & without_randomness(target.sampling_temperature)
        refuse(wrong, "a finite sampling temperature above 0", "another", do, MismatchError)


def without_randomness(temperature: Tensor) -> Tensor:
    """Return where a sampling temperature is known, but none that logits can be divided by."""
    return (temperature <= 0) | (temperature == math.inf)
