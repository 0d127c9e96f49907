"""Whatever dies, at any point: starting `run` again ends with what an unbroken run ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.store import Cache
from stillroom.replay.policies import policy_versions, read_policy

pytestmark = pytest.mark.dist

Settings = Callable[[Path], dict[str, Any]]


def put(match: str, nth: int = 1, when: str = "before") -> dict[str, Any]:
    """Die at a put of an object."""
    return {"call": "put", "match": match, "nth": nth, "when": when}


POINTS = {
    "identity written": put(r"^cache\.json", 1, "after"),
    "between two parts of a rollout": put(r"^rollouts/v000000", 6),
    "attempt written, no commit": put(r"^commits/v000000", 6),
    "after a checkpoint": {"call": "step", "nth": 3, "when": "before"},
    "weights written, not published": put(r"^policies/000001"),
    "published, not recorded": {"call": "file", "match": r"train-0", "nth": 1, "when": "before"},
}
MORE_POINTS = {
    "first object of all": put(r"^probe/"),
    "plan written, nothing sampled": put(r"^units/v000000", 2, "after"),
    "shard written, no manifest": put(r"shard\.zarr\.zip$", 6, "after"),
    "commit written, nothing after": put(r"^commits/v000000", 6, "after"),
    "before the second step": {"call": "step", "nth": 2, "when": "before"},
    "before weights are written": {"call": "folder", "match": "", "nth": 1, "when": "before"},
    "measured, not recorded": {"call": "file", "match": r"measure-1", "nth": 1, "when": "before"},
    "second round": put(r"^commits/v000001", 3),
}


class Runner:
    """The process that forks the runs."""

    def __init__(self) -> None:
        """Start it."""
        script = Path(__file__).with_name("killed_run.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, settings: dict[str, Any], point: dict[str, Any] | None = None) -> int:
        """Run once; returns the signal that ended it, 0 for a run that finished."""
        return self.ask({"settings": settings}, point)

    def ask(self, request: dict[str, Any], point: dict[str, Any] | None = None) -> int:
        """Ask for something else than a run; returns the same."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({**request, "point": point}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        log = Path(request["settings"]["output"]).with_suffix(".log").read_text()
        assert answer["signal"] or not answer["status"], log[-3000:]
        return int(answer["signal"])

    def close(self) -> None:
        """End it."""
        self._process.communicate()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """One for all tests here."""
    made = Runner()
    yield made
    made.close()


def left(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run left that matters: plans, rollouts, scores, policies, figures."""
    found: dict[str, Any] = {}
    for root in (settings["root"], f"{settings['output']}/held_out"):
        cache = Cache.open(root)
        assert not cache.unscored()
        for prefix in ("units", "rollouts"):
            for entry in cache.storage.list(prefix):
                found[f"{root}/{entry.path}"] = jsonfile.digest(cache.storage.get(entry.path))
        for entry in cache.storage.list("drift"):
            drift = jsonfile.load_sealed(cache.storage.get(entry.path), entry.path)
            found[re.sub("(-[0-9a-f]{16}){2}/", "/", f"{root}/{entry.path}")] = drift["by_policy"]
        assert len(cache.storage.list("commits")) == len(cache.commits()) == len(cache.parts())
        for part, n in cache.commits().items():
            commit = read_commit(cache.storage, commit_path(part, n))
            shard = cache.shard(commit).manifest
            found[part] = (n, commit.rollouts_hash, commit.positions, shard.hash)
        for version in policy_versions(cache.storage):
            found[f"policy {version}"] = read_policy(cache.storage, version).fingerprint
    summary = json.loads((Path(settings["output"]) / "summary.json").read_text())
    for done in summary["rounds"]:
        found[f"round {done['version']}"] = (done["positions"], done["replayed_positions"])
        found[f"after {done['version']}"] = done["after"]
    return {name.replace(settings["root"].removesuffix("root"), ""): v for name, v in found.items()}


@pytest.fixture(scope="module")
def unbroken(
    runner: Runner, run_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a run leaves that nobody disturbs."""
    settings = run_settings(tmp_path_factory.mktemp("unbroken"))
    assert runner.run(settings) == 0
    return left(settings)


@pytest.mark.parametrize(
    "name", [*POINTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_POINTS)]
)
def test_killed_run_ends_like_an_unbroken_one(
    runner: Runner,
    run_settings: Settings,
    unbroken: dict[str, Any],
    tmp_path: Path,
    name: str,
) -> None:
    """The same parts, commits, weights and figures, to the bit; no part twice."""
    settings = run_settings(tmp_path)
    assert runner.run(settings, (POINTS | MORE_POINTS)[name]) == signal.SIGKILL
    assert runner.run(settings) == 0
    assert left(settings) == unbroken


@pytest.mark.slow
def test_killed_at_every_third_put(
    runner: Runner, run_settings: Settings, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    """Runs that die at their first put, their fourth, and so on; each is then continued."""
    nth = 1
    while True:
        settings = run_settings(tmp_path / str(nth))
        (tmp_path / str(nth)).mkdir()
        if runner.run(settings, put("", nth, "before" if nth % 2 else "after")) == 0:
            break
        assert runner.run(settings) == 0
        assert left(settings) == unbroken
        nth += 3
    assert nth > 40
