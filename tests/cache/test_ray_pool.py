"""What a pool on Ray refuses before it starts, and how a process answers; needs no Ray."""

import pickle
import sys
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, MissingError, NumericsError
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.ray_pool import Do, PoolWorker, _check_gpus, run_on_ray


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingError, match=r"^engine ray: .*pip install 'stillroom\[ray\]'"):
        list(run_on_ray(["a"], lambda: lambda name: {"part": name}, RayConfig(), wants_gpu=False))


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

        def do(name: str) -> dict[str, Any]:
            if name == "bad":
                raise NumericsError(name, "finite logits", "NaN", "Stop.")
            return {"part": name}

        return do

    worker = PoolWorker(make)
    assert answer(worker, "a") == {"part": "a"}
    error = answer(worker, "bad")
    assert isinstance(error, NumericsError)
    assert error.where == "bad"
    assert answer(worker, "b") == {"part": "b"}
    assert loaded == [1]
