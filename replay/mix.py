"""Rows from several caches in fixed shares: how many of the first n draws each cache gives. Pure,
and closed in n, so that a place in the mix is one number.

A draw is a unit: a row, or rollouts of one prompt that stay together.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from stillroom.cache.errors import ConfigError

SCALE = 1 << 32


def shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of the weights, to one part in 2^32.

    Raises:
        ConfigError: a weight is not finite and above 0, or too small beside the others.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        do = "Correct it, or leave the cache out."
        raise ConfigError("weights of caches", "finite numbers above 0", f"{list(weights)}", do)
    total = sum(map(Fraction, weights))
    found = [round(Fraction(weight) / total * SCALE) for weight in weights]
    if min(found) < 1:
        do = "Leave the cache out."
        raise ConfigError("weights of caches", "shares of 2^-32 or more", f"{list(weights)}", do)
    return found


def shares_of_units(share: Sequence[int], unit_rows: Sequence[Fraction]) -> list[int]:
    """Shares of the draws that give these shares of the rows, exactly; where all caches have units
    of one row they are the same.

    Args:
        share: of the rows, as from `shares`.
        unit_rows: rows of a unit of each cache, on average; > 0.
    """
    exact = [own / rows for own, rows in zip(share, unit_rows, strict=True)]
    scale = lcm(*(own.denominator for own in exact))
    return [int(own * scale) for own in exact]


def drawn(draws: int, share: Sequence[int]) -> list[int]:
    """How many of the first draws each cache gives.

    The first cache gives floor(n s_0 / (s_0 + s_1 + ...)) of n, the second the like of those left
    over, and so on: every draw comes from one cache, and the counts are within the number of caches
    of their exact shares.

    Args:
        draws: n, >= 0.
        share: whole numbers above 0, as from `shares` or `shares_of_units`.
    """
    counts, weight = [], sum(share)
    for own in share[:-1]:
        count = draws * own // weight
        counts.append(count)
        draws -= count
        weight -= own
    return [*counts, draws]
