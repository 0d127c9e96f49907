"""`stillroom train`, and the training of `run`, killed: started again they go on with that very
run, or say why they cannot; a student that was published is not trained again."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.replay.policies import (
    Policy,
    policy_path,
    policy_versions,
    put_policy,
    read_policy,
    register_initial,
)
from tests.integration.test_kill import Runner, Settings
from tests.integration.test_kill_training import die

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RESUMED = re.compile(r"resumed from step (\d+) of (\S+)")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """One for all tests here."""
    made = Runner()
    yield made
    made.close()


class Job:
    """`stillroom train` on a cache of its own."""

    def __init__(self, runner: Runner, cache: Cache, student: Path, folder: Path) -> None:
        """Make the student policy 0."""
        self._runner, self.cache, self.output = runner, cache, folder / "out"
        self.student = inspect_model(str(student))
        register_initial(cache.storage, self.student, "init")

    def run(self, point: dict[str, Any] | None = None) -> int:
        """Run it; returns the signal that ended it."""
        where = ["--root", str(self.cache.storage.root), "--output", str(self.output)]
        how = ["--run-name", "tiny", "--train.device", "cpu", "--train.save-steps", "1"]
        rows = ["--train.replay.batch-rows", "4"]
        request = {"settings": {"output": str(self.output)}}
        return self._runner.ask({**request, "command": ["train", *where, *how, *rows]}, point)

    @property
    def said(self) -> str:
        """By all processes so far."""
        return self.output.with_suffix(".log").read_text()

    def publish(self, version: int) -> None:
        """Another run publishes the same student as this version."""
        path, fingerprint = str(self.student.folder), self.student.fingerprint
        other = Policy(
            version=version, run="other", parent=0, step=1, path=path, fingerprint=fingerprint
        )
        assert put_policy(self.cache.storage, other)


@pytest.fixture
def job(runner: Runner, make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path) -> Job:
    """One that has not begun."""
    return Job(runner, make_cache(tmp_path / "root"), student_dir, tmp_path)


def test_an_unfinished_run_is_gone_on_with(job: Job) -> None:
    """Though a policy was published meanwhile; one that took its own place is told of at once."""
    assert job.run(die("step", nth=3)) == signal.SIGKILL
    storage = job.cache.storage
    for version in (1, 2):
        job.publish(version)
    with pytest.raises(AssertionError, match="policy 1 of other, published meanwhile"):
        job.run()
    assert not RESUMED.search(job.said), "it does not train for nothing"
    (storage.folder / policy_path(1)).unlink()
    assert job.run() == 0
    assert "going on with tiny-000000, which was not finished" in job.said
    ((step, place),) = RESUMED.findall(job.said)
    assert (step, Path(place).name) == ("2", "tiny-000000")
    published = read_policy(storage, 1)
    assert (published.run, published.parent) == ("tiny", 0)
    assert (job.output / "tiny-000000.json").is_file()


@pytest.mark.parametrize("point", ["announced", "published"])
def test_a_published_student_is_not_trained_again(job: Job, point: str) -> None:
    put = {"call": "put", "match": r"^policies/000001", "nth": 1, "when": "before"}
    recorded = {"call": "file", "match": r"tiny-000000\.json", "nth": 1, "when": "before"}
    assert job.run(put if point == "announced" else recorded) == signal.SIGKILL
    assert job.run() == 0
    storage = job.cache.storage
    assert policy_versions(storage) == [0, 1]
    assert storage.list("pins") == []
    record = json.loads((job.output / "tiny-000000.json").read_bytes())
    assert record["published"]["fingerprint"] == read_policy(storage, 1).fingerprint
    assert record["steps"] == 3
    again = RESUMED.search(job.said) is not None
    assert again == (point == "announced")
    assert ("had trained and published before it was ended" in job.said) != again


def test_a_round_that_published_is_not_trained_again(
    runner: Runner, run_settings: Settings, tmp_path: Path
) -> None:
    """Where it could not give the same bits: with less memory."""
    settings = run_settings(tmp_path) | {"rounds": 1}
    point = {"call": "file", "match": "train-0", "nth": 1, "when": "before"}
    assert runner.run(settings, point) == signal.SIGKILL
    storage = Cache.open(settings["root"]).storage
    before = read_policy(storage, 1)
    settings["train"]["replay"]["max_tokens"] = 128
    assert runner.run(settings) == 0
    assert not RESUMED.search((tmp_path / "out.log").read_text())
    assert read_policy(storage, 1) == before
    assert storage.list("pins") == []
    record = json.loads((tmp_path / "out" / "stages" / "train-0.json").read_bytes())
    assert record["values"]["steps"] == 4
