"""`stillroom score` and `rollout` as one of several workers, and as a service."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.claims import claim_path
from stillroom.cache.store import Cache
from stillroom.cache.workers import LAUNCHERS, WORLD_SIZE

BIN = Path(sys.executable).parent


@pytest.fixture
def flags(
    tmp_path: Path,
    teacher_dir: Path,
    student_dir: Path,
    prompts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[object]]:
    """Flags of the jobs on one root, and no launcher."""
    for name in (WORLD_SIZE, *(name for pair in LAUNCHERS for name in pair if name)):
        monkeypatch.delenv(name, raising=False)
    root: list[object] = ["--root", tmp_path / "cache"]
    teacher: list[object] = ["--teacher.model", teacher_dir, "--teacher.device", "cpu"]
    prompts: list[object] = ["--student", student_dir, "--prompts.source", prompts_file]
    sampler = ["--sampler.max-new-tokens", 4, "--sampler.device", "cpu"]
    plan = ["--refresh.prompts-per-cycle", 6, "--refresh.unit-rollouts", 2]
    return {
        "init": [*root, *teacher, "--topk", 8],
        "rollout": [*root, *prompts, *sampler, *plan],
        "score": [*root, *teacher],
    }


@pytest.mark.usefixtures("quiet_jobs")
def test_a_rank_helps_until_all_is_done(
    flags: dict[str, list[object]], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one never starts; its launcher is Slurm, and then Kubernetes."""
    assert run("init", *flags["init"]).status == 0
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    ran = run("rollout", *flags["rollout"])
    assert ran.status == 0, ran.err
    assert "3 of 3 parts added" in ran.out
    assert "0 of 3 parts added" in run("rollout", *flags["rollout"]).out
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert run("score", *flags["score"]).status == 2, "Kubernetes does not say how many there are"
    ran = run("score", *flags["score"], "--world-size", 2)
    assert ran.status == 0, ran.err
    assert Cache.open(tmp_path / "cache").unscored() == []
    ran = run("score", *flags["score"], "--world-size", 2, "--again", "v000000-0")
    assert (ran.status, "again: expected one worker" in ran.err) == (2, True)


@pytest.mark.usefixtures("quiet_jobs")
def test_scores_stay_in_use_where_the_teacher_cannot_give_others(
    flags: dict[str, list[object]], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("init", "rollout", "score"):
        assert run(command, *flags[command]).status == 0
    cache = Cache.open(tmp_path / "cache")
    part, *_ = cache.parts()
    monkeypatch.setattr("stillroom.cache.score.longest_row_of", lambda _: 3)
    for choice in ("skip", "refuse"):
        ran = run("score", *flags["score"], "--again", part, "--too-long", choice)
        assert (ran.status, "longer ones" in ran.err) == (2, True), ran.err
    assert set(cache.commits().values()) == {0}


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("score", ["--rank", 1], "rank: expected the number of workers with it"),
        ("score", ["--rank", 2, "--world-size", 2], "rank: expected 0 to 1"),
        ("rollout", ["--world-size", 2], "world_size: expected a rank, for 2 workers"),
        ("score", ["--engine", "spark"], "engine: expected one of"),
        ("score", ["--engine", "ray", "--rank", 1], "rank, world_size: expected none"),
        ("rollout", ["--engine", "ray", "--world-size", 2], "rank, world_size: expected none"),
        ("score", ["--engine", "ray", "--watch"], "watch: expected the engine local"),
        ("score", ["--again", "v000000-0", "--watch"], "again: expected no --watch with it"),
        ("score", ["--again", "v000000-0", "--engine", "ray"], "again: expected the engine local"),
        ("score", ["--too-long", "cut"], "too_long: expected one of"),
        ("score", ["--watch-s", 0], "watch_s: expected a finite number above 0"),
        ("score", ["--ray.workers", 2, 1], "ray.workers: expected at least 1"),
        ("score", ["--ray.num-gpus", -1], "ray.num_cpus, num_gpus: expected 0 or more"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    flags: dict[str, list[object]], run: Any, command: str, more: list[object], said: str
) -> None:
    ran = run(command, *flags[command], *more)
    assert ran.status == 2
    assert said in ran.err


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.dist
@pytest.mark.slow
def test_a_service_scores_what_arrives_and_ends_well(
    flags: dict[str, list[object]], tmp_path: Path
) -> None:
    def command(name: str, *more: object) -> list[str]:
        return [str(BIN / "stillroom"), name, *map(str, [*flags[name], *more])]

    subprocess.run(command("init"), check=True)
    cache = Cache.open(tmp_path / "cache")
    watching = command("score", "--watch", "--watch-s", 0.2)
    pipe = subprocess.PIPE
    with subprocess.Popen(watching, text=True, stdout=pipe, stderr=pipe) as process:
        subprocess.run(command("rollout"), check=True)
        parts = cache.parts()
        assert len(parts) == 3
        wait_for(lambda: process.poll() is not None or not cache.unscored())
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "3 parts" in out
    assert "score: waiting for new parts" in err
    for part in parts:
        assert not jsonfile.load_sealed(cache.storage.get(claim_path(part)), "claim")["working"]


@pytest.mark.usefixtures("quiet_jobs")
def test_rows_that_are_too_long_for_the_engine(
    flags: dict[str, list[object]], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillroom.cache.transformers_teacher import TransformersTeacher

    assert run("init", *flags["init"]).status == 0
    assert run("rollout", *flags["rollout"]).status == 0
    cache = Cache.open(tmp_path / "cache")
    lengths = {part: int(cache.row_lengths(part).max()) for part in cache.parts()}
    longest = max(lengths.values())
    fit = [part for part, length in lengths.items() if length < longest]
    monkeypatch.setattr(TransformersTeacher, "longest_row", longest - 1, raising=False)
    ran = run("score", *flags["score"])
    assert ran.status == 2
    assert f"rows to score: expected at most {longest - 1} tokens" in ran.err
    assert cache.commits() == {}
    ran = run("score", *flags["score"], "--too-long", "skip")
    assert ran.status == 1, ran.err
    assert f"{3 - len(fit)} parts are not scored, such as " in ran.out
    assert sorted(cache.commits()) == fit
    ran = run("estimate", *flags["score"], "--too-long", "skip")
    assert ran.status == 0, ran.err
