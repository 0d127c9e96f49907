"""What the processes that train together tell one another; one process alone tells itself."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def rank() -> int:
    """Number of this process; 0 where there is but one."""
    return dist.get_rank() if dist.is_initialized() else 0


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
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
