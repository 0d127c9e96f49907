"""What an objective needs of the teacher at each position, checked once for a whole micro-batch."""

# Shapes: T positions, B single-token buckets, M extra ids, D draws (1 or M; 0 without any).

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from stillroom.train.draws import Draws, check_tail_draws, extra_draws, sampled_draws
from stillroom.train.importance import check_weighted
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
            check_weighted(draws, objective, target)
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
        check_tail_draws(draws, target, buckets)
        return draws
    none = target.sampled_logprob.new_empty(len(target), 0)
    return Draws(none.long(), none, None, none.bool())
