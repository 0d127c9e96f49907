"""Named pieces of work on Ray Data: a pool of processes that grows while work waits, each with a
model of its own, loaded once."""

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stillroom.cache.errors import ConfigError, MissingError, StillroomError, first_line
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.store import Cache

if TYPE_CHECKING:
    import numpy as np

Outcome = dict[str, Any]
Do = Callable[[str, bool], Outcome | None]
"""Does a piece of work. Where somebody else is at it, it waits for them if the second argument says
so, and gives None otherwise."""
MAX_TRIES = 5
"""How often a piece is begun whose process dies each time."""
DIED = "died"
"""The answer for a piece that was begun so often."""


def run_on_ray(
    names: Sequence[str], make: Callable[[], Do], config: RayConfig, *, wants_gpu: bool
) -> Iterator[Outcome]:
    """Do pieces of work on Ray; a process that dies is replaced, and its piece is done again, up to
    `MAX_TRIES` times in all. Pieces that others are at come last.

    Args:
        names: the pieces, at least one.
        make: called once in each process, where the models load; gives what does a piece. It must
            pickle, and what it names must be installed where Ray runs.
        config: how many processes, where.
        wants_gpu: whether a process would use a GPU that it was given.

    Yields:
        What each piece gave, as they are done.

    Raises:
        MissingError: Ray is not installed, or gave up; or pieces are not done, because their
            processes died.
        ConfigError: the cluster has GPUs, and workers that want one would get none; or a worker
            does not fit on the machine on which Ray was started.
        StillroomError: what a piece of work raised.
    """
    data = _import_ray_data()
    import ray

    was_running = ray.is_initialized()
    if not was_running:
        _init(ray, config)
    try:
        _check_gpus(ray.cluster_resources(), config, wants_gpu)
        _check_room(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], config, _is_ours()
        )
        begin = partial(_begin, _start_count(ray))
        held: list[str] = []
        died: list[str] = []
        for waits in (False, True):
            left = list(held) if waits else names
            worker = (make, begin, waits)
            for name, outcome in _outcomes(data, left, worker, config) if left else ():
                if outcome is None:
                    held.append(name)
                elif outcome == DIED:
                    died.append(name)
                else:
                    yield outcome
        _check_died(died)
    except ray.exceptions.RayError as error:
        do = "See Ray's log of it; a rerun goes on where this job stopped."
        raise MissingError("a worker of Ray", "an answer", first_line(error), do) from error
    finally:
        if not was_running:
            ray.shutdown()


def _init(ray: Any, config: RayConfig) -> None:
    """Start or join Ray, which sets a handler of its own for SIGTERM: the caller's is put back."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=config.address, logging_level=logging.WARNING)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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


def _is_ours() -> bool:
    """Whether Ray was started by this process, and nobody will add nodes."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and bool(node.is_head())


def _check_room(nodes: Sequence[Mapping[str, float]], config: RayConfig, is_ours: bool) -> None:
    """Ray would wait for ever, and in silence, for a node on which a worker fits."""
    wanted = {"CPU": config.num_cpus, "GPU": config.num_gpus}
    if any(all(node.get(kind, 0) >= wanted[kind] for kind in wanted) for node in nodes):
        return
    room = f"{config.num_cpus:g} CPUs and {config.num_gpus:g} GPUs"
    if is_ours:
        got = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        do = "Lower them, or name a cluster with --ray.address."
        raise ConfigError("ray.num_cpus, num_gpus", f"a machine with {room}", got, do)
    print(f"  Ray: no node has {room}: waiting for one", file=sys.stderr, flush=True)


class Begun:
    """How often each piece of work was begun: an actor, which no death of a worker takes along."""

    def __init__(self) -> None:
        """Nothing was begun."""
        self._times: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        """Count a piece; how often it was begun with this time."""
        self._times[name] += 1
        return self._times[name]


def _start_count(ray: Any) -> Any:
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Begun).remote()


def _begin(begun: Any, name: str) -> int:
    import ray

    return int(ray.get(begun.begin.remote(name)))


def _check_died(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 1} other parts" if names[1:] else ""
        got = f"a process that died {MAX_TRIES} times"
        do = "See Ray's log of it. All other parts are done; a rerun tries these again."
        raise MissingError(f"part {names[0]}{more} on Ray", "an answer", got, do)


def _outcomes(
    data: Any, names: Sequence[str], worker: tuple[Any, ...], config: RayConfig
) -> Iterator[tuple[str, Any]]:
    fewest, most = config.workers
    items = data.from_items([{"name": name} for name in names], override_num_blocks=len(names))
    done = items.map_batches(
        PoolWorker,
        batch_size=1,
        batch_format="numpy",
        compute=data.ActorPoolStrategy(
            min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=1
        ),
        fn_constructor_args=worker,
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
        yield str(row["name"]), outcome


class PoolWorker:
    """One process of the pool.

    Args:
        make: loads the model, and gives what does a piece of work.
        begin: counts how often a piece was begun.
        waits: whether it waits for pieces that others are at.
    """

    def __init__(self, make: Callable[[], Do], begin: Callable[[str], int], waits: bool) -> None:
        """Load nothing yet: what fails here would be tried again, and its reason be lost."""
        self._make, self._begin, self._waits = make, begin, waits
        self._do: Do | None = None

    def __call__(self, batch: "dict[str, np.ndarray]") -> dict[str, list[Any]]:
        """Do the one piece of work of a batch. Errors are answers: Ray would wrap them, and their
        cause be lost."""
        name = str(batch["name"][0])
        outcome: Outcome | StillroomError | str | None
        try:
            outcome = self._answer(name)
        except StillroomError as error:
            outcome = error
        except Exception as error:
            traceback.print_exc()
            where = f"part {name} on {socket.gethostname()}"
            got, do = f"{type(error).__name__}: {first_line(error)}", "See Ray's log of the worker."
            outcome = StillroomError(where, "an answer", got, do)
        return {"name": [name], "outcome": [pickle.dumps(outcome)]}

    def _answer(self, name: str) -> Outcome | str | None:
        times = self._begin(name)
        if times > MAX_TRIES:
            return DIED
        if times > 1 and not self._waits:
            said = f"  Ray: {name} is begun again, after {times - 1} of {MAX_TRIES} processes died"
            print(said, file=sys.stderr, flush=True)
        if self._do is None:
            self._do = self._make()
        return self._do(name, self._waits)
