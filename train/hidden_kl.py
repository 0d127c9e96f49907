"""How much forward KL the tail bucket can hide at each position: a certificate from the cache and
the student's logits."""

# Shapes: N positions, K kept teacher entries, V vocabulary.

import math

import torch
from torch import Tensor

from stillroom.train.target import TeacherBuckets

ENTRY_ROUNDING = 2.0**-11
"""A float16 logprob is this much of its size away from the true one, at most."""


@torch.no_grad()
def hidden_kl_bound(logits: Tensor, buckets: TeacherBuckets) -> Tensor:
    """The most by which the full-vocabulary KL(teacher, student) can exceed that over buckets.

        hidden = t_tail * KL(t within the tail || s within the tail)
              <= t_tail * max(0, lse_tail - min_tail - max(0, log(t_tail / t_last)))

    lse_tail and min_tail are the logsumexp and the least of the student's logits of the tail: their
    difference bounds the cross-entropy. t_last is the least kept entry, which no token of the tail
    exceeds: that bounds the teacher's entropy from below. Holds for any teacher whose kept entries
    are its likeliest tokens, up to the rounding of the stored t_tail, 2^-11 of its logarithm.

    Args:
        logits: (N, V) float32 or float64, already divided by the temperature.
        buckets: of the same N positions and the same V.

    Returns:
        (N,) nats, of the dtype of the logits; 0 where there is no tail or no scored token.
    """
    num_rows, vocab_size = logits.shape
    inside = buckets.exists.new_zeros(num_rows, vocab_size + 1)
    inside = inside.scatter(1, buckets.token_id, True)[:, :vocab_size]
    lse = logits.masked_fill(inside, -math.inf).logsumexp(1)
    cross_entropy = lse - logits.masked_fill(inside, math.inf).amin(1)
    tail = buckets.logprob[:, -1]
    entries = buckets.logprob[:, :-1].masked_fill(~buckets.exists[:, :-1], math.inf)
    entries[:, buckets.num_kept :] = math.inf  # neither the sampled token nor extras are entries
    least = entries.amin(1) * (1 - ENTRY_ROUNDING)
    entropy = (tail - least).clamp(min=0).to(logits.dtype)
    bound = tail.exp().to(logits.dtype) * (cross_entropy - entropy).clamp(min=0)
    hides = buckets.exists[:, :-1].any(1) & buckets.exists[:, -1] & (tail > -math.inf)
    return torch.where(hides, bound, 0.0)
