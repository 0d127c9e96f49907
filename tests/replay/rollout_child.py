"""A rollout worker in a process of its own: `python -m tests.replay.rollout_child ROOT GATE R N`.

R is its rank of N. Says "ready", waits for a line, samples what the stored cycle "plan" asks for,
and prints the parts that it added and lost as JSON. Its sampler answers only once the file GATE
exists.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from stillroom.cache import claims
from stillroom.cache.store import Cache
from stillroom.cache.workers import Worker
from stillroom.replay.cycle import load_cycle
from stillroom.replay.rollout import rollout
from stillroom.replay.sampler import Sampled
from tests.cache.crash_child import no_fsync


class GatedSampler:
    """Waits for a file, and then gives each prompt back, reversed.

    Args:
        gate: the file.
    """

    def __init__(self, gate: str) -> None:
        """Nothing is sampled yet."""
        self.gate = gate

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """See `sampler.StudentSampler`."""
        while not os.path.exists(self.gate):
            time.sleep(0.005)
        for index, prompt in enumerate(prompts):
            yield index, Sampled(prompt[::-1], np.full(len(prompt), -1.0, np.float32), "length")


def main(root: str, gate: str, rank: str, world_size: str) -> None:
    """Sample."""
    claims.RENEW_EVERY_S, os.fsync = 0.02, no_fsync
    cache = Cache.open(root)
    cycle = load_cycle(cache, "plan")
    print("ready", flush=True)
    sys.stdin.readline()
    worker = Worker(rank=int(rank), world_size=int(world_size))
    report = rollout(cache, cycle, lambda: GatedSampler(gate), worker=worker)
    print(json.dumps({"added": report.added, "lost": report.lost}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
