"""Fewer rows of older policies: which of a selection's rows come in an epoch, by their lag and a
seeded hash alone."""

import math
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np

from stillroom.cache.errors import ConfigError, ShapeError
from stillroom.replay.plan import mix_bits

STATE = 0x6C6167
"""Where the hash starts, so that it is none of those that make the order."""
EXACT = Context(prec=40)
"""Decimal arithmetic gives the same digits on every machine; exp2 of a float does not."""
LN_2 = EXACT.ln(Decimal(2))


def kept_rows(
    policy: np.ndarray,
    seed: int,
    epoch: int,
    half_life: float | None,
    row_key: np.ndarray,
    newest: int,
) -> np.ndarray:
    """Indices of the rows that come in an epoch.

    A row comes with probability 2^(-lag / half_life), where its lag is how many versions it is
    behind the newest policy; rows of that one always come. An unknown policy counts as policy 0.
    Each row is decided by a hash of (seed, epoch, its key) and its lag, whatever other rows there
    are; where none would come, the row with the lowest hash among those of the least lag does.
    Where rows stay together, give a policy and a key a unit.

    Args:
        policy: (n,) integers, the policy that sampled each row; -1 if unknown.
        seed: of the order.
        epoch: its number.
        half_life: versions after which half of the rows come; None lets all come.
        row_key: (n,) integers that tell rows apart, such as their numbers in the snapshot.
        newest: the policy that lags are counted from, no older than any of the rows'; -1 if it is
            unknown.

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
    lag = _lag(policy, newest)
    lags = np.unique(lag)
    highest = np.array([_highest_hash(one, half_life) for one in lags.tolist()], np.uint64)
    hashes = _hashes(row_key, seed, epoch)
    kept = np.flatnonzero(hashes <= highest[np.searchsorted(lags, lag)])
    if len(kept) or not len(lag):
        return kept
    least = np.flatnonzero(lag == lags[0])
    return least[[hashes[least].argmin()]]


def mean_of_kept(value: np.ndarray, policy: np.ndarray, half_life: float, newest: int) -> Fraction:
    """Mean of a whole number of each row over the rows of many epochs, in which older ones come
    less often.

    Args:
        value: (n,) integers; n >= 1.
        policy: (n,) integers, as for `kept_rows`.
        half_life: in versions, likewise.
        newest: likewise.
    """
    lag, rows, total = _lag(policy, newest), 0, 0
    for one in np.unique(lag).tolist():
        of_lag, chance = value[lag == one], _highest_hash(one, half_life) + 1
        rows += chance * len(of_lag)
        total += chance * int(of_lag.sum())
    return Fraction(total, rows)


def _lag(policy: np.ndarray, newest: int) -> np.ndarray:
    """(n,) int64: versions behind the newest policy, an unknown one being policy 0."""
    return np.asarray(max(newest, 0) - np.maximum(policy, 0).astype(np.int64))


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
