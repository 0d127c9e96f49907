"""Scoring on a Ray cluster: whatever dies, every part is scored once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from stillroom.cache.claims import Claims
from stillroom.cache.errors import CorruptError, MismatchError, MissingError
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.score import score
from stillroom.cache.score_on_ray import score_on_ray
from stillroom.cache.store import Cache
from tests.cache.fakes import FakeTeacher, make_meta, make_rollout, make_table, random_rollouts
from tests.ray.models import load_deadly, load_other, teacher_at

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")]
Report = TypeVar("Report")
POOL = RayConfig(workers=(2, 2))


def waiting(gate: Path) -> list[int]:
    """Processes that have waited at the gate, oldest first."""
    notes = sorted(gate.parent.glob("waits-*"), key=lambda note: note.stat().st_mtime_ns)
    return [int(note.name.removeprefix("waits-")) for note in notes]


def in_thread(job: Callable[[], Report]) -> "Future[Report]":
    """Run a job in a thread that does not outlive the tests."""
    future: Future[Report] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(job: "Future[Report]", true: Callable[[], object]) -> None:
    """Wait until something is so; the job does not end before."""
    end = time.monotonic() + 120
    while not true():
        assert not job.done(), job.result()
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_killed_process_and_a_killed_node_cost_no_part(
    cluster: Any, cache: Cache, gate: Path
) -> None:
    job = in_thread(lambda: score_on_ray(cache, teacher_at(gate), POOL))
    wait_for(job, lambda: len(waiting(gate)) == 2)
    assert len(cache.storage.list("claims")) == 2
    os.kill(waiting(gate)[0], signal.SIGKILL)
    wait_for(job, lambda: len(waiting(gate)) == 3)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    gate.touch()
    report = job.result(120)
    cluster.add_node(num_cpus=1)
    parts = cache.parts()
    assert sorted(report.scored) == parts, "the driver's report has every part"
    assert report.lost == []
    assert report.positions == sum(cache.commit_of(part).positions for part in parts)
    assert report.teacher_s > 0
    assert set(cache.commits().values()) == {0}
    attempts = {entry.path.split("/")[2] for entry in cache.storage.list("scores")}
    assert len(attempts) == len(parts), "none was scored twice"


def test_a_process_loads_its_teacher_once_and_the_pool_grows(
    cluster: Any, cache: Cache, gate: Path
) -> None:
    job = in_thread(lambda: score_on_ray(cache, teacher_at(gate), RayConfig(workers=(1, 2))))
    wait_for(job, lambda: len(waiting(gate)) == 2)
    gate.touch()
    assert sorted(job.result(120).scored) == cache.parts()
    notes = [note.read_text() for note in gate.parent.glob("loaded-*")]
    assert notes == ["loaded\n"] * 2
    assert score_on_ray(cache, load_other, POOL).scored == [], "nothing to do starts nothing"


def test_another_teacher_is_the_drivers_error(cluster: Any, cache: Cache, gate: Path) -> None:
    score(cache, FakeTeacher())
    cache.add_part(random_rollouts(99, 2), make_meta(99))
    with pytest.raises(MismatchError, match="canary") as caught:
        score_on_ray(cache, load_other, RayConfig())
    assert type(caught.value) is MismatchError
    assert cache.unscored() == [make_meta(99).name]


def test_parts_that_others_hold_come_last(cluster: Any, cache: Cache, gate: Path) -> None:
    gate.touch()
    held, other = cache.parts()[0], Claims(cache.storage)
    assert other.take(held)
    job = in_thread(lambda: score_on_ray(cache, teacher_at(gate), RayConfig()))
    wait_for(job, lambda: cache.unscored() == [held])
    other._put(held, working=False)
    report = job.result(120)
    assert (sorted(report.scored), report.lost) == (cache.parts(), [])


def test_parts_that_fail_or_kill_are_named_once_all_others_are_done(
    cluster: Any, cache: Cache
) -> None:
    good = cache.parts()
    table = make_table([make_rollout(prompt=[1], completion=[2])])
    assert cache.add_part(table, make_meta(98))
    with pytest.raises(MissingError, match=f"^part {make_meta(98).name} on Ray: .* died 5 times"):
        score_on_ray(cache, load_deadly, RayConfig())
    assert sorted(cache.commits()) == good
    path = cache.storage.folder / f"rollouts/{make_meta(98).name}.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    cache.add_part(random_rollouts(99, 2), make_meta(99))
    with pytest.raises(CorruptError, match=make_meta(98).name):
        score_on_ray(cache, load_deadly, RayConfig())
    assert cache.unscored() == [make_meta(98).name]
