"""`stillroom rollout` and `stillroom score` with the engine ray, on a laptop: Ray starts here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.cache.store import Cache

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent


def test_the_commands_run_on_a_ray_of_their_own(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, prompts_file: Path
) -> None:
    root = ["--root", str(tmp_path / "cache")]
    teacher = ["--teacher.model", teacher_dir.name, "--teacher.device", "cpu"]
    student = ["--student", str(student_dir), "--prompts.source", str(prompts_file)]
    sampler = ["--sampler.max-new-tokens", "4", "--sampler.device", "cpu"]
    plan = ["--refresh.prompts-per-cycle", "6", "--refresh.unit-rollouts", "3"]
    ray = ["--engine", "ray", "--ray.address", "local", "--ray.num-cpus", "0.5"]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    said = []
    for command in (
        ["init", *root, *teacher, "--topk", "8"],
        ["rollout", *root, *student, *sampler, *plan, *ray],
        ["score", *root, *teacher, *ray, "--ray.num-gpus", "1000"],
        ["score", *root, *teacher, *ray],
    ):
        ran = subprocess.run(
            [str(BIN / "stillroom"), *command],
            cwd=teacher_dir.parent,
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ran.returncode == (2 if "1000" in command else 0), ran.stderr[-4000:]
        said.append(ran.stdout + ran.stderr)
    assert "2 of 2 parts added, 6 rollouts" in said[1]
    assert "ray.num_cpus, num_gpus: expected a machine with 0.5 CPUs and 1000 GPUs" in said[2]
    assert "2 parts" in said[3]
    assert Cache.open(tmp_path / "cache").unscored() == []
