"""Settings of training on a cache. Needs no torch."""

import math
import re
from dataclasses import dataclass, field

from stillroom.replay.config import StreamConfig
from stillroom.train.objective import Objective
from stillroom.train.settings import check_setting

DEVICES = ("auto", "cpu")
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig(Objective):
    """How a student is trained on cached scores. Names are those of transformers and TRL where the
    meaning is the same."""

    temperature: float | None = None
    """The cache's temperature, to make sure; scores cannot be re-tempered. None takes the cache's.
    Divides both sides' logits; > 0."""
    num_train_epochs: float = 1.0
    """Passes over the snapshot's rows; > 0. The number of steps is rounded up."""
    max_steps: int = -1
    """Optimiser steps, in place of num_train_epochs; >= 1, and -1 leaves it to the epochs."""
    gradient_accumulation_steps: int = 1
    """Batches of replay.batch_rows rows in one optimiser step; >= 1. Their tokens have one common
    mean, so it gives what one batch of as many rows gives."""
    learning_rate: float = 1e-5
    """Peak learning rate; > 0."""
    optimizer: str = "AdamW"
    """Name of a class in torch.optim."""
    optimizer_args: dict[str, float] = field(default_factory=dict)
    """Further arguments of that class, such as eps."""
    weight_decay: float = 0.0
    """Weight decay; >= 0."""
    lr_scheduler_type: str = "constant_with_warmup"
    """A transformers schedule: constant_with_warmup, linear, cosine, ..."""
    warmup_steps: int = 0
    """Steps of linear warm-up; >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; > 0, and a large number leaves them as they are."""
    bf16: bool = False
    """Products in bfloat16, weights and loss in float32; false is float32 throughout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    torch_compile: bool = False
    """Compile the student's layers."""
    loss_bytes: int = 1 << 28
    """Memory of the loss beyond hidden states, head and their gradients; >= 1 MiB."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU) or cpu."""
    save_steps: int = 0
    """Steps between checkpoints; 0 writes none."""
    save_total_limit: int = 2
    """Newest checkpoints that are kept; >= 1."""
    drift_every_steps: int = 50
    """Steps between records of drift; >= 1. The last step is always recorded."""
    seed: int = 0
    """Seed of everything random in training but the replay order."""
    replay: StreamConfig = field(default_factory=StreamConfig)
    """How rows come to the trainer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Objective.__post_init__(self)
        check_setting("train.device", self.device in DEVICES, f"one of {DEVICES}", self.device)
        for name in ("num_train_epochs", "learning_rate", "max_grad_norm", "temperature"):
            value = getattr(self, name)
            valid = value is None or (value > 0 and math.isfinite(value))
            check_setting(f"train.{name}", valid, "a finite number above 0", value)
        steps = self.max_steps
        check_setting("train.max_steps", steps >= 1 or steps == -1, "at least 1, or -1", steps)
        for name in ("save_total_limit", "drift_every_steps", "gradient_accumulation_steps"):
            value = getattr(self, name)
            check_setting(f"train.{name}", value >= 1, "at least 1", value)
        for name in ("weight_decay", "warmup_steps", "save_steps"):
            value = getattr(self, name)
            valid = value >= 0 and math.isfinite(value)
            check_setting(f"train.{name}", valid, "a finite number from 0", value)
        valid = self.loss_bytes >= 1 << 20
        check_setting("train.loss_bytes", valid, "at least 1 MiB", self.loss_bytes)
