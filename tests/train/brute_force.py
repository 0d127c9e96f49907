"""NumPy float64 twin of the objectives: one row at a time, buckets and draws enumerated.

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


def mixture(p: Array, q: Array, weight: float) -> Array:
    """Log masses of weight p + (1 - weight) q."""
    return np.asarray(np.logaddexp(math.log(weight) + p, math.log(1 - weight) + q))


def divergence(t: Array, s: Array, kind: str, param: float | None = None) -> float:
    """Divergence of teacher and student log masses."""
    if kind == "forward":
        return kl(t, s)
    if kind == "reverse":
        return kl(s, t)
    assert param is not None
    if kind == "skew":
        return kl(t, mixture(t, s, param))
    if kind == "skew_reverse":
        return kl(s, mixture(s, t, param))
    if kind == "mixed":
        return param * kl(t, s) + (1 - param) * kl(s, t)
    mixed = mixture(t, s, param)
    return param * kl(t, mixed) + (1 - param) * kl(s, mixed)


def pulls(t: Array, s: Array, kind: str, param: float | None = None) -> Array:
    """S_b dL/dS_b for each bucket b."""
    if kind == "forward":
        return np.asarray(-np.exp(t))
    if kind == "reverse":
        return np.asarray(np.exp(s) * (s - t + 1))
    assert param is not None
    if kind == "skew":
        return np.asarray(-(1 - param) * np.exp(t + s - mixture(t, s, param)))
    if kind == "skew_reverse":
        mixed = mixture(s, t, param)
        return np.asarray(np.exp(s) * (s - mixed + 1 - param * np.exp(s - mixed)))
    if kind == "mixed":
        return param * pulls(t, s, "forward") + (1 - param) * pulls(t, s, "reverse")
    return np.asarray((1 - param) * np.exp(s) * (s - mixture(t, s, param)))


def in_mode(t: Array, s: Array, mode: str, num_own: int) -> tuple[Array, Array]:
    """What a mode compares of log masses whose first `num_own` are those of single tokens."""
    if mode == "tail":
        return t, s
    t, s = t[:num_own], s[:num_own]
    if mode != "truncated":
        t = t - np.logaddexp.reduce(t)
    if mode == "renorm":
        s = s - np.logaddexp.reduce(s)
    return t, s


def gradient(
    t: Array,
    logits: Array,
    buckets: Partition,
    kind: str,
    param: float | None = None,
    temperature: float = 1.0,
    mode: str = "tail",
    num_own: int = 0,
) -> Array:
    """Closed-form gradient of the divergence by the student's logits.

    With a_b = S_b dL/dS_b:  dL/dz_v = (a_b(v) s_v / S_b(v) - s_v sum_b a_b) / temperature,
    s being the softmax over single tokens alone where both sides are renormalised.
    """
    logprob = log_softmax(logits / temperature)
    if mode == "renorm":
        own = [bucket[0] for bucket in buckets[:num_own]]
        logprob = np.full_like(logits, -math.inf)
        logprob[own] = log_softmax(logits[own] / temperature)
    merged = merge(logprob, buckets)
    a = pulls(*in_mode(t, merged, mode, num_own), kind, param)
    result = -a.sum() * np.exp(logprob)
    for bucket, pull, mass in zip(buckets, a, merged, strict=False):
        result[bucket] += pull * np.exp(logprob[bucket] - mass)
    return np.asarray(result / temperature, dtype=np.float64)


def score(logits: Array, token: int, temperature: float = 1.0) -> Array:
    """Gradient of log s_token by the student's logits."""
    result = -np.exp(log_softmax(logits / temperature))
    result[token] += 1
    return np.asarray(result / temperature, dtype=np.float64)


def weight(
    log_ratio: float, kind: str, cap: float = 2.0, bounds: tuple[float, float] = (0.5, 5.0)
) -> float:
    """Importance weight of a draw."""
    ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
    kinds = {
        "none": 1.0,
        "full": ratio,
        "tis": min(ratio, cap),
        "icepop": ratio if bounds[0] <= ratio <= bounds[1] else 0.0,
    }
    return kinds[kind]


def policy_gradient(
    logits: Array,
    draws: list[tuple[int, float, float]],
    clip: float | None = None,
    baseline: float = 0.0,
    temperature: float = 1.0,
) -> tuple[float, Array]:
    """Value and gradient of the mean over draws (token, log t, weight)."""
    s = log_softmax(logits / temperature)
    value, result = 0.0, np.zeros_like(logits)
    for token, log_t, w in draws:
        advantage = log_t - s[token]
        value -= w * advantage
        centred = advantage - baseline
        unclipped, clipped = w * centred, centred
        if clip is not None:
            clipped = min(max(w, 1 - clip), 1 + clip) * centred
        if clip is None or unclipped <= clipped:
            result -= w * centred * score(logits, token, temperature)
    return value / max(len(draws), 1), result / max(len(draws), 1)


def reverse_kl_rb(
    t: Array,
    logits: Array,
    buckets: Partition,
    draw: tuple[int, float, float],
    temperature: float = 1.0,
) -> tuple[float, Array]:
    """Value and gradient from buckets (log masses t), the last a tail, and a draw (token, log t,
    w)."""
    s = log_softmax(logits / temperature)
    merged = merge(s, buckets)
    value = kl(merged, t)
    result = gradient(t, logits, buckets, "reverse", None, temperature)
    token, log_t, w = draw
    if token in buckets[-1]:
        gap = (log_t - s[token]) - (t[-1] - merged[-1])
        value -= w * gap
        result = result - w * gap * score(logits, token, temperature)
    return value, result


def forward_kl_tail_samples(
    t: Array,
    logits: Array,
    kept: list[int],
    draws: list[tuple[int, float]],
    temperature: float = 1.0,
) -> tuple[float, Array]:
    """Value and gradient from kept entries and tail (log masses t) and draws (token, log t)."""
    s = log_softmax(logits / temperature)
    target = np.zeros_like(logits)
    target[kept] = np.exp(t[: len(kept)])
    value = float((target[kept] * (t[: len(kept)] - s[kept])).sum())
    for token, log_t in draws:
        share = math.exp(t[-1]) / len(draws)
        target[token] += share
        value += share * (log_t - s[token])
    return value, np.asarray((np.exp(s) * target.sum() - target) / temperature)


def stored_masses(
    entries: list[tuple[int, float]],
    tail: float,
    vocab_size: int,
    log_floor: float = -math.inf,
    *,
    num_drawn: int = 1,
    normalise: bool = True,
) -> dict[int, float]:
    """Return token -> log mass (tail: -1) from stored (id, logprob).

    The last `num_drawn` entries are the sampled token and extra ids: what they have of their own
    leaves the tail.
    """
    mass: dict[int, float] = {}
    left = tail
    for index, (token, logprob) in enumerate(entries):
        if token < 0 or token in mass or logprob == -math.inf:
            continue
        mass[token] = min(logprob, 0.0)
        if index >= len(entries) - num_drawn:
            ratio = math.exp(mass[token] - left) if left > -math.inf else math.inf
            left = left + math.log1p(-ratio) if ratio < 1 else -math.inf
    if not mass:
        return {-1: 0.0}
    if len(mass) < vocab_size:
        mass[-1] = max(left, log_floor)
    if not normalise:
        return mass
    log_total = math.log(math.fsum(math.exp(value) for value in mass.values()))
    return {token: value - log_total for token, value in mass.items()}
