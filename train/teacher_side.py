"""What an objective needs of the teacher at each position, checked once for a whole micro-batch."""

# Shapes: T positions, B single-token buckets, M extra ids, D draws (1 or M; 0 without any).

import math
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from stillroom.cache.errors import MismatchError
from stillroom.train.draws import Draws, extra_draws, refuse, refuse_impossible, sampled_draws
from stillroom.train.objective import ESTIMATORS, WEIGHTED, Objective
from stillroom.train.target import TeacherBuckets, TeacherTarget, teacher_buckets


@dataclass(frozen=True, slots=True, eq=False)
class TeacherSide:
    """The teacher's side of a loss at T positions."""

    buckets: TeacherBuckets
    """Masses of both what is compared and, for policy gradients, of the baseline."""
    draws: Draws
    """Tokens whose logprobs the loss takes one by one; none for divergences."""

    @classmethod
    def of(cls, objective: Objective, target: TeacherTarget, vocab_size: int) -> Self:
        """Prepare a target of T positions; masked ones are never read.

        Raises:
            MismatchError: if the target lacks what the objective needs.
            NumericsError: if a draw has no teacher probability, or no behaviour logprob though it
                is weighted.
            StillroomError: if a scored row is unusable, see `teacher_buckets`.
        """
        kind, mode = objective.kind, objective.mode
        divides = kind == "reverse" or (kind == "mixed" and objective.forward_weight != 1)
        buckets = teacher_buckets(
            target,
            vocab_size,
            floor_tail=(divides and mode == "tail") or kind in WEIGHTED,
            normalise=kind != "reverse_kl_rb",
            kept_only=kind in ESTIMATORS,
        )
        draws = _draws(kind, target, buckets)
        if kind in WEIGHTED:
            _check_weighted(draws, objective, target)
        return cls(buckets, draws)

    def select(self, row: Tensor) -> Self:
        """Return the positions that `row` lists, (N,) int64."""
        draws, behaviour = self.draws, self.draws.behaviour_logprob
        chosen = Draws(
            draws.token_id[row],
            draws.teacher_logprob[row],
            None if behaviour is None else behaviour[row],
            draws.used[row],
        )
        return replace(self, buckets=self.buckets.select(row), draws=chosen)


def _draws(kind: str, target: TeacherTarget, buckets: TeacherBuckets) -> Draws:
    if kind == "policy_gradient":
        return sampled_draws(target)
    if kind == "multi_sample_policy_gradient":
        return extra_draws(target, "the student's draws (extra_kind student)")
    if kind == "reverse_kl_rb":
        in_tail = buckets.sampled_column == buckets.token_id.shape[1]
        return sampled_draws(target).where(in_tail[:, None])
    if kind == "forward_kl_tail_samples":
        draws = extra_draws(target, "the teacher's draws (extra_kind tail)")
        _check_tail_draws(draws, target, buckets)
        return draws
    none = target.sampled_logprob.new_empty(len(target), 0)
    return Draws(none.long(), none, None, none.bool())


def _check_tail_draws(draws: Draws, target: TeacherTarget, buckets: TeacherBuckets) -> None:
    do = "Use a cache with extra_kind 'tail', or another objective."
    column, expected = buckets.extra_column, "draws from the teacher's tail"
    kept = (column >= 0) & (column < buckets.num_kept)
    refuse(kept, expected, "a kept token", do, MismatchError)
    has_tail = target.mask & buckets.exists[:, -1] & (target.tail_logprob > -math.inf)
    refuse(has_tail & ~draws.used.any(1), expected, "none", do, MismatchError)
    refuse_impossible(draws.where(has_tail[:, None]))


def _check_weighted(draws: Draws, objective: Objective, target: TeacherTarget) -> None:
    """Refuse draws that have no advantage or no importance weight."""
    refuse_impossible(draws)
    if objective.importance == "none":
        return
    do = "Set importance='none', or use rollouts whose behaviour logprobs were stored."
    refuse(draws.known_behaviour().isnan(), "a known behaviour logprob", "nan", do)
    if target.sampling_temperature is not None:
        do = "Set importance='none': a ratio to a policy without randomness means nothing."
        wrong = draws.used.any(1) & without_randomness(target.sampling_temperature)
        refuse(wrong, "a finite sampling temperature above 0", "another", do, MismatchError)


def without_randomness(temperature: Tensor) -> Tensor:
    """Return where a sampling temperature is known, but none that logits can be divided by."""
    return (temperature <= 0) | (temperature == math.inf)
