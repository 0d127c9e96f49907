"""The losses in closed form: their values, and what of their gradients goes to each bucket of
tokens and to each drawn token.

With student masses S_b, a loss L that depends on the logits z through them only, and

    a_b = S_b dL/dS_b,    A = sum_b a_b,

the gradient by the logits over the temperature is, s being the student's probabilities,

    a_b(v) s_v / S_b(v) - A s_v

(s_v = S_b for a token that is a bucket of its own). A term -c log s_v, for a drawn token v, adds
-c to the a of v. `train.objectives` and `train.estimators` say what the losses are.
"""

# Shapes: N positions, B single-token buckets (the tail is the bucket after them), D draws.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.train.importance import ratio_weight
from stillroom.train.objective import DIVERGENCES, Objective
from stillroom.train.teacher_side import TeacherSide


class StudentSide(NamedTuple):
    """What the student says at N positions, nats."""

    bucket: Tensor
    """(N, B + 1) log masses; -inf where a bucket does not exist."""
    draw: Tensor
    """(N, D) logprobs of the draws, at the loss's temperature; anything where not used."""


class Coefficients(NamedTuple):
    """A loss and its gradient at N positions."""

    value: Tensor
    """(N,) nats."""
    bucket: Tensor
    """(N, B + 1) a of each bucket; 0 where it does not exist."""
    draw: Tensor
    """(N, D) what each draw adds to the a of its token; 0 where not used."""


Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def coefficients(objective: Objective, teacher: TeacherSide, student: StudentSide) -> Coefficients:
    """Return the loss of an objective and its coefficients, in the student's dtype.

    Args:
        objective: which loss; its share of cross-entropy is not in it.
        teacher: prepared for this objective.
        student: at the same N positions.
    """
    buckets, dtype = teacher.buckets, student.bucket.dtype
    t, s = buckets.logprob.to(dtype), student.bucket
    scored = buckets.exists[:, :-1].any(1)
    kind = objective.kind
    if kind in DIVERGENCES:
        value, bucket = _where(scored, _in_mode(t, s, objective))
        return Coefficients(value, bucket, torch.zeros_like(student.draw))
    if kind == "forward_kl_tail_samples":
        return _tail_samples(t, s, teacher, student)
    reverse, bucket = _where(scored, _reverse(t, s))
    if kind == "reverse_kl_rb":
        gap = torch.where(scored, t[:, -1] - s[:, -1], 0.0)
        residual, draw = _residual(objective, teacher, student, gap)
        return Coefficients(reverse + residual, bucket, draw)
    raised = reverse if objective.baseline else torch.zeros_like(reverse)
    value, draw = _policy_gradient(objective, teacher, student, raised)
    return Coefficients(value, torch.zeros_like(bucket), draw)


def _in_mode(t: Tensor, s: Tensor, objective: Objective) -> Pair:
    """Return loss (N,) and a (N, B + 1) of a divergence, with the tail or without."""
    mode, kind, param = objective.mode, objective.kind, objective.param
    if mode == "tail":
        return _divergence(t, s, kind, param)
    t, s = t[:, :-1], s[:, :-1]
    if mode != "truncated":
        t = t - t.logsumexp(1, keepdim=True)
    if mode == "renorm":
        s = s - s.logsumexp(1, keepdim=True)
    value, a = _divergence(t, s, kind, param)
    if mode == "renorm":
        a = a - _times(s, a.sum(1, keepdim=True))
    return value, torch.nn.functional.pad(a, (0, 1))


def _divergence(t: Tensor, s: Tensor, kind: str, param: float | None) -> Pair:
    if kind == "forward":
        return _forward(t, s)
    if kind == "reverse":
        return _reverse(t, s)
    assert param is not None
    if kind == "mixed":
        return _mixed(t, s, param)
    return {"jsd": _jsd, "skew": _skew, "skew_reverse": _skew_reverse}[kind](t, s, param)


def _forward(t: Tensor, s: Tensor) -> Pair:
    return _times(t, t - s).sum(1), _times(t, -torch.ones_like(t))


def _reverse(t: Tensor, s: Tensor) -> Pair:
    """Adding c S_b to every a_b changes no gradient; here it makes them sum to 0."""
    value = _times(s, s - t).sum(1)
    return value, _times(s, s - t - value[:, None])


