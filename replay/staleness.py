"""Fewer rows of older policies: which of a selection's rows come in an epoch, by their lag and a
seeded hash alone."""

import math
from decimal import Context, Decimal

import numpy as np

from stillroom.cache.errors import ConfigError, ShapeError
from stillroom.replay.plan import mix_bits

STATE = 0x6C6167
"""Where the hash starts, so that it is none of those that make the order."""
EXACT = Context(prec=40)
"""Decimal arithmetic gives the same digits on every machine; exp2 of a float does not."""
LN_2 = EXACT.ln(Decimal(2))


def kept_rows(
    policy: np.ndarray, seed: int, epoch: int, half_life: float | None, row_key: np.ndarray
) -> np.ndarray:
    """Indices of the rows that come in an epoch.

    A row comes with probability 2^(-lag / half_life), where its lag is how many versions it is
    behind the newest policy given; rows of the newest one always come. An unknown policy counts as
    policy 0. Each row is decided by a hash of (seed, epoch, its key) and its lag, whatever other
    rows there are. Where rows stay together, give a policy and a key a unit.

    Args:
        policy: (n,) integers, the policy that sampled each row; -1 if unknown.
        seed: of the order.
        epoch: its number.
        half_life: versions after which half of the rows come; None lets all come.
        row_key: (n,) integers that tell rows apart, such as their numbers in the snapshot.

    Returns:
        int64, ascending; at least one where n is.

    Raises:
        ConfigError: the half-life is not a finite number above 0.
        ShapeError: the arrays differ in length.
    """
    if policy.shape != row_key.shape:
        got = f"{policy.shape} and {row_key.shape}"
        raise ShapeError("policy and row_key", "equal shapes", got, "Give one key a policy.")
    if half_life is None:
        return np.arange(len(policy))
    if not 0 < half_life < math.inf:
        do = "Change it, or leave it out."
        raise ConfigError("replay.lag_half_life", "a finite number above 0", f"{half_life}", do)
    version = np.maximum(policy, 0).astype(np.int64)
    lag = version.max(initial=0) - version
    lags = np.unique(lag)
    highest = np.array([_highest_hash(one, half_life) for one in lags.tolist()], np.uint64)
    is_kept = _hashes(row_key, seed, epoch) <= highest[np.searchsorted(lags, lag)]
    return np.flatnonzero(is_kept)


def _highest_hash(lag: int, half_life: float) -> int:
    """The highest hash that lets a row of this lag come."""
    exponent = EXACT.divide(EXACT.multiply(Decimal(-lag), LN_2), Decimal(half_life))
    share = EXACT.multiply(EXACT.exp(exponent), Decimal(2**64))
    return max(int(share.to_integral_value()) - 1, 0)


def _hashes(row_key: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    state = np.array(STATE, np.uint64)
    with np.errstate(over="ignore"):
        for word in (seed, epoch):
            state = mix_bits(state ^ np.uint64(word % 2**64))
        return mix_bits(state ^ row_key.astype(np.uint64))
