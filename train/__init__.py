"""Training on cached scores. Names load when first used: looking tools need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.train.callbacks import Callback, StepOutcome
    from stillroom.train.config import LoraSettings, ReplayConfig
    from stillroom.train.estimators import (
        forward_kl_tail_samples,
        multi_sample_policy_gradient,
        objective_loss,
        policy_gradient,
        reverse_kl_rb,
    )
    from stillroom.train.fused import fused_loss
    from stillroom.train.objective import Objective
    from stillroom.train.objectives import divergence
    from stillroom.train.parallel import Parallel
    from stillroom.train.phases import Phase
    from stillroom.train.publish import save_student
    from stillroom.train.refreshing import RefreshCallback, Refresher
    from stillroom.train.replay_loss import ReplayLoss
    from stillroom.train.report import TrainReport
    from stillroom.train.step import backward
    from stillroom.train.supervised_data import SupervisedConfig
    from stillroom.train.target import TeacherTarget
    from stillroom.train.trainer import ReplayTrainer

__all__ = [
    "Callback",
    "LoraSettings",
    "Objective",
    "Parallel",
    "Phase",
    "RefreshCallback",
    "Refresher",
    "ReplayConfig",
    "ReplayLoss",
    "ReplayTrainer",
    "StepOutcome",
    "SupervisedConfig",
    "TeacherTarget",
    "TrainReport",
    "backward",
    "divergence",
    "forward_kl_tail_samples",
    "fused_loss",
    "multi_sample_policy_gradient",
    "objective_loss",
    "policy_gradient",
    "reverse_kl_rb",
    "save_student",
]

_HOMES = {
    "Callback": "stillroom.train.callbacks",
    "LoraSettings": "stillroom.train.config",
    "Objective": "stillroom.train.objective",
    "Parallel": "stillroom.train.parallel",
    "Phase": "stillroom.train.phases",
    "RefreshCallback": "stillroom.train.refreshing",
    "Refresher": "stillroom.train.refreshing",
    "ReplayConfig": "stillroom.train.config",
    "ReplayLoss": "stillroom.train.replay_loss",
    "ReplayTrainer": "stillroom.train.trainer",
    "StepOutcome": "stillroom.train.callbacks",
    "SupervisedConfig": "stillroom.train.supervised_data",
    "TeacherTarget": "stillroom.train.target",
    "TrainReport": "stillroom.train.report",
    "backward": "stillroom.train.step",
    "divergence": "stillroom.train.objectives",
    "forward_kl_tail_samples": "stillroom.train.estimators",
    "fused_loss": "stillroom.train.fused",
    "multi_sample_policy_gradient": "stillroom.train.estimators",
    "objective_loss": "stillroom.train.estimators",
    "policy_gradient": "stillroom.train.estimators",
    "reverse_kl_rb": "stillroom.train.estimators",
    "save_student": "stillroom.train.publish",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
