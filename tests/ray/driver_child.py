"""A driver in a process of its own: `python -m tests.ray.driver_child ROOT GATE ADDRESS` scores a
cache on Ray, with a teacher that waits for a gate. It prints how it ended: the number of parts that
were scored, or "told"."""

import sys
from pathlib import Path

from stillroom.cache.ray_config import RayConfig
from stillroom.cache.score_on_ray import score_on_ray
from stillroom.cache.store import Cache
from stillroom.tools.ending import ends_when_told
from tests.ray.models import teacher_at


def main(root: str, gate: str, address: str) -> None:
    """Score a cache."""
    pool = RayConfig(workers=(2, 2), num_cpus=0.5, address=address)
    try:
        with ends_when_told():
            report = score_on_ray(Cache.open(root), teacher_at(Path(gate)), pool)
            print(len(report.scored), flush=True)
    except KeyboardInterrupt:
        print("told", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
