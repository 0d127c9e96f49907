"""Jobs on Ray that end from outside: the driver is told to end, or the cluster's head is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import FakeTeacher
from tests.ray.conftest import ROOT
from tests.ray.test_score_on_ray import waiting

pytestmark = pytest.mark.ray


@contextmanager
def driver(cache: Cache, gate: Path, address: str, **environ: str) -> Iterator[Any]:
    """A driver, once two processes of its pool wait at the gate. Whatever of it is left is killed
    in the end: it leads a session of its own."""
    command = [sys.executable, "-m", "tests.ray.driver_child", cache.storage.root, str(gate)]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": str(ROOT), **environ}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, address], cwd=ROOT, env=env, text=True, stdout=pipe, start_new_session=True
    ) as process:
        try:
            wait_for(lambda: process.poll() is not None or len(waiting(gate)) == 2)
            assert process.poll() is None
            yield process
        finally:
            process.kill()


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_driver_that_is_told_to_end_ends_as_it_likes(
    cluster: Any, cache: Cache, gate: Path
) -> None:
    with driver(cache, gate, cluster.address) as process:
        os.kill(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=120)[0] == "told\n"
        assert process.returncode == 0
    wait_for(lambda: all(map(is_gone, waiting(gate))))
    assert sorted(score(cache, FakeTeacher()).scored) == cache.parts()


def gcs_of(driver_pid: int) -> int:
    """The head of the cluster that a driver started: its child of that name."""
    for folder in Path("/proc").iterdir():
        try:
            text = (folder / "stat").read_text() if folder.name.isdecimal() else ""
        except OSError:
            continue
        if "(gcs_server)" in text and int(text.rpartition(")")[2].split()[1]) == driver_pid:
            return int(folder.name)
    raise AssertionError("no head")


def test_a_lost_head_costs_what_was_not_committed_and_nothing_else(
    cache: Cache, gate: Path
) -> None:
    with driver(cache, gate, "local", RAY_gcs_rpc_server_reconnect_timeout_s="3") as process:
        workers = waiting(gate)
        os.kill(gcs_of(process.pid), signal.SIGKILL)
        gate.touch()
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, out) in ((1, ""), (0, f"{len(cache.parts())}\n"))
    wait_for(lambda: all(map(is_gone, workers)))
    done = set(cache.commits())
    again = score(cache, FakeTeacher())
    assert {*again.scored} == {*cache.parts()} - done
    assert again.lost == []
    assert set(cache.commits().values()) == {0}
    attempts = {tuple(entry.path.split("/")[1:3]) for entry in cache.storage.list("scores")}
    assert len(attempts) == len(cache.parts()), "none was scored twice"
