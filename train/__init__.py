"""Training on cached scores. Names load when first used: looking tools need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.train.callbacks import Callback, StepOutcome
    from stillroom.train.config import LoraSettings, ReplayConfig
    from stillroom.train.objectives import divergence
    from stillroom.train.parallel import Parallel
    from stillroom.train.replay_loss import ReplayLoss
    from stillroom.train.step import backward
    from stillroom.train.target import TeacherTarget
    from stillroom.train.trainer import ReplayTrainer

__all__ = [
    "Callback",
    "LoraSettings",
    "Parallel",
    "ReplayConfig",
    "ReplayLoss",
    "ReplayTrainer",
    "StepOutcome",
    "TeacherTarget",
    "backward",
    "divergence",
]

_HOMES = {
    "Callback": "stillroom.train.callbacks",
    "LoraSettings": "stillroom.train.config",
    "Parallel": "stillroom.train.parallel",
    "ReplayConfig": "stillroom.train.config",
    "ReplayLoss": "stillroom.train.replay_loss",
    "ReplayTrainer": "stillroom.train.trainer",
    "StepOutcome": "stillroom.train.callbacks",
    "TeacherTarget": "stillroom.train.target",
    "backward": "stillroom.train.step",
    "divergence": "stillroom.train.objectives",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
