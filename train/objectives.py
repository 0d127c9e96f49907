"""Divergences between a cached teacher and the student's logits: the plain, readable reference.

Teacher and student are compared on *buckets*: each token that the teacher scored, and one *tail*
bucket for the rest of the vocabulary (see `stillroom.train.target`). Merging tokens can only lower
a divergence, so a value here never exceeds that of the full distributions, and equals it where the
cache covers the vocabulary.

These functions hold several (T, V) tensors and let autograd find the gradient. Nothing is clamped.
"""

# Shapes: T positions, K kept teacher entries, N scored positions, V vocabulary.
# Row t of the logits is the distribution of the token that row t of the target scores.

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.cache.errors import ConfigError, ShapeError
from stillroom.train.target import TeacherBuckets, TeacherTarget, teacher_buckets

KINDS = ("forward", "reverse", "jsd")
MODES = ("tail",)


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

        forward:  sum_b t_b (log t_b - log s_b)
        reverse:  sum_b s_b (log s_b - log t_b), the teacher's tail taken to be at least 1e-8
        jsd:      beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s

    Args:
        student_logits: (T, V) float, before temperature; half precision is computed in float32. May
            have more columns than the vocabulary (a padded head).
        target: teacher values at the temperature given here; a target cannot be re-tempered.
        kind: "forward", "reverse" or "jsd".
        param: for "jsd" beta, the teacher's weight, in (0, 1); None for the others.
        mode: "tail", what becomes of the teacher mass outside the cached tokens: a bucket.
        temperature: divides the logits, > 0. Gradients carry 1 / temperature; multiplying
            the loss by its square is the caller's choice.
        vocab_size: V without padding; columns from there on take no part. None: all columns.

    Returns:
        (T,) float32 (float64 for float64 logits), nats, not normalised. Masked positions are never
        read: their loss and gradient are exactly 0, also where logits or target hold NaN. So are
        those of a row in which the teacher scored no token.

    Raises:
        ConfigError: if a setting is unknown or out of range.
        ShapeError: if logits and target disagree.
        StillroomError: if a scored row of the target is unusable, see `teacher_buckets`.

    Source: generalized JSD as in Agarwal et al., arXiv 2306.13649. Checked against enumerated
    buckets and the full-vocabulary divergence in tests/train/test_objectives.py.
    """
    terms = _terms(kind, param, mode)
    logits = _true_columns(student_logits, target.sampled_id, temperature, vocab_size)
    buckets = teacher_buckets(target, logits.shape[1], floor_tail=kind == "reverse")
    scored = buckets.exists[:, :-1].any(1).nonzero().squeeze(1)
    student = student_bucket_logprob(_widen(logits[scored]) / temperature, buckets.select(scored))
    loss = terms(buckets.logprob[scored].to(student.dtype), student).sum(1)
    return loss.new_zeros(len(target)).index_copy(0, scored, loss)


def student_bucket_logprob(logits: Tensor, buckets: TeacherBuckets) -> Tensor:
    """Log of the student's mass in each bucket of the teacher.

    The tail is summed over its own logits. One minus the other masses would lose all digits
    in float32 once the tail is below 1e-6, which is where its gradient matters.

    Args:
        logits: (N, V) float32 or float64, already divided by the temperature.
        buckets: of the same N positions and the same V.

    Returns:
        (N, K + 2) nats; -inf where a bucket does not exist. Sums to 1 in probability.
    """
    num_rows, vocab_size = logits.shape
    logits = logits - logits.detach().amax(1, keepdim=True)
    in_support = buckets.exists.new_zeros(num_rows, vocab_size + 1)
    in_support = in_support.scatter(1, buckets.token_id, True)[:, :vocab_size]
    tail_lse = _logsumexp(logits.masked_fill(in_support, -math.inf))
    support = logits.gather(1, buckets.token_id.clamp(max=vocab_size - 1))
    support = support.masked_fill(~buckets.exists[:, :-1], -math.inf)
    unnormalised = torch.cat([support, tail_lse[:, None]], dim=1)
    return unnormalised - _logsumexp(unnormalised)[:, None]


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
    logits = _true_columns(student_logits, sampled_id, temperature, vocab_size)
    outside = (sampled_id < 0) | (sampled_id >= logits.shape[1])
    logprob = (_widen(logits) / temperature).log_softmax(1)
    picked = logprob.gather(1, sampled_id.masked_fill(outside, 0)[:, None]).squeeze(1)
    return picked.masked_fill(outside, math.nan)


def _terms(kind: str, param: float | None, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function of log masses t, s (both (N, K + 2)) whose sum over dim 1 is the loss."""
    if mode not in MODES:
        do = "Leave mode at 'tail': it keeps the mass outside the cached tokens as one bucket."
        raise ConfigError("divergence mode", _one_of(MODES), repr(mode), do)
    if kind not in KINDS:
        raise ConfigError("divergence kind", _one_of(KINDS), repr(kind), "Choose one of them.")
    if kind == "jsd":
        beta = _check_beta(param)
        return lambda t, s: _jsd_terms(t, s, beta)
    if param is not None:
        do = "Leave it out, or choose kind='jsd'."
        raise ConfigError(f"divergence param of kind {kind!r}", "None", repr(param), do)
    if kind == "forward":
        return _kl_terms
    return lambda t, s: _kl_terms(s, t)


def _check_beta(param: float | None) -> float:
    if param is None or not 0.0 < param < 1.0:
        expected = "beta, the teacher's weight, inside (0, 1)"
        do = "At 0 and 1 it is 0 for any student; use kind='forward' or kind='reverse' instead."
        raise ConfigError("divergence param of kind 'jsd'", expected, repr(param), do)
    return param


def _kl_terms(p: Tensor, q: Tensor) -> Tensor:
    """Return exp(p) (p - q); where p is -inf exactly 0, with gradient 0, whatever q is."""
    live = p > -math.inf
    p, q = torch.where(live, p, 0.0), torch.where(live, q, 0.0)
    return torch.where(live, p.exp() * (p - q), 0.0)


def _jsd_terms(t: Tensor, s: Tensor, beta: float) -> Tensor:
    mixed = _logsumexp(torch.stack([t + math.log(beta), s + math.log1p(-beta)], dim=-1))
    return beta * _kl_terms(t, mixed) + (1.0 - beta) * _kl_terms(s, mixed)


def _logsumexp(x: Tensor) -> Tensor:
    """Return logsumexp over the last dim; where all are -inf, -inf with gradient 0, not NaN."""
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top > -math.inf, top, 0.0)
    total = (x - top).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, -math.inf, torch.where(empty, 1.0, total).log() + top.squeeze(-1))


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _true_columns(
    student_logits: Tensor, sampled_id: Tensor, temperature: float, vocab_size: int | None
) -> Tensor:
    """Check logits (T, V or more) and temperature, and drop the columns of a padded head."""
    if not 0.0 < temperature < math.inf:
        do = "Use the temperature of the cache."
        raise ConfigError("temperature", "a finite number above 0", repr(temperature), do)
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[:1] != tuple(sampled_id.shape):
        do = "Flatten batch and time, and drop the logits that predict no scored token."
        raise ShapeError("student_logits", f"shape ({sampled_id.shape[0]}, V)", str(shape), do)
    if vocab_size is not None and not 0 < vocab_size <= shape[1]:
        do = "Use the vocabulary size of the cache's identity."
        raise ShapeError("student_logits", f"at least {vocab_size} columns", str(shape), do)
    return student_logits[:, :vocab_size]


def _one_of(names: tuple[str, ...]) -> str:
    return " or ".join(repr(name) for name in names)
