"""Settings of an ensemble: further models whose mixture with the first one is the teacher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from stillroom.cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A further model of an ensemble; it runs as the first one does."""

    model: str
    """Folder of a Hugging Face model with its tokenizer, or a hub id."""
    revision: str | None = None
    """Revision of a hub id."""
    weight: float = 1.0
    """Its share of the probability, beside teacher.weight and the other members'; > 0."""
    urls: tuple[str, ...] = ()
    """Of the backend server: base addresses of the servers that run this member."""
    served_model: str | None = None
    """Of the backend server: name under which they serve it; None takes the only one that they
    have."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_weight("teacher.ensemble, weight", self.weight)


def check_weight(name: str, weight: float) -> None:
    """Refuse a weight that is not finite and above 0.

    Raises:
        ConfigError: names the setting.
    """
    if not (weight > 0 and math.isfinite(weight)):
        do = "Correct it, or leave the member out."
        raise ConfigError(name, "a finite number above 0", f"{weight}", do)


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights over their sum, as the decimal numbers that people wrote: 0.1 and 0.3 have the shares
    of 1 and 3, to the last bit."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    return tuple(float(weight / total) for weight in exact)
