"""Several rollout workers at once, in processes of their own: each unit is sampled once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.part import part_name
from stillroom.cache.store import Cache
from stillroom.cache.workers import Worker
from stillroom.replay.cycle import plan_cycle, store_cycle
from stillroom.replay.sampler import SamplerConfig
from tests.replay.conftest import make_prompts

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[[], list[subprocess.Popen[str]]]
pytestmark = pytest.mark.dist


@pytest.fixture
def parts(empty_cache: Cache) -> list[str]:
    """A stored plan of 12 units; the parts that they become."""
    config = SamplerConfig(max_new_tokens=4)
    cycle = plan_cycle(make_prompts(12), config, policy_version=0, seed=1, unit_rollouts=1)
    store_cycle(empty_cache, "plan", cycle)
    return sorted(part_name(0, unit.id) for unit in cycle.units)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """While this file is missing, samplers hang."""
    return tmp_path / "gate"


@pytest.fixture
def start(empty_cache: Cache, parts: list[str], gate: Path) -> Iterator[Start]:
    """Starts ranks 0 and 1 of 2; they sample at once."""
    root = empty_cache.storage.root

    def start_both() -> list[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "tests.replay.rollout_child", root, str(gate)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started = []
        for rank in range(2):
            process = subprocess.Popen([*command, str(rank), "2"], cwd=ROOT, text=True, **pipes)
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return started

    with ExitStack() as stack:
        yield start_both


def ended(process: subprocess.Popen[str]) -> dict[str, list[str]]:
    """What a worker says in the end."""
    assert process.stdout is not None
    report: dict[str, list[str]] = json.loads(process.stdout.readline())
    assert process.wait(timeout=60) == 0
    return report


def test_ranks_share_the_units(
    empty_cache: Cache, parts: list[str], gate: Path, start: Start
) -> None:
    gate.touch()
    reports = [ended(process) for process in start()]
    assert sorted(part for report in reports for part in report["added"]) == parts, "each once"
    assert [report["lost"] for report in reports] == [[], []], "and none sampled for nothing"
    assert empty_cache.parts() == parts
    for rank, report in enumerate(reports):
        mine = [Worker(rank=rank, world_size=2).owns(part) for part in report["added"]]
        assert mine == sorted(mine, reverse=True), "others' units come last"


def test_the_other_rank_samples_what_a_killed_one_had_begun(
    empty_cache: Cache, parts: list[str], gate: Path, start: Start
) -> None:
    killed, other = start()
    end = time.monotonic() + 60
    while len(empty_cache.storage.list("claims")) < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(timeout=60)
    gate.touch()
    report = ended(other)
    assert sorted(report["added"]) == parts
    assert report["lost"] == []
