"""What a pool on Ray refuses before it starts, and how a process answers; needs no Ray."""

import pickle
import socket
import sys
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, MissingError, NumericsError, StillroomError
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.ray_pool import (
    DIED,
    MAX_TRIES,
    Begun,
    Do,
    PoolWorker,
    _check_died,
    _check_gpus,
    _check_room,
    run_on_ray,
)


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingError, match=r"^engine ray: .*pip install 'stillroom\[ray\]'"):
        list(
            run_on_ray(
                ["a"], lambda: lambda name, waits: {"part": name}, RayConfig(), wants_gpu=False
            )
        )


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "wants_gpu", "refused"),
    [(2, 0, True, True), (2, 1, True, False), (2, 0, False, False), (0, 0, True, False)],
)
def test_gpus_that_nobody_asked_for_are_not_left_idle_in_silence(
    gpus: int, num_gpus: float, wants_gpu: bool, refused: bool
) -> None:
    resources, config = {"CPU": 4.0, "GPU": float(gpus)}, RayConfig(num_gpus=num_gpus)
    if not refused:
        _check_gpus(resources, config, wants_gpu)
        return
    with pytest.raises(ConfigError, match=r"^ray\.num_gpus: .*; got 0, and a cluster with 2"):
        _check_gpus(resources, config, wants_gpu)


def answer(worker: PoolWorker, name: str) -> Any:
    """What a process answers for a piece of work."""
    (data,) = worker({"name": np.array([name])})["outcome"]
    return pickle.loads(data)


def test_a_process_loads_once_and_answers_with_errors_too() -> None:
    loaded: list[int] = []

    def make() -> Do:
        loaded.append(1)

        def do(name: str, waits: bool) -> dict[str, Any]:
            if name == "bad":
                raise NumericsError(name, "finite logits", "NaN", "Stop.")
            if name == "worse":
                raise RuntimeError("CUDA error: an illegal access\nand more")
            return {"part": name}

        return do

    worker = PoolWorker(make, Begun().begin, False)
    assert answer(worker, "a") == {"part": "a"}
    error = answer(worker, "bad")
    assert isinstance(error, NumericsError)
    assert error.where == "bad"
    error = answer(worker, "worse")
    assert type(error) is StillroomError
    assert error.where == f"part worse on {socket.gethostname()}"
    assert error.got == "RuntimeError: CUDA error: an illegal access"
    assert answer(worker, "b") == {"part": "b"}
    assert loaded == [1]


LAPTOP, HEAD = {"CPU": 8.0}, {"memory": 1e9}
NODES = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 2.0, "GPU": 16.0}]


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "fits"),
    [
        ([LAPTOP], 8, 0, True),
        ([LAPTOP], 9, 0, False),
        ([LAPTOP], 1, 0.5, False),
        ([HEAD, *NODES], 4, 8, True),
        ([HEAD, *NODES], 4, 16, False),
    ],
)
def test_a_worker_that_fits_on_no_node_is_refused_or_waited_for_aloud(
    nodes: list[dict[str, float]],
    cpus: float,
    gpus: float,
    fits: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = RayConfig(num_cpus=cpus, num_gpus=gpus)
    _check_room(nodes, config, False)
    said = "" if fits else f"  Ray: no node has {cpus} CPUs and {gpus} GPUs: waiting for one\n"
    assert capsys.readouterr().err == said
    if fits:
        _check_room(nodes, config, True)
        return
    with pytest.raises(ConfigError, match=rf"num_gpus: expected a machine with {cpus} CPUs and"):
        _check_room(nodes, config, True)


def test_parts_without_an_answer_are_named() -> None:
    _check_died([])
    with pytest.raises(MissingError, match=r"^part a and 1 other parts on Ray: expected"):
        _check_died(["a", "b"])


def test_a_part_whose_process_dies_again_and_again_is_given_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = Begun()
    for tries in range(MAX_TRIES):
        assert answer(PoolWorker(lambda: lambda name, waits: {}, begun.begin, False), "a") == {}
        said = capsys.readouterr().err
        assert (f"a is begun again, after {tries} of {MAX_TRIES} processes" in said) == (tries > 0)
    assert answer(PoolWorker(lambda: lambda name, waits: {}, begun.begin, False), "a") == DIED
    assert answer(PoolWorker(lambda: lambda name, waits: {}, begun.begin, False), "b") == {}
