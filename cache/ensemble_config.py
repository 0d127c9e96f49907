"""Settings of an ensemble: further models whose mixture with the first one is the teacher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Weights over their sum."""
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
