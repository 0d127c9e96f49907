"""Training on cached scores. Names load when first used: looking tools need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.train.objectives import divergence
    from stillroom.train.target import TeacherTarget
    from stillroom.train.trainer import ReplayTrainer

__all__ = ["ReplayTrainer", "TeacherTarget", "divergence"]

_HOMES = {
    "ReplayTrainer": "stillroom.train.trainer",
    "TeacherTarget": "stillroom.train.target",
    "divergence": "stillroom.train.objectives",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
