"""The callbacks that every run has: drift, pace, and measurement on a held-out cache where one is
named."""

from collections.abc import Sequence

from stillroom.cache.errors import ConfigError
from stillroom.cache.store import Cache
from stillroom.train.callbacks import Callback
from stillroom.train.config import ReplayConfig
from stillroom.train.drift import DriftCallback
from stillroom.train.held_out import HeldOutCallback
from stillroom.train.pace import PaceCallback


def own_callbacks(cache: Cache, config: ReplayConfig) -> tuple[Callback, ...]:
    """In the order in which they are told of a step.

    Raises:
        StillroomError: the held-out cache cannot be measured on.
    """
    measured = () if config.eval_root is None else (HeldOutCallback(cache, config.eval_root),)
    return (DriftCallback(), PaceCallback(), *measured)


def check_names(names: Sequence[str]) -> None:
    """Refuse callbacks that would overwrite each other's state in a checkpoint.

    Raises:
        ConfigError: two have one name.
    """
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        do = "Give each callback a name of its own, or none where it keeps no state."
        raise ConfigError("callbacks", "names that differ", f"{', '.join(twice)} twice", do)
