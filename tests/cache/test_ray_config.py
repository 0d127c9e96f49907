"""Settings of a pool on Ray: what is out of range is refused."""

from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.ray_config import RayConfig


def test_a_pool_may_stay_as_it_is_or_grow() -> None:
    assert RayConfig().workers == (1, 1)
    assert RayConfig(workers=(2, 9), num_cpus=0, num_gpus=0.5).num_gpus == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": (0, 1)},
        {"workers": (3, 2)},
        {"num_cpus": -1.0},
        {"num_gpus": float("nan")},
        {"num_cpus": float("inf")},
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match="workers" if name == "workers" else "num_cpus"):
        RayConfig(**changes)
