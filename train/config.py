"""Settings of training on a cache. Needs no torch."""

import math
import re
from dataclasses import dataclass, field

from stillroom.replay.config import StreamConfig
from stillroom.train.objective import Objective
from stillroom.train.phases import Phase
from stillroom.train.settings import check_setting, convert_fields

DEVICES = ("auto", "cpu")
PARALLEL = ("auto", "ddp", "fsdp")
LORA_PUBLISHED = ("merged", "adapter")
ABOVE_ZERO = (
    "num_train_epochs",
    "learning_rate",
    "max_grad_norm",
    "temperature",
    "stop_reverse_kl",
)
FROM_ONE = (
    "save_total_limit",
    "drift_every_steps",
    "gradient_accumulation_steps",
    "early_stopping_patience",
)
FROM_ZERO = ("weight_decay", "warmup_steps", "save_steps", "eval_steps")
WITH_EVAL = {
    "eval_steps": 0,
    "stop_reverse_kl": None,
    "early_stopping_patience": None,
    "load_best_model_at_end": False,
}
"""Settings that mean nothing without `eval_root`, and what they are then."""
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Low-rank adapters, which are trained in place of the student's weights."""

    r: int = 16
    """Rank; >= 1."""
    alpha: float = 32.0
    """An adapter's product is multiplied by alpha / r; > 0."""
    dropout: float = 0.0
    """Probability of dropout in front of adapters; 0 <= dropout < 1."""
    target_modules: tuple[str, ...] = ()
    """Last parts of the names of the layers that get adapters, such as q_proj; nothing: every
    linear layer but the output head."""
    publish: str = "merged"
    """merged (weights with the adapters added), or adapter (those weights, and the adapters in the
    form of peft beside them)."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        convert_fields(self, "train.lora")
        check_setting("train.lora.r", self.r >= 1, "at least 1", self.r)
        valid = self.alpha > 0 and math.isfinite(self.alpha)
        check_setting("train.lora.alpha", valid, "a finite number above 0", self.alpha)
        valid = 0 <= self.dropout < 1
        check_setting("train.lora.dropout", valid, "a probability from 0, below 1", self.dropout)
        known, publish = f"one of {LORA_PUBLISHED}", self.publish
        check_setting("train.lora.publish", publish in LORA_PUBLISHED, known, publish)


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
    phases: tuple[Phase, ...] = ()
    """Stretches of the run with their own data, objective and length, in place of max_steps and
    num_train_epochs; nothing: one, which replays the cache."""
    phase_cycles: int = 1
    """Times that the list of phases is gone through; >= 1."""
    gradient_accumulation_steps: int = 1
    """Batches of replay.batch_rows rows in one optimiser step; >= 1. Their tokens have one common
    mean, so it gives what one batch of as many rows gives."""
    learning_rate: float = 1e-5
    """Peak learning rate; > 0."""
    optimizer: str = "AdamW"
    """Name of a class in torch.optim."""
    optimizer_args: dict[str, bool | int | float | tuple[float, ...]] = field(default_factory=dict)
    """Further arguments of that class, such as eps or betas."""
    weight_decay: float = 0.0
    """Weight decay; >= 0."""
    lr_scheduler_type: str = "constant_with_warmup"
    """A transformers schedule: constant_with_warmup, linear, cosine, ..."""
    lr_scheduler_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of that schedule, such as num_decay_steps or min_lr."""
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
    """Memory of the loss beyond hidden states, head and their gradients; >= 1 MiB. Not in it are
    copies of the head: in bfloat16 with bf16, in float32 with its adapters added, and of a
    bfloat16 head's gradient, which is summed in float32."""
    parallel: str = "auto"
    """How several processes train together: ddp (each holds the whole student), fsdp (weights,
    gradients and the optimiser's state are shared out), or auto (ddp)."""
    lora: LoraSettings | None = None
    """Adapters to train in place of the weights; None trains all weights."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU) or cpu."""
    save_steps: int = 0
    """Steps between checkpoints, and one at the end; 0 writes none."""
    save_total_limit: int = 2
    """Newest checkpoints that are kept; >= 1."""
    drift_every_steps: int = 50
    """Steps between records of drift; >= 1. The last step is always recorded."""
    eval_root: str | None = None
    """A cache of held-out rollouts, of the same teacher; the student is measured on it."""
    eval_steps: int = 0
    """Steps between measurements on eval_root; 0 measures at the end alone."""
    stop_reverse_kl: float | None = None
    """Training stops once the held-out reverse KL is at most this, nats; > 0."""
    early_stopping_patience: int | None = None
    """Training stops after so many measurements without a lower held-out reverse KL; >= 1."""
    load_best_model_at_end: bool = False
    """Publish the student with the lowest held-out reverse KL in place of the last."""
    seed: int = 0
    """Seed of everything random in training but the replay order."""
    replay: StreamConfig = field(default_factory=StreamConfig)
    """How rows come to the trainer."""

    @property
    def publishes_adapter(self) -> bool:
        """Whether a published student has its adapters beside it."""
        return self.lora is not None and self.lora.publish == "adapter"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        Objective.__post_init__(self)
        check_setting("train.device", self.device in DEVICES, f"one of {DEVICES}", self.device)
        known, parallel = f"one of {PARALLEL}", self.parallel
        check_setting("train.parallel", parallel in PARALLEL, known, parallel)
        for name in ABOVE_ZERO:
            value = getattr(self, name)
            valid = value is None or (value > 0 and math.isfinite(value))
            check_setting(f"train.{name}", valid, "a finite number above 0", value)
        steps = self.max_steps
        check_setting("train.max_steps", steps >= 1 or steps == -1, "at least 1, or -1", steps)
        for name in FROM_ONE:
            value = getattr(self, name)
            check_setting(f"train.{name}", value is None or value >= 1, "at least 1", value)
        for name in FROM_ZERO:
            value = getattr(self, name)
            valid = value >= 0 and math.isfinite(value)
            check_setting(f"train.{name}", valid, "a finite number from 0", value)
        valid = self.loss_bytes >= 1 << 20
        check_setting("train.loss_bytes", valid, "at least 1 MiB", self.loss_bytes)
        self._check_phases()
        if self.eval_root is None:
            for name, default in WITH_EVAL.items():
                value = getattr(self, name)
                expected = "nothing without train.eval_root"
                check_setting(f"train.{name}", value == default, expected, value)

    def _check_phases(self) -> None:
        cycles, expected = self.phase_cycles, "at least 1, and 1 without phases"
        valid = cycles >= 1 and (cycles == 1 or bool(self.phases))
        check_setting("train.phase_cycles", valid, expected, cycles)
        for name, default in {"max_steps": -1, "num_train_epochs": 1.0}.items():
            value, expected = getattr(self, name), "nothing beside train.phases, which say it"
            check_setting(f"train.{name}", value == default or not self.phases, expected, value)
