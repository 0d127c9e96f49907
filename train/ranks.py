"""The processes that train together: how they join, and what they tell one another; one process
alone tells itself."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from stillroom.cache.causal_lm import pick_device
from stillroom.cache.errors import ConfigError


def join_ranks(setting: str) -> torch.device:
    """Join the processes that torchrun or accelerate launched together, unless that is done.

    Accelerate is told of the CPU, as launched processes on a machine without a GPU would else each
    train alone. It keeps the first device of a process; one process alone may take another later.

    Args:
        setting: train.device, auto or cpu.

    Returns:
        The device that this process trains on.

    Raises:
        ConfigError: the processes were joined before, on devices that the setting does not mean.
    """
    launched_on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    on_cpu = setting == "cpu" or launched_on_cpu or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    device: torch.device = state.device
    if (device.type == "cpu") == on_cpu:
        return device
    if world() == 1:
        return pick_device("cpu" if on_cpu else "auto")
    expected = f"what fits the {world()} processes, which were joined on {device.type}"
    do = "Set it to cpu, or leave it at auto; or join them with PartialState(cpu=...) accordingly."
    raise ConfigError("train.device", expected, repr(setting), do)


def rank() -> int:
    """Number of this process; 0 where there is but one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first_rank(choose: Callable[[], Any]) -> Any:
    """Let rank 0 do something, and give what it returns (it must pickle) to every rank.

    Raises:
        Exception: whatever it raised, on every rank.
    """
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = choose()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_every_rank(value: Any) -> list[Any]:
    """What each rank gives, in their order, to all of them."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, value)
    return gathered
