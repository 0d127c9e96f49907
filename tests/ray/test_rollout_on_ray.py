"""Sampling on a Ray cluster: each unit is sampled once, although a process is killed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.part import part_name
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.store import Cache
from stillroom.replay.cycle import plan_cycle, store_cycle
from stillroom.replay.rollout_on_ray import rollout_on_ray
from stillroom.replay.sampler import SamplerConfig
from tests.ray.models import sampler_at
from tests.ray.test_score_on_ray import in_thread, wait_for, waiting
from tests.replay.conftest import IDENTITY, make_prompts

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")]


def test_each_unit_is_sampled_once(cluster: Any, tmp_path: Path, gate: Path) -> None:
    cache = Cache.create(tmp_path / "cache", IDENTITY)
    config = SamplerConfig(max_new_tokens=4)
    cycle = plan_cycle(make_prompts(4), config, policy_version=0, seed=1, unit_rollouts=1)
    store_cycle(cache, "plan", cycle)
    pool = RayConfig(workers=(2, 2))
    job = in_thread(lambda: rollout_on_ray(cache, "plan", sampler_at(gate), pool))
    wait_for(job, lambda: len(waiting(gate)) == 2)
    os.kill(waiting(gate)[0], signal.SIGKILL)
    wait_for(job, lambda: len(waiting(gate)) == 3)
    gate.touch()
    report = job.result(120)
    assert sorted(report.added) == sorted(part_name(0, unit.id) for unit in cycle.units)
    assert (report.lost, report.rollouts) == ([], 4)
    assert cache.parts() == sorted(report.added)
