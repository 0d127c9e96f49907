"""The student's side of a comparison: its checked logits, and its masses in the teacher's buckets.

Padded columns are dropped, masked rows never read, half precision is computed in float32. Autograd
finds the gradients.
"""

# Shapes: T positions, N of them that are compared, V vocabulary, B single-token buckets, D draws.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.cache.errors import ConfigError, ShapeError
from stillroom.train.target import TeacherBuckets


class Masses(NamedTuple):
    """Log masses of both sides at the N positions where the teacher scored a token."""

    row: Tensor
    """(N,) int64, their positions."""
    teacher: Tensor
    """(N, B + 1) nats, of the student's dtype."""
    student: Tensor
    """(N, B + 1) nats, with gradient; -inf where a bucket does not exist."""

    def spread(self, value: Tensor, num_rows: int) -> Tensor:
        """Return `value` (N,) at all T positions, 0 at those that are not compared."""
        return value.new_zeros(num_rows).index_copy(0, self.row, value)


def true_columns(
    student_logits: Tensor, num_rows: int, temperature: float, vocab_size: int | None
) -> Tensor:
    """Check logits (T, V or more) and temperature, and drop the columns of a padded head.

    Raises:
        ConfigError: if the temperature is not a finite number above 0.
        ShapeError: if the logits do not have T rows and at least `vocab_size` columns.
    """
    if not 0.0 < temperature < math.inf:
        do = "Use the temperature of the cache."
        raise ConfigError("temperature", "a finite number above 0", repr(temperature), do)
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[0] != num_rows:
        do = "Flatten batch and time, and drop the logits that predict no scored token."
        raise ShapeError("student_logits", f"shape ({num_rows}, V)", str(shape), do)
    if vocab_size is not None and not 0 < vocab_size <= shape[1]:
        do = "Use the vocabulary size of the cache's identity."
        raise ShapeError("student_logits", f"at least {vocab_size} columns", str(shape), do)
    return student_logits[:, :vocab_size]


def widen(logits: Tensor) -> Tensor:
    """Return float64 logits as they are, others as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def masses(logits: Tensor, buckets: TeacherBuckets, temperature: float) -> Masses:
    """Return the log masses of both sides where the teacher scored a token.

    Args:
        logits: (T, V), before temperature, of any precision.
        buckets: of the same T positions and the same V.
        temperature: divides the logits.
    """
    row = buckets.exists[:, :-1].any(1).nonzero().squeeze(1)
    student = student_bucket_logprob(widen(logits[row]) / temperature, buckets.select(row))
    return Masses(row, buckets.logprob[row].to(student.dtype), student)


def student_bucket_logprob(logits: Tensor, buckets: TeacherBuckets) -> Tensor:
    """Log of the student's mass in each bucket of the teacher.

    The tail is summed over its own logits. One minus the other masses would lose all digits
    in float32 once the tail is below 1e-6, which is where its gradient matters.

    Args:
        logits: (N, V) float32 or float64, already divided by the temperature.
        buckets: of the same N positions and the same V.

    Returns:
        (N, B + 1) nats; -inf where a bucket does not exist. Sums to 1 in probability.
    """
    num_rows, vocab_size = logits.shape
    logits = logits - logits.detach().amax(1, keepdim=True)
    in_support = buckets.exists.new_zeros(num_rows, vocab_size + 1)
    in_support = in_support.scatter(1, buckets.token_id, True)[:, :vocab_size]
    tail_lse = logsumexp(logits.masked_fill(in_support, -math.inf))
    support = logits.gather(1, buckets.token_id.clamp(max=vocab_size - 1))
    support = support.masked_fill(~buckets.exists[:, :-1], -math.inf)
    unnormalised = torch.cat([support, tail_lse[:, None]], dim=1)
    return unnormalised - logsumexp(unnormalised)[:, None]


def token_logprob(
    logits: Tensor, token_id: Tensor, used: Tensor, temperature: Tensor | float
) -> Tensor:
    """The student's logprobs of given tokens, `log s_v = z_v / temperature - logsumexp(...)`.

    Args:
        logits: (T, V), before temperature, of any precision.
        token_id: (T, D) int64, below V where used.
        used: (T, D) bool; rows without any are not read.
        temperature: divides the logits; (T,) or one for all.

    Returns:
        (T, D) nats, with gradient; exactly 0 where not used.
    """
    row = used.any(1).nonzero().squeeze(1)
    if isinstance(temperature, Tensor):
        temperature = temperature[row, None]
    logprob = (widen(logits[row]) / temperature).log_softmax(1)
    picked = logprob.gather(1, token_id.masked_fill(~used, 0)[row])
    spread = picked.new_zeros(token_id.shape).index_copy(0, row, picked)
    return torch.where(used, spread, 0.0)


def logsumexp(x: Tensor) -> Tensor:
    """Return logsumexp over the last dim; where all are -inf, -inf with gradient 0, not NaN."""
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top > -math.inf, top, 0.0)
    total = (x - top).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, -math.inf, torch.where(empty, 1.0, total).log() + top.squeeze(-1))
