"""Tokens that were drawn at each position, and what both policies said about them: the sampled
token, or the extra ids."""

# Shapes: T positions, D draws of a position: 1, or M extra ids.

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from stillroom.cache.errors import MismatchError, NumericsError, StillroomError
from stillroom.train.target import MAX_MASS, TeacherBuckets, TeacherTarget, used_extra

WITHOUT = "Set importance='none', or use rollouts whose behaviour logprobs were stored."
"""What to do about draws without behaviour logprobs."""
MOST_NATS = math.log(MAX_MASS)
"""Logprobs above 0 by less than this are rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """D draws of each of T positions."""

    token_id: Tensor
    """(T, D) int64."""
    teacher_logprob: Tensor
    """(T, D) float, nats; at most 0."""
    behaviour_logprob: Tensor | None
    """(T, D) float, nats; NaN where unknown; None if the target has none."""
    used: Tensor
    """(T, D) bool; what is false is never read."""

    def where(self, counted: Tensor) -> Self:
        """Return the draws with only those used that `counted`, (T, D) bool, also holds for."""
        return replace(self, used=self.used & counted)

    def known_behaviour(self) -> Tensor:
        """Return behaviour logprobs, (T, D), 0 where not used; NaN is left to the reader.

        Raises:
            MismatchError: if there are none though draws are used.
        """
        if self.behaviour_logprob is not None:
            return torch.where(self.used, self.behaviour_logprob, 0.0)
        if bool(self.used.any()):
            raise MismatchError("TeacherTarget", "behaviour logprobs of the draws", "none", WITHOUT)
        return torch.zeros_like(self.teacher_logprob)


def sampled_draws(target: TeacherTarget) -> Draws:
    """Return the sampled token as the one draw of each scored position."""
    behaviour = target.behaviour_logprob
    return Draws(
        target.sampled_id[:, None],
        target.sampled_logprob[:, None].clamp(max=0.0),
        None if behaviour is None else behaviour[:, None],
        target.mask[:, None],
    )


def extra_draws(target: TeacherTarget, expected: str) -> Draws:
    """Return the extra ids of each scored position as its draws.

    Args:
        target: T positions.
        expected: whose draws they are to be, for the message.

    Raises:
        MismatchError: if positions are scored and the target has no extra ids.
    """
    used = used_extra(target)
    if target.extra_id is not None and target.extra_logprob is not None and used.shape[1]:
        behaviour = target.extra_behaviour_logprob
        return Draws(target.extra_id, target.extra_logprob.clamp(max=0.0), behaviour, used)
    if bool(target.mask.any()):
        do = "Make the cache with extra ids of that kind, or choose another objective."
        raise MismatchError("TeacherTarget.extra_id", expected, "no extra ids", do)
    nothing = target.sampled_logprob.new_zeros(used.shape)
    return Draws(nothing.long(), nothing, nothing, used)


def check_tail_draws(draws: Draws, target: TeacherTarget, buckets: TeacherBuckets) -> None:
    """Refuse draws that cannot be the teacher's from its tail, and a tail without any.

    Raises:
        MismatchError: if a draw is a kept token, or there is none though there is a tail.
        NumericsError: if the teacher gives a draw no probability.
    """
    do = "Use a cache with extra_kind 'tail', or another objective."
    column, expected = buckets.extra_column, "draws from the teacher's tail"
    kept = (column >= 0) & (column < buckets.num_kept)
    refuse(kept, expected, "a kept token", do, MismatchError)
    has_tail = target.mask & buckets.exists[:, -1] & (target.tail_logprob > -math.inf)
    refuse(has_tail & ~draws.used.any(1), expected, "none", do, MismatchError)
    refuse_impossible(draws.where(has_tail[:, None]))


def refuse_behaviour(logprob: Tensor) -> None:
    """Raise NumericsError for the first row of behaviour logprobs (T, ...) that has no weight: one
    that is NaN, which is to say unknown, or no probability above 0."""
    refuse(logprob.isnan(), "a known behaviour logprob", "nan", WITHOUT)
    possible = (logprob > -math.inf) & (logprob <= MOST_NATS)
    expected = "a behaviour logprob above -inf and of at most 0"
    refuse(~possible, expected, "another", "Store those of the policy that drew the tokens.")


def refuse_impossible(draws: Draws) -> None:
    """Raise NumericsError if the teacher gives a used draw no probability."""
    do = "Use a divergence, which compares such a token within the teacher's tail."
    impossible = draws.used & (draws.teacher_logprob == -math.inf)
    refuse(impossible, "draws that the teacher gives a probability", "a logprob of -inf", do)


def refuse(
    bad: Tensor, expected: str, got: str, do: str, error: type[StillroomError] = NumericsError
) -> None:
    """Raise `error` for the first row (dim 0) where `bad` is true."""
    if bool(bad.any()):
        raise error(f"TeacherTarget row {bad.nonzero()[0].tolist()[0]}", expected, got, do)
