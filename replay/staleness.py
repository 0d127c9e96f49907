"""Fewer rows of older policies: which of a selection's rows come in an epoch, by their lag and a
seeded hash alone."""

import math
from collections.abc import Sequence
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
CHANCES = 2**64
"""Hashes that a row may have, each as likely as any other."""


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
    behind the newest policy; rows of that one, and of an unknown one, always come. Each row is
    decided by a hash of (seed, epoch, its key) and its lag, whatever other rows there are; where
    none would come, the row with the lowest hash among those of the least lag does.
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


def expected_rows(policy: np.ndarray, half_life: float, newest: int) -> Fraction:
    """How many rows come in an epoch, on average; the one that comes where chance leaves none is
    not counted.

    Args:
        policy: (n,) integers, as for `kept_rows`.
        half_life: in versions, likewise.
        newest: likewise.
    """
    found = _of_lags(np.ones(len(policy), np.int64), policy, half_life, newest)
    return Fraction(sum(chance * rows for chance, rows, _ in found), CHANCES)


def mean_of_kept(value: np.ndarray, policy: np.ndarray, half_life: float, newest: int) -> Fraction:
    """Mean of a whole number of each row over the rows of many epochs, in which older ones come
    less often.

    Args:
        value: (n,) integers >= 0 that sum to less than 2^53; n >= 1.
        policy: (n,) integers, as for `kept_rows`.
        half_life: in versions, likewise.
        newest: likewise.
    """
    found = _of_lags(value, policy, half_life, newest)
    none = _chance_of_none([(chance, rows) for chance, rows, _ in found])
    _, rows, total = found[0]
    mean_of_least = Fraction(total, rows)
    count = none + sum(chance * rows for chance, rows, _ in found)
    return (none * mean_of_least + sum(chance * total for chance, _, total in found)) / count


def _of_lags(
    value: np.ndarray, policy: np.ndarray, half_life: float, newest: int
) -> list[tuple[int, int, int]]:
    """Of each lag, the least first: the chance of its rows to come, of CHANCES; their number; and
    the sum of their values."""
    lags, at = np.unique(_lag(policy, newest), return_inverse=True)
    rows, totals = np.bincount(at).tolist(), np.bincount(at, value).tolist()
    chances = [_highest_hash(lag, half_life) + 1 for lag in lags.tolist()]
    return list(zip(chances, rows, map(int, totals), strict=True))


def _chance_of_none(rows: Sequence[tuple[int, int]]) -> int:
    """Of CHANCES, that none of so many rows of each chance comes in an epoch."""
    none = Decimal(CHANCES)
    for chance, count in rows:
        stays_out = EXACT.divide(Decimal(CHANCES - chance), Decimal(CHANCES))
        none = EXACT.multiply(none, EXACT.power(stays_out, count))
    return int(none.to_integral_value())


def _lag(policy: np.ndarray, newest: int) -> np.ndarray:
    """(n,) int64: versions behind the newest policy, and 0 where the policy is unknown."""
    known = policy.astype(np.int64)
    return np.where(known < 0, 0, newest - known)


def _highest_hash(lag: int, half_life: float) -> int:
    """The highest hash that lets a row of this lag come."""
    exponent = EXACT.divide(EXACT.multiply(Decimal(-lag), LN_2), Decimal(half_life))
    share = EXACT.multiply(EXACT.exp(exponent), Decimal(CHANCES))
    return max(int(share.to_integral_value()) - 1, 0)


def _hashes(row_key: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    state = np.array(STATE, np.uint64)
    with np.errstate(over="ignore"):
        for word in (seed, epoch):
            state = mix_bits(state ^ np.uint64(word % 2**64))
        return mix_bits(state ^ row_key.astype(np.uint64))
