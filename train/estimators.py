"""Estimators of KL divergences from sampled tokens: the plain, readable reference.

Their *value* is what is logged; their *gradient*, found by autograd, is that of a surrogate whose
expectation over the draws is the gradient of the full-vocabulary divergence (with full importance
weights, and draws from a policy that could have drawn every token). The buckets that they use hold
the teacher's kept entries and one tail, never what was drawn: buckets that depend on the draw would
bias them.
"""

# Shapes: T positions, D draws of a position (1 or M), V vocabulary.

from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.train.draws import Draws, check_tail_draws, extra_draws, sampled_draws
from stillroom.train.importance import draw_weight
from stillroom.train.objective import DIVERGENCES, Objective
from stillroom.train.objectives import divergence, kl_terms
from stillroom.train.student_buckets import masses, token_logprob, true_columns
from stillroom.train.target import TeacherBuckets, TeacherTarget, teacher_buckets

Estimator = Callable[..., Tensor]


def objective_loss(
    student_logits: Tensor,
    target: TeacherTarget,
    objective: Objective,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The loss of an objective at each position, without its share of cross-entropy.

    Args:
        student_logits: (T, V) float, before temperature.
        target: teacher values at that temperature, with what the kind needs (docs/objectives.md).
        objective: which loss.
        temperature: divides the logits, > 0.
        vocab_size: V without padding of the output head. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats. Masked positions are never read, and 0.

    Raises:
        StillroomError: as the functions of the kinds do.
    """
    if objective.kind in DIVERGENCES:
        kind, param, mode = objective.kind, objective.param, objective.mode
        return divergence(
            student_logits, target, kind, param, mode, temperature, vocab_size=vocab_size
        )
    estimator = _ESTIMATORS[objective.kind]
    return estimator(student_logits, target, objective, temperature, vocab_size=vocab_size)


def policy_gradient(
    student_logits: Tensor,
    target: TeacherTarget,
    objective: Objective,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Reverse KL from the one sampled token y, with the current student's advantage A.

        A = log t_y - log s_y;  value -w A;  gradient -w (A - c) grad log s_y

    With full weights w both are unbiased for KL(s || t). Clipping (`clip_range` e) takes the
    gradient out where PPO's min(w (A - c), clip(w, 1 - e, 1 + e) (A - c)) is flat; the value stays.
    c is 0, or with `baseline` minus the reverse KL over kept entries and tail.

    Args:
        student_logits: (T, V) float, before temperature.
        target: teacher values at that temperature, and behaviour logprobs unless weights are
            "none". Those are compared with the student at `temperature`, whatever temperature the
            draws were made at.
        objective: weights, clip and baseline.
        temperature: divides the logits, > 0.
        vocab_size: V without padding of the output head. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats. Masked positions are never read, and 0.

    Raises:
        MismatchError: if the target lacks what is needed.
        NumericsError: if the teacher gives a draw no probability, or a weight is unknown.
        StillroomError: if a scored row of the target is unusable, see `teacher_buckets`.
    """
    logits = true_columns(student_logits, len(target), temperature, vocab_size)
    return _policy_gradient(logits, target, sampled_draws(target), objective, temperature)


def multi_sample_policy_gradient(
    student_logits: Tensor,
    target: TeacherTarget,
    objective: Objective,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Mean of `policy_gradient` over the extra ids: M draws from the behaviour policy.

    Draws count as often as they come; unused ones are left out of the mean, and a position without
    any has no loss. The sampled token is not among them.

    Args, returns and errors are those of `policy_gradient`.
    """
    logits = true_columns(student_logits, len(target), temperature, vocab_size)
    draws = extra_draws(target, "the student's draws (extra_kind student)")
    return _policy_gradient(logits, target, draws, objective, temperature)


def reverse_kl_rb(
    student_logits: Tensor,
    target: TeacherTarget,
    objective: Objective,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Reverse KL, exact over kept entries and tail, with the rest from the sampled token y if it is
    in the tail (Rao-Blackwellised).

        value     KL_bucket(s || t) + [y in tail] w (c - A),  c = log t_tail - log s_tail
        gradient  grad KL_bucket - [y in tail] w (A - c) grad log s_y

    With full weights w both are unbiased for KL(s || t), whatever mass is stored for the tail; it
    is taken to be at least 1e-8. A and w are those of `policy_gradient`, as are the arguments and
    errors; teacher masses are not scaled to sum to 1.
    """
    logits = true_columns(student_logits, len(target), temperature, vocab_size)
    buckets = teacher_buckets(
        target, logits.shape[1], floor_tail=True, normalise=False, kept_only=True
    )
    both = masses(logits, buckets, temperature)
    bucketed = both.spread(kl_terms(both.student, both.teacher).sum(1), len(target))
    tail_gap = both.spread((both.teacher - both.student).detach()[:, -1], len(target))
    in_tail = target.mask & (buckets.sampled_column == buckets.token_id.shape[1])
    draws = sampled_draws(target).where(in_tail[:, None])
    logprob, advantage, weight = _weighted(logits, target, draws, objective, temperature)
    pull = weight * torch.where(draws.used, advantage - tail_gap[:, None], 0.0)
    residual = _logged(-pull, -pull * logprob).sum(1)
    return bucketed + residual


def forward_kl_tail_samples(
    student_logits: Tensor,
    target: TeacherTarget,
    objective: Objective | None = None,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Forward KL from kept entries U and m draws v from the teacher's tail (the extra ids).

        sum_U t_v (log t_v - log s_v) + (t_tail / m) sum_draws (log t_v - log s_v)

    Unbiased for KL(t || s) in value and gradient; draws need no weights. Over U and the tail the
    teacher's masses are scaled to sum to 1, as in `divergence`.

    Args:
        student_logits: (T, V) float, before temperature.
        target: teacher values at that temperature, with extra ids drawn from the tail.
        objective: has no setting that this takes.
        temperature: divides the logits, > 0.
        vocab_size: V without padding of the output head. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats; may be negative. Masked positions are never
        read, and 0.

    Raises:
        MismatchError: if the target has no draws, or draws that are not from the tail.
        StillroomError: if a scored row of the target is unusable, see `teacher_buckets`.
    """
    logits = true_columns(student_logits, len(target), temperature, vocab_size)
    draws = extra_draws(target, "the teacher's draws (extra_kind tail)")
    buckets = teacher_buckets(target, logits.shape[1], kept_only=True)
    check_tail_draws(draws, target, buckets)
    both = masses(logits, buckets, temperature)
    kept_terms = kl_terms(both.teacher[:, :-1], both.student[:, :-1]).sum(1)
    logprob = token_logprob(logits, draws.token_id, draws.used, temperature)
    num_draws = draws.used.sum(1).clamp(min=1)
    share = buckets.logprob[:, -1].exp().to(logprob.dtype) / num_draws
    counted = draws.used & (share > 0)[:, None]
    gap = torch.where(counted, draws.teacher_logprob.to(logprob.dtype) - logprob, 0.0)
    return both.spread(kept_terms, len(target)) + share * gap.sum(1)


def _policy_gradient(
    logits: Tensor, target: TeacherTarget, draws: Draws, objective: Objective, temperature: float
) -> Tensor:
    buckets = teacher_buckets(target, logits.shape[1], floor_tail=True, kept_only=True)
    logprob, advantage, weight = _weighted(logits, target, draws, objective, temperature)
    centred = advantage
    if objective.baseline:
        centred = advantage + _reverse_kl(logits.detach(), buckets, temperature)[:, None]
    surrogate = -weight * _unclipped(centred, weight, objective.clip_range) * logprob
    each = torch.where(draws.used, _logged(-weight * advantage, surrogate), 0.0)
    return each.sum(1) / draws.used.sum(1).clamp(min=1)


def _weighted(
    logits: Tensor, target: TeacherTarget, draws: Draws, objective: Objective, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's logprobs (with gradient), advantages and weights of draws, (T, D) each;
    advantages are 0 where a draw is not used."""
    logprob = token_logprob(logits, draws.token_id, draws.used, temperature)
    advantage = draws.teacher_logprob.to(logprob.dtype) - logprob.detach()
    weight = draw_weight(target, draws, logprob.detach(), objective)
    return logprob, torch.where(draws.used, advantage, 0.0), weight


def _reverse_kl(logits: Tensor, buckets: TeacherBuckets, temperature: float) -> Tensor:
    both = masses(logits, buckets, temperature)
    return both.spread(kl_terms(both.student, both.teacher).sum(1), len(logits))


def _unclipped(advantage: Tensor, weight: Tensor, clip_range: float | None) -> Tensor:
    """Return advantages, 0 where PPO's clipped objective is flat."""
    if clip_range is None:
        return advantage
    flat = (advantage > 0) & (weight > 1.0 + clip_range)
    flat |= (advantage < 0) & (weight < 1.0 - clip_range)
    return advantage.masked_fill(flat, 0.0)


def _logged(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return `value` with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


_ESTIMATORS: dict[str, Estimator] = {
    "policy_gradient": policy_gradient,
    "multi_sample_policy_gradient": multi_sample_policy_gradient,
    "reverse_kl_rb": reverse_kl_rb,
    "forward_kl_tail_samples": forward_kl_tail_samples,
}
