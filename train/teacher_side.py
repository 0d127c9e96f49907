"""What an objective needs of the teacher at each position, checked as it is made."""

# Shapes: T positions, B single-token buckets, M extra ids, D draws (1 or M; 0 without any).

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from stillroom.cache.errors import StillroomError
from stillroom.train.draws import Draws, check_tail_draws, extra_draws, sampled_draws
from stillroom.train.importance import check_weighted
from stillroom.train.objective import ESTIMATORS, WEIGHTED, Objective
from stillroom.train.target import TeacherBuckets, TeacherTarget, teacher_buckets

BUCKET_BYTES = 128
"""That a bucket of a position takes at most while its teacher's side is made, and while the loss of
a chunk is computed from it."""
ROW = re.compile(r"TeacherTarget row (\d+)")


def side_bytes(target: TeacherTarget) -> int:
    """Bytes a position of a target's teacher side, and of what a chunk's loss is computed from it,
    at most."""
    extras = 0 if target.extra_id is None else target.extra_id.shape[1]
    return BUCKET_BYTES * (target.topk_id.shape[1] + extras + 2)


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

    @classmethod
    def at(cls, row: Tensor, objective: Objective, target: TeacherTarget, vocab_size: int) -> Self:
        """Prepare the positions of a target that `row` lists, (N,) int64.

        Raises:
            StillroomError: as `of`; it names the position by its number in the whole target.
        """
        with _numbered(row):
            return cls.of(objective, target.select(row), vocab_size)

    def select(self, row: Tensor | slice) -> Self:
        """Return the positions that `row` lists, (N,) int64, or a range of them as views."""
        draws, behaviour = self.draws, self.draws.behaviour_logprob
        chosen = Draws(
            draws.token_id[row],
            draws.teacher_logprob[row],
            None if behaviour is None else behaviour[row],
            draws.used[row],
        )
        return replace(self, buckets=self.buckets.select(row), draws=chosen)


@contextmanager
def _numbered(row: Tensor) -> Iterator[None]:
    try:
        yield
    except StillroomError as error:
        match = ROW.fullmatch(error.where)
        if match is None:
            raise
        where = f"TeacherTarget row {int(row[int(match[1])])}"
        raise type(error)(where, error.expected, error.got, error.do) from error


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
