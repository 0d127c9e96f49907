"""NumPy float64 twin of the cached-teacher divergences: one row at a time, buckets enumerated.

Written from the definitions, and on purpose without anything from `stillroom.train`. A *partition*
is a list of lists of token ids: one list per bucket, the tail last if there is one.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Partition = list[list[int]]


def log_softmax(logits: Array) -> Array:
    """Return log probabilities of one row of logits."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.logaddexp.reduce(shifted), dtype=np.float64)


def partition(tokens: list[int], vocab_size: int) -> Partition:
    """Give each of `tokens` a bucket of its own, and the rest of the vocabulary one together."""
    own = list(dict.fromkeys(tokens))
    rest = [v for v in range(vocab_size) if v not in own]
    return [[v] for v in own] + ([rest] if rest else [])


def merge(logprob: Array, buckets: Partition) -> Array:
    """Return the log mass of each bucket."""
    return np.array([np.logaddexp.reduce(logprob[bucket]) for bucket in buckets])


def floored(log_mass: Array, log_floor: float) -> Array:
    """Raise the last mass to a floor, then normalise."""
    log_mass = log_mass.copy()
    log_mass[-1] = max(log_mass[-1], log_floor)
    return np.asarray(log_mass - np.logaddexp.reduce(log_mass), dtype=np.float64)


def kl(p: Array, q: Array) -> float:
    """KL of log masses, with 0 log 0 = 0."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -math.inf)


def divergence(t: Array, s: Array, kind: str, beta: float | None = None) -> float:
    """Divergence of teacher and student log masses."""
    if kind == "forward":
        return kl(t, s)
    if kind == "reverse":
        return kl(s, t)
    assert beta is not None
    mixed = np.logaddexp(math.log(beta) + t, math.log(1 - beta) + s)
    return beta * kl(t, mixed) + (1 - beta) * kl(s, mixed)


def gradient(
    t: Array,
    logits: Array,
    buckets: Partition,
    kind: str,
    beta: float | None = None,
    temperature: float = 1.0,
) -> Array:
    """Closed-form gradient of the divergence by the student's logits.

    With a_b = S_b dL/dS_b:  dL/dz_v = (a_b(v) s_v / S_b(v) - s_v sum_b a_b) / temperature.
    """
    logprob = log_softmax(logits / temperature)
    s = merge(logprob, buckets)
    if kind == "forward":
        a = -np.exp(t)
    elif kind == "reverse":
        a = np.exp(s) * (s - t + 1)
    else:
        assert beta is not None
        mixed = np.logaddexp(math.log(beta) + t, math.log(1 - beta) + s)
        a = (1 - beta) * np.exp(s) * (s - mixed)
    result = -a.sum() * np.exp(logprob)
    for index, bucket in enumerate(buckets):
        result[bucket] += a[index] * np.exp(logprob[bucket] - s[index])
    return np.asarray(result / temperature, dtype=np.float64)


def stored_masses(
    entries: list[tuple[int, float]], tail: float, vocab_size: int, log_floor: float = -math.inf
) -> dict[int, float]:
    """Return token -> log mass (tail: -1) from stored (id, logprob), the sampled token's last."""
    mass: dict[int, float] = {}
    for token, logprob in entries[:-1]:
        if token >= 0 and logprob > -math.inf and token not in mass:
            mass[token] = min(logprob, 0.0)
    sampled, logprob = entries[-1]
    if sampled not in mass and logprob > -math.inf:
        mass[sampled] = min(logprob, 0.0)
        ratio = math.exp(mass[sampled] - tail) if tail > -math.inf else math.inf
        tail = tail + math.log1p(-ratio) if ratio < 1 else -math.inf
    if not mass:
        return {-1: 0.0}
    if len(mass) < vocab_size:
        mass[-1] = max(tail, log_floor)
    log_total = math.log(math.fsum(math.exp(value) for value in mass.values()))
    return {token: value - log_total for token, value in mass.items()}
