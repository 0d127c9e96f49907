"""Following a cache that grows: all ranks take up the same newer snapshot at the same step."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from stillroom.cache.errors import ConfigError, MismatchError, StillroomError
from stillroom.cache.store import Cache

T = TypeVar("T")
Agree = Callable[[Callable[[], Any]], Any]
"""Calls a function on one rank, and returns its result on all; what it raises is raised on all."""


def newest_snapshots(caches: list[Cache]) -> list[str]:
    """Ids of snapshots of all that is scored and not retired now."""
    return [cache.snapshot().id for cache in caches]


def agree_alone(choose: Callable[[], T]) -> T:
    """For one process."""
    return choose()


def agree_by_torch(choose: Callable[[], T]) -> T:
    """Rank 0 of torch.distributed's default group chooses; a collective operation, which every rank
    must call."""
    import torch.distributed as dist

    chosen: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            chosen[0] = choose()
        except StillroomError as error:
            chosen[1] = error
        except Exception as error:
            # An error of another class may not travel, and the other ranks would wait for ever.
            chosen[1] = RuntimeError(f"rank 0: {error!r}")
    dist.broadcast_object_list(chosen)
    if chosen[1] is not None:
        raise chosen[1]
    return chosen[0]  # type: ignore[no-any-return]


def agree_among(world: int) -> Agree:
    """How so many ranks agree.

    Raises:
        ConfigError: there are several, and no process group that joins them.
    """
    if world == 1:
        return agree_alone
    size = _group_size()
    if size == world:
        return agree_by_torch
    do = "Initialise torch.distributed first, pass agree=, or set replay.follow_every_steps to 0."
    raise ConfigError(
        "replay.follow_every_steps", f"a process group of {world} ranks", f"{size}", do
    )


def _group_size() -> int:
    """Ranks of torch.distributed's default group; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return 0
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0


def check_same_on_ranks(what: dict[str, Any], world: int) -> None:
    """Refuse streams that the ranks of one job opened differently; a collective operation where
    torch.distributed joins so many ranks, and nothing otherwise.

    Raises:
        MismatchError: names what differs.
    """
    if world == 1 or _group_size() != world:
        return
    import torch.distributed as dist

    found: list[Any] = [None] * world
    dist.all_gather_object(found, what)
    for rank, theirs in enumerate(found):
        differing = [key for key in what if theirs[key] != found[0][key]]
        if differing:
            expected, got = (
                ", ".join(f"{key} = {values[key]!r}" for key in differing)
                for values in (found[0], theirs)
            )
            do = "Let one rank choose the snapshot and the settings, and give them to the others."
            raise MismatchError(f"the stream of rank {rank}", f"rank 0's {expected}", got, do)