def _mixed(t: Tensor, s: Tensor, forward_weight: float) -> Pair:
    parts = [(forward_weight, _forward), (1.0 - forward_weight, _reverse)]
    pairs = [(weight, kl(t, s)) for weight, kl in parts if weight > 0]
    value = sum((weight * pair[0] for weight, pair in pairs), torch.zeros_like(t[:, 0]))
    return value, sum((weight * pair[1] for weight, pair in pairs), torch.zeros_like(t))


def _jsd(t: Tensor, s: Tensor, beta: float) -> Pair:
    m = _mixture(t, s, beta)
    a = (1.0 - beta) * _times(s, s - m)
    return beta * _times(t, t - m).sum(1) + a.sum(1), a


def _skew(t: Tensor, s: Tensor, alpha: float) -> Pair:
    m = _mixture(t, s, alpha)
    return _times(t, t - m).sum(1), (alpha - 1.0) * _times(t, (s - m).exp())


def _skew_reverse(t: Tensor, s: Tensor, alpha: float) -> Pair:
    m = _mixture(s, t, alpha)
    return _times(s, s - m).sum(1), _times(s, s - m + 1.0 - alpha * (s - m).exp())


def _policy_gradient(
    objective: Objective, teacher: TeacherSide, student: StudentSide, raised: Tensor
) -> Pair:
    """Return value (N,) and coefficients (N, D) of the mean over draws; advantages are raised by
    `raised`, (N,)."""
    used = teacher.draws.used
    advantage, weight = _advantage(teacher, student), _weight(objective, teacher, student)
    pull = advantage + raised[:, None]
    if objective.clip_range is not None:
        flat = (pull > 0) & (weight > 1.0 + objective.clip_range)
        flat |= (pull < 0) & (weight < 1.0 - objective.clip_range)
        pull = pull.masked_fill(flat, 0.0)
    num_draws = used.sum(1, keepdim=True).clamp(min=1)
    value = torch.where(used, -weight * advantage, 0.0) / num_draws
    return value.sum(1), torch.where(used, -weight * pull, 0.0) / num_draws


def _residual(
    objective: Objective, teacher: TeacherSide, student: StudentSide, gap: Tensor
) -> Pair:
    """Return value (N,) and coefficients (N, 1) of the sampled token that lies in the tail."""
    pull = _weight(objective, teacher, student) * (_advantage(teacher, student) - gap[:, None])
    draw = torch.where(teacher.draws.used, -pull, 0.0)
    return draw.sum(1), draw


def _tail_samples(t: Tensor, s: Tensor, teacher: TeacherSide, student: StudentSide) -> Coefficients:
    used = teacher.draws.used
    value, kept = _forward(t[:, :-1], s[:, :-1])
    share = t[:, -1:].exp() / used.sum(1, keepdim=True).clamp(min=1)
    counted = used & (share > 0)
    gap = torch.where(counted, _advantage(teacher, student), 0.0)
    return Coefficients(
        value + (share * gap).sum(1),
        torch.nn.functional.pad(kept, (0, 1)),
        torch.where(counted, -share, 0.0),
    )


def _advantage(teacher: TeacherSide, student: StudentSide) -> Tensor:
    return teacher.draws.teacher_logprob.to(student.draw.dtype) - student.draw


def _weight(objective: Objective, teacher: TeacherSide, student: StudentSide) -> Tensor:
    """Return the importance weights (N, D); `TeacherSide` has seen that none is unknown."""
    behaviour = teacher.draws.behaviour_logprob
    if objective.importance == "none" or behaviour is None:
        return torch.ones_like(student.draw)
    cap, bounds = objective.importance_cap, objective.importance_range
    return ratio_weight(student.draw, behaviour, objective.importance, cap, bounds)


def _times(log_mass: Tensor, x: Tensor) -> Tensor:
    """Return exp(log_mass) x; where there is no mass exactly 0, whatever x is."""
    return torch.where(log_mass == -math.inf, 0.0, log_mass.exp() * x)


def _mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """Return the log masses of `weight` p + (1 - `weight`) q."""
    return torch.logaddexp(p + math.log(weight), q + math.log1p(-weight))


def _where(scored: Tensor, pair: Pair) -> Pair:
    """Return both with 0 at positions where the teacher scored no token."""
    value, bucket = pair
    return torch.where(scored, value, 0.0), torch.where(scored[:, None], bucket, 0.0)
