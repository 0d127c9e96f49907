"""The student's masses in the teacher's buckets from the logits of a chunk, and the gradient of a
loss of them by the logits, both in the buffer that held the logits.

With U the tokens that are buckets of their own, the buffer then holds p, the softmax over the rest
of the vocabulary. The student's probability of a token there is s_tail p_v, so one exponential
serves the student's masses and the gradient. The tail's logsumexp is its own, not one minus the
other masses, which would lose all digits in float32 once the tail is below 1e-6.
"""

# Shapes: n positions of a chunk, V vocabulary, B single-token buckets, D draws.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.train.coefficients import Coefficients, StudentSide
from stillroom.train.teacher_side import TeacherSide


class ChunkScores(NamedTuple):
    """What a student says at the n positions of a chunk, nats."""

    student: StudentSide
    sampled: Tensor
    """(n,) logprob of the sampled token."""
    bucket_id: Tensor
    """(n, B) tokens of the buckets; where there is none, another bucket's or the sampled one."""
    token_id: Tensor
    """(n, 1 + D) the sampled token and the draws."""


def tokens_of(teacher: TeacherSide, sampled_id: Tensor) -> Tensor:
    """The sampled token and the draws, (n, 1 + D); where a draw is not used, the sampled token."""
    draw = torch.where(teacher.draws.used, teacher.draws.token_id, sampled_id[:, None])
    return torch.cat([sampled_id[:, None], draw], dim=1)


def logprob_at(logits: Tensor, token_id: Tensor, ratio: Tensor, spare: Tensor) -> Tensor:
    """Logprobs (n,) of tokens at other temperatures.

    Args:
        logits: (n, V) over the temperature.
        token_id: (n,) int64.
        ratio: (n,) the temperature over the other one.
        spare: (n, V), overwritten.
    """
    torch.mul(logits, ratio[:, None], out=spare)
    picked, top = spare.gather(1, token_id[:, None]), spare.amax(1, keepdim=True)
    total = spare.sub_(top).exp_().sum(1, keepdim=True)
    return (picked - top - total.log()).squeeze(1)


def take_scores(logits: Tensor, teacher: TeacherSide, token_id: Tensor) -> ChunkScores:
    """Score buckets and tokens, and leave in `logits` the softmax over the tail, 0 on U.

    Args:
        logits: (n, V) float32 or float64 over the temperature, overwritten. Where buckets cover the
            vocabulary, what is left in a row is finite and means nothing.
        teacher: at the same positions.
        token_id: (n, 1 + D), see `tokens_of`.
    """
    bucket_id = _bucket_id(teacher, token_id[:, :1])
    own, picked = logits.gather(1, bucket_id), logits.gather(1, token_id)
    top, tail = _tail_softmax(logits, bucket_id, own, teacher)
    own = own.masked_fill(~teacher.buckets.exists[:, :-1], -math.inf)
    # What is common to all logits goes before it can take digits from the masses.
    common = torch.maximum(own.amax(1), top)[:, None]
    masses = torch.cat([own - common, top[:, None] - common + tail[:, None]], dim=1)
    lse = masses.logsumexp(1, keepdim=True)
    picked = picked - common - lse
    student = StudentSide(masses - lse, picked[:, 1:])
    return ChunkScores(student, picked[:, 0], bucket_id, token_id)


def make_gradient(
    softmax: Tensor,
    scores: ChunkScores,
    made: Coefficients,
    weight: Tensor | None,
    cross_entropy_weight: Tensor | None,
    slope: float = 1.0,
) -> None:
    """Turn what `take_scores` left into the gradient by the logits over the temperature:

        v in U:     a_v - A s_v
        elsewhere:  (a_tail - A s_tail) p_v

    Args:
        softmax: (n, V), overwritten.
        scores: of these positions.
        made: the loss's coefficients.
        weight: (n,) of the losses; None is 1.
        cross_entropy_weight: (n,) of -log s of the sampled token; None is 0.
        slope: multiplies the gradient.
    """
    bucket, draw = weighted(made.bucket, weight), weighted(made.draw, weight)
    sampled = torch.zeros_like(scores.sampled)
    if cross_entropy_weight is not None:
        sampled = -cross_entropy_weight
    token = torch.cat([sampled[:, None], draw], dim=1)
    pull = bucket.sum(1, keepdim=True) + token.sum(1, keepdim=True)
    by_bucket = slope * (bucket - pull * scores.student.bucket.exp())
    softmax.mul_(by_bucket[:, -1:])
    softmax.scatter_add_(1, scores.bucket_id, by_bucket[:, :-1])
    softmax.scatter_add_(1, scores.token_id, slope * token)


def weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return values (n, ...) times weights (n,); 0 where a weight is 0, whatever the value is."""
    if weight is None:
        return values
    by_row = weight.view(-1, *(1 for _ in values.shape[1:]))
    return torch.where(by_row == 0, 0.0, values * by_row)


def _bucket_id(teacher: TeacherSide, sampled: Tensor) -> Tensor:
    """Return ids (n, B) below V: those that stand for no bucket repeat one that does."""
    exists, token_id = teacher.buckets.exists[:, :-1], teacher.buckets.token_id
    first = token_id.gather(1, exists.byte().argmax(1, keepdim=True))
    stand_in = torch.where(exists.any(1, keepdim=True), first, sampled)
    return torch.where(exists, token_id, stand_in)


def _tail_softmax(
    logits: Tensor, bucket_id: Tensor, own: Tensor, teacher: TeacherSide
) -> tuple[Tensor, Tensor]:
    """Leave the tail's softmax in `logits`, and return two numbers a row: the tail's largest logit,
    -inf if the tail is empty, and its logsumexp above that."""
    exists, has_tail = teacher.buckets.exists[:, :-1], teacher.buckets.exists[:, -1]
    fill = torch.where(has_tail, -math.inf, 0.0).to(logits.dtype)[:, None]
    logits.scatter_(1, bucket_id, torch.where(exists.any(1, keepdim=True), fill, own))
    top = torch.where(has_tail, logits.amax(1), -math.inf)
    # A tail of logits that are all -inf has no softmax: any finite row will do.
    spot = bucket_id[:, :1]
    empty = (has_tail & (top == -math.inf))[:, None]
    logits.scatter_(1, spot, torch.where(empty, 0.0, logits.gather(1, spot)))
    torch.softmax(logits, 1, out=logits)
    # The likeliest token's softmax is exp(top - logsumexp).
    return top, -logits.amax(1).log()
