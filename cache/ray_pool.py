"""Named pieces of work on Ray Data: a pool of processes that grows while work waits, each with a
model of its own, loaded once."""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stillroom.cache.errors import ConfigError, MissingError, StillroomError, first_line
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.store import Cache

if TYPE_CHECKING:
    import numpy as np

Outcome = dict[str, Any]
Do = Callable[[str], Outcome]


def run_on_ray(
    names: Sequence[str], make: Callable[[], Do], config: RayConfig, *, wants_gpu: bool
) -> Iterator[Outcome]:
    """Do pieces of work on Ray; a process that dies is replaced, and its piece is done again,
    however often that happens.

    Args:
        names: the pieces, at least one.
        make: called once in each process, where the models load; gives what does a piece. It must
            pickle, and what it names must be installed where Ray runs.
        config: how many processes, where.
        wants_gpu: whether a process would use a GPU that it was given.

    Yields:
        What each piece gave, as they are done.

    Raises:
        MissingError: Ray is not installed, or gave up.
        ConfigError: the cluster has GPUs, and workers that want one would get none.
        StillroomError: what a piece of work raised.
    """
    data = _import_ray_data()
    import ray

    was_running = ray.is_initialized()
    if not was_running:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=config.address, logging_level=logging.WARNING)
    try:
        _check_gpus(ray.cluster_resources(), config, wants_gpu)
        yield from _outcomes(data, names, make, config)
    except ray.exceptions.RayError as error:
        do = "See Ray's log of it; a rerun goes on where this job stopped."
        raise MissingError("a worker of Ray", "an answer", first_line(error), do) from error
    finally:
        if not was_running:
            ray.shutdown()


def address_of(cache: Cache) -> str:
    """Root of a cache for processes that run in another folder."""
    return str(cache.storage.folder) if cache.storage.is_local else cache.storage.root


def _import_ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        do = "Install it with: pip install 'stillroom[ray]'."
        raise MissingError("engine ray", "the package ray[data]", f"{error}", do) from error
    return ray.data


def _check_gpus(resources: dict[str, float], config: RayConfig, wants_gpu: bool) -> None:
    """A worker that asks for no GPU is lent none: Ray hides them, and it would run on CPUs."""
    if wants_gpu and config.num_gpus == 0 and resources.get("GPU", 0) > 0:
        got = f"0, and a cluster with {resources['GPU']:.0f}"
        do = "Set ray.num_gpus, or the model's device to cpu."
        raise ConfigError("ray.num_gpus", "the GPUs of a worker", got, do)


def _outcomes(
    data: Any, names: Sequence[str], make: Callable[[], Do], config: RayConfig
) -> Iterator[Outcome]:
    fewest, most = config.workers
    items = data.from_items([{"name": name} for name in names], override_num_blocks=len(names))
    done = items.map_batches(
        PoolWorker,
        batch_size=1,
        batch_format="numpy",
        compute=data.ActorPoolStrategy(
            min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=1
        ),
        fn_constructor_args=(make,),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )
    done.context.enable_progress_bars = False
    # With one task at a time a busy process counts as 1, and by default none would be added.
    done.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for row in done.iter_rows():
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, StillroomError):
            raise outcome
        yield outcome


class PoolWorker:
    """One process of the pool.

    Args:
        make: loads the model, and gives what does a piece of work.
    """

    def __init__(self, make: Callable[[], Do]) -> None:
        """Load nothing yet: what fails here would be tried again, and its reason be lost."""
        self._make = make
        self._do: Do | None = None

    def __call__(self, batch: "dict[str, np.ndarray]") -> dict[str, list[bytes]]:
        """Do the one piece of work of a batch. Errors of ours are answers: Ray would wrap them."""
        outcome: Outcome | StillroomError
        try:
            if self._do is None:
                self._do = self._make()
            outcome = self._do(str(batch["name"][0]))
        except StillroomError as error:
            outcome = error
        return {"outcome": [pickle.dumps(outcome)]}
