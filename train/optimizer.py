"""Optimiser and learning rate schedule, made from their names in the settings."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler

from stillroom.cache.errors import ConfigError
from stillroom.train.config import ReplayConfig

OPTIMIZERS = "Name one such as AdamW, Adam or SGD."
SCHEDULES = "Name one such as constant_with_warmup, linear or cosine."
WITHOUT_KWARGS = ("constant", "constant_with_warmup")
"""Schedules that take no further arguments; transformers would pass over them in silence."""

UNSHARDED = ("Adafactor", "Rprop")
"""Optimisers that cannot step on a weight of which each rank has a shard."""


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: ReplayConfig
) -> torch.optim.Optimizer:
    """The optimiser of the settings, of those parameters that are trained.

    Raises:
        ConfigError: torch has no such class, it needs a closure, or it does not take its arguments.
    """
    cls: Any = getattr(torch.optim, config.optimizer, None)
    where, got = "train.optimizer", repr(config.optimizer)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(where, "a class in torch.optim", got, OPTIMIZERS)
    if inspect.signature(cls.step).parameters["closure"].default is inspect.Parameter.empty:
        raise ConfigError(where, "one that needs no closure", got, OPTIMIZERS)
    known: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    twice = known.keys() & config.optimizer_args.keys()
    if twice:
        do = "Use train.learning_rate and train.weight_decay."
        expected = "other arguments than lr and weight_decay"
        raise ConfigError("train.optimizer_args", expected, ", ".join(sorted(twice)), do)
    if not config.weight_decay and "weight_decay" not in inspect.signature(cls).parameters:
        del known["weight_decay"]
    settings = known | config.optimizer_args
    try:
        made: torch.optim.Optimizer = cls([p for p in parameters if p.requires_grad], **settings)
    except (TypeError, ValueError) as error:
        expected = f"an optimiser that takes {', '.join(settings)}"
        raise ConfigError(where, expected, str(error), OPTIMIZERS) from error
    return made


def make_schedule(
    optimizer: torch.optim.Optimizer, config: ReplayConfig, total_steps: int
) -> LRScheduler:
    """The schedule of the settings.

    Raises:
        ConfigError: transformers has none of that name, it needs more than steps, or it does not
            take its arguments.
    """
    where, expected = "train.lr_scheduler_type", "a schedule of transformers that counts steps"
    name, kwargs = config.lr_scheduler_type, config.lr_scheduler_kwargs
    known = ("num_warmup_steps", "num_training_steps", "last_epoch")
    given = sorted(kwargs.keys() & known) or (sorted(kwargs) if name in WITHOUT_KWARGS else [])
    if given:
        do = "Use train.warmup_steps, and nothing that the schedule does not take."
        wanted = f"further arguments of {name}"
        raise ConfigError("train.lr_scheduler_kwargs", wanted, ", ".join(given), do)
    try:
        made: LRScheduler = get_scheduler(name, optimizer, config.warmup_steps, total_steps, kwargs)
    except (TypeError, ValueError) as error:
        got, do = f"{name!r}: {error}", f"{SCHEDULES} train.lr_scheduler_kwargs has its arguments."
        raise ConfigError(where, expected, got, do) from error
    if isinstance(made, ReduceLROnPlateau):
        raise ConfigError(where, expected, repr(name), SCHEDULES)
    return made


@contextmanager
def scaled_rate(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Every learning rate multiplied by a factor; after the block what it was."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


def check_trainable(config: ReplayConfig, device: torch.device) -> None:
    """Refuse settings that no optimiser or schedule can be made of, or whose optimiser does not
    take what is trained: matrices and vectors with dense gradients, or adapters' matrices alone.

    Args:
        config: the settings.
        device: that is trained on; some arguments are for one kind of device.

    Raises:
        ConfigError: names the setting.
    """
    layer = torch.nn.Linear(1, 1, bias=config.lora is None, device=device)
    optimizer = make_optimizer(layer.parameters(), config)
    make_schedule(optimizer, config, total_steps=1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        expected, got = "an optimiser that can take a step", f"{config.optimizer!r}: {error}"
        raise ConfigError("train.optimizer", expected, got, OPTIMIZERS) from error


def check_sharded(config: ReplayConfig, world: int) -> None:
    """Refuse fsdp with an optimiser that cannot step on weights of which each rank has a shard.

    Args:
        config: the settings.
        world: number of processes.

    Raises:
        ConfigError: names the optimiser.
    """
    if world > 1 and config.parallel == "fsdp" and config.optimizer in UNSHARDED:
        expected = f"another than {', '.join(UNSHARDED)}, which cannot step on sharded weights"
        do = "Use ddp, or another optimiser."
        raise ConfigError("train.optimizer with fsdp", expected, repr(config.optimizer), do)
