"""Rows from several caches in fixed shares: how many of the first n draws each cache gives. Pure,
and closed in n, so that a place in the mix is one number."""

from collections.abc import Sequence
from fractions import Fraction

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


def drawn(draws: int, share: Sequence[int]) -> list[int]:
    """How many of the first draws each cache gives.

    The first cache gives floor(n s_0 / (s_0 + s_1 + ...)) of n, the second the like of those left
    over, and so on: every draw comes from one cache, and the counts are within the number of caches
    of their exact shares.

    Args:
        draws: n, >= 0.
        share: whole numbers above 0, as from `shares`.
    """
    counts, weight = [], sum(share)
    for own in share[:-1]:
        count = draws * own // weight
        counts.append(count)
        draws -= count
        weight -= own
    return [*counts, draws]
