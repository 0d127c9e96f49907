"""Several processes that train together: what they must agree on before they start."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_cpu(device: str) -> bool:
    """Whether training with this setting runs on the CPU; accelerate must be told, or launched
    processes on a machine without a GPU would each train alone."""
    return device == "cpu" or not torch.cuda.is_available()


def same_on_all_ranks(choose: Callable[[], Any], device: str) -> Any:
    """Let rank 0 choose, and give its choice to every rank.

    Args:
        choose: called on rank 0 only; returns something that pickles.
        device: the setting, auto or cpu.

    Raises:
        Exception: whatever `choose` raised, on every rank.
    """
    state = PartialState(cpu=on_cpu(device))
    chosen: list[Any] = [None, None]
    if state.is_main_process:
        try:
            chosen[0] = choose()
        except Exception as error:
            chosen[1] = error
    broadcast_object_list(chosen)
    if chosen[1] is not None:
        raise chosen[1]
    return chosen[0]
