"""A Ray cluster of several raylets on this machine, started once, and small caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.store import Cache
from tests.cache.fakes import make_identity, make_meta, random_rollouts

ROOT = Path(__file__).resolve().parents[2]
PARTS = 6


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each; this process is its driver."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environ.setenv("PYTHONPATH", str(ROOT))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            for _ in range(2):
                made.add_node(num_cpus=1)
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache with tiny parts that are to be scored."""
    made = Cache.create(tmp_path / "root", make_identity())
    for number in range(PARTS):
        assert made.add_part(random_rollouts(number, 2), make_meta(number))
    return made


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """While this file is missing, models in Ray's processes wait; they leave notes beside it."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder / "gate"
