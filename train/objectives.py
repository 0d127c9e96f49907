"""Divergences between a cached teacher and the student's logits: the plain, readable reference.

Teacher and student are compared on *buckets*: each token that the teacher scored, and one *tail*
bucket for the rest of the vocabulary (see `stillroom.train.target`). Merging tokens can only lower
a divergence, so a value here never exceeds that of the full distributions, and equals it where the
cache covers the vocabulary.

These functions hold several (T, V) tensors and let autograd find the gradient. Nothing is clamped.
"""

# Shapes: T positions, N scored positions, V vocabulary, B single-token buckets of a position.
# Row t of the logits is the distribution of the token that row t of the target scores.

import math

import torch
from torch import Tensor

from stillroom.cache.errors import ConfigError, MismatchError, ShapeError
from stillroom.train.objective import DIVERGENCES, PARAMETERS, Objective
from stillroom.train.student_buckets import (
    logsumexp,
    masses,
    student_bucket_logprob,
    token_logprob,
    true_columns,
)
from stillroom.train.target import TeacherTarget, teacher_buckets

__all__ = [
    "cross_entropy",
    "divergence",
    "kl_terms",
    "sampled_logprob",
    "student_bucket_logprob",
    "token_mean",
]


def divergence(
    student_logits: Tensor,
    target: TeacherTarget,
    kind: str = "forward",
    param: float | None = None,
    mode: str = "tail",
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence between teacher t and student s over buckets b, per position.

        forward:       KL(t || s) = sum_b t_b (log t_b - log s_b)
        reverse:       KL(s || t)
        jsd:           beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s
        skew:          KL(t || m),  m = alpha t + (1 - alpha) s
        skew_reverse:  KL(s || m),  m = (1 - alpha) t + alpha s
        mixed:         forward_weight KL(t || s) + (1 - forward_weight) KL(s || t)

    Where the teacher's tail is a denominator (reverse, and mixed unless forward_weight is 1) it is
    taken to be at least 1e-8. Modes say what becomes of the tail:

        tail:       one bucket more
        renorm:     left out, both sides scaled to sum to 1 without it
        zero_tail:  left out, the teacher alone scaled to sum to 1 (forward only)
        truncated:  left out of the sum, nothing scaled (forward only); may be negative

    Args:
        student_logits: (T, V) float, before temperature; half precision is computed in float32. May
            have more columns than the vocabulary (a padded head).
        target: teacher values at the temperature given here; a target cannot be re-tempered.
        kind: one of `DIVERGENCES` of `stillroom.train.objective`.
        param: beta, alpha or forward_weight, of kinds that have one; beta and alpha in (0, 1),
            forward_weight in [0, 1].
        mode: "tail", "renorm", "zero_tail" or "truncated".
        temperature: divides the logits, > 0. Gradients carry 1 / temperature; multiplying
            the loss by its square is the caller's choice.
        vocab_size: V without padding; columns from there on take no part. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats, not normalised. Masked positions are never
        read: their loss and gradient are exactly 0, also where logits or target hold NaN. So are
        those of a row in which the teacher scored no token.

    Raises:
        ConfigError: if a setting is unknown, out of range, or does not go with another.
        ShapeError: if logits and target disagree.
        StillroomError: if a scored row of the target is unusable, see `teacher_buckets`.

    Source: generalized JSD as in Agarwal et al., arXiv 2306.13649; skew divergences as in Ko et
    al., arXiv 2402.03898. Checked against enumerated buckets and the full-vocabulary divergence in
    tests/train/test_objectives.py.
    """
    _check_settings(kind, param, mode)
    logits = true_columns(student_logits, len(target), temperature, vocab_size)
    divides = kind == "reverse" or (kind == "mixed" and param != 1)
    buckets = teacher_buckets(target, logits.shape[1], floor_tail=divides and mode == "tail")
    both = masses(logits, buckets, temperature)
    t, s = _in_mode(both.teacher, both.student, mode)
    return both.spread(_terms(t, s, kind, param).sum(1), len(target))


def cross_entropy(
    student_logits: Tensor,
    target: TeacherTarget,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Minus the student's logprob of the token that was sampled, `-log s_y`, per position.

    Args:
        student_logits: (T, V) float, before temperature.
        target: only its sampled ids and mask are read.
        temperature: divides the logits, > 0.
        vocab_size: V without padding of the output head. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats; masked positions are never read, and 0.

    Raises:
        ConfigError: if the temperature is out of range.
        ShapeError: if logits and target disagree.
        MismatchError: if the id of a scored position is not below V.
    """
    logits = true_columns(student_logits, len(target), temperature, vocab_size)
    token_id, num_ids = target.sampled_id, logits.shape[1]
    outside = target.mask & ((token_id < 0) | (token_id >= num_ids))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        do = "Use the cache's vocabulary size, and mask positions that have no token."
        expected, got = f"sampled ids in 0 to {num_ids - 1}", str(int(token_id[row]))
        raise MismatchError(f"TeacherTarget row {row}", expected, got, do)
    return -token_logprob(logits, token_id[:, None], target.mask[:, None], temperature).squeeze(1)


def kl_terms(p: Tensor, q: Tensor) -> Tensor:
    """Return exp(p) (p - q); where p is -inf exactly 0, with gradient 0, whatever q is."""
    live = p > -math.inf
    p, q = torch.where(live, p, 0.0), torch.where(live, q, 0.0)
    return torch.where(live, p.exp() * (p - q), 0.0)


def token_mean(loss: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """Sum of the scored losses divided by the number of scored tokens of the whole global batch.

        sum_t mask_t loss_t / num_tokens

    Adding this up over micro-batches and ranks gives the loss of the step. Where gradients are
    averaged over ranks, multiply it by the number of ranks.

    Args:
        loss: (T,) nats.
        mask: (T,) bool; losses where it is false are not read.
        num_tokens: scored tokens of all micro-batches of all ranks; 0 only if there are none.

    Returns:
        () float, nats; 0, still connected to the graph, if nothing is scored.

    Raises:
        ShapeError: if loss and mask disagree.
        ConfigError: if num_tokens is less than 1 though positions are scored.
    """
    if loss.shape != mask.shape:
        expected, got = f"shape {tuple(loss.shape)}", str(tuple(mask.shape))
        raise ShapeError("token_mean mask", expected, got, "Pass one mask value per loss.")
    if num_tokens < 1 and bool(mask.any()):
        expected = "the number of scored tokens of the whole global batch"
        do = "Count them over all ranks and micro-batches before the first backward pass."
        raise ConfigError("token_mean num_tokens", expected, str(num_tokens), do)
    return torch.where(mask, loss, 0.0).sum() / max(num_tokens, 1)


@torch.no_grad()
def sampled_logprob(
    student_logits: Tensor,
    sampled_id: Tensor,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The student's logprob of the token that was sampled, for measuring drift; no gradient.

        log s_y = z_y / temperature - logsumexp(z / temperature)

    Args:
        student_logits: (T, V) float, before temperature.
        sampled_id: (T,) int64.
        temperature: divides the logits, > 0; the sampler's, to compare with behaviour logprobs.
        vocab_size: V without padding of the output head. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats; NaN where the id is not in the vocabulary,
        as it may be at positions that are not scored.

    Raises:
        ConfigError: if a setting is out of range.
        ShapeError: if logits and ids disagree.
    """
    logits = true_columns(student_logits, len(sampled_id), temperature, vocab_size)
    inside = (sampled_id >= 0) & (sampled_id < logits.shape[1])
    picked = token_logprob(logits, sampled_id[:, None], inside[:, None], temperature).squeeze(1)
    return picked.masked_fill(~inside, math.nan)


def _check_settings(kind: str, param: float | None, mode: str) -> None:
    """Refuse what `Objective` refuses, and the kinds that are not divergences."""
    if kind not in DIVERGENCES:
        do = "Choose one of them; estimators are in stillroom.train.estimators."
        raise ConfigError("divergence kind", f"one of {DIVERGENCES}", repr(kind), do)
    if param is not None and kind not in PARAMETERS:
        do = f"Leave it out, or choose {' or '.join(PARAMETERS)}."
        raise ConfigError(f"divergence param of kind {kind!r}", "None", repr(param), do)
    parameter = {PARAMETERS[kind]: param} if kind in PARAMETERS else {}
    Objective(kind=kind, mode=mode, **parameter)  # type: ignore[arg-type]


def _in_mode(t: Tensor, s: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Return the log masses (N, B + 1) or, without the tail, (N, B) that a mode compares."""
    if mode == "tail":
        return t, s
    t, s = t[:, :-1], s[:, :-1]
    if mode != "truncated":
        t = t - logsumexp(t)[:, None]
    if mode == "renorm":
        s = s - logsumexp(s)[:, None]
    return t, s


def _terms(t: Tensor, s: Tensor, kind: str, param: float | None) -> Tensor:
    """Return what each bucket adds to the divergence, (N, buckets), of log masses t and s."""
    if kind == "forward":
        return kl_terms(t, s)
    if kind == "reverse":
        return kl_terms(s, t)
    assert param is not None
    if kind == "jsd":
        m = _mixture(t, s, param)
        return param * kl_terms(t, m) + (1.0 - param) * kl_terms(s, m)
    if kind == "skew":
        return kl_terms(t, _mixture(t, s, param))
    if kind == "skew_reverse":
        return kl_terms(s, _mixture(s, t, param))
    weighted = [(param, t, s), (1.0 - param, s, t)]
    return sum((w * kl_terms(p, q) for w, p, q in weighted if w > 0), torch.zeros_like(t))


def _mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """Return the log masses of `weight` p + (1 - `weight`) q."""
    return logsumexp(torch.stack([p + math.log(weight), q + math.log1p(-weight)], dim=-1))
