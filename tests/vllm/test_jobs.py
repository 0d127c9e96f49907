"""The jobs with vLLM behind them: what `stillroom rollout` samples and `stillroom score` scores is
what transformers gives, within what the canary allows of one and the same engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.agreement import check_agreement
from stillroom.cache.canary import SAME_CLASS, check_canary
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.cache.teacher import TeacherConfig
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.tools.cli import main
from tests.vllm.conftest import ENGINE_ARGS, IN_PROCESS, save_model

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
STILLROOM = Path(sys.executable).with_name("stillroom")
TIMEOUT_S = 300


def run(environment: dict[str, str], *arguments: object) -> None:
    """A command in a process of its own."""
    done = subprocess.run(
        [str(STILLROOM), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


def test_rollout_and_score(tmp_path: Path, teacher_model: Path, prompts_file: Path) -> None:
    """Sampled in the process of the job, scored in one that vLLM starts, as it does by itself."""
    root, other = tmp_path / "root", tmp_path / "other"
    student = save_model(tmp_path / "student", 5)
    teacher = ("--teacher.model", teacher_model)
    assert main(["init", "--root", str(root), *map(str, teacher), "--topk", "16"]) == 0
    arguments = json.dumps(ENGINE_ARGS)
    sampler = ("--sampler.backend", "vllm", "--sampler.vllm.engine-args", arguments)
    sizes = ("--sampler.max-new-tokens", 20, "--sampler.samples-per-prompt", 2)
    prompts = ("--prompts.source", prompts_file, "--student", student)
    run(IN_PROCESS, "rollout", "--root", root, *prompts, *sampler, *sizes)
    shutil.copytree(root, other)
    vllm = ("--teacher.backend", "vllm", "--teacher.vllm.engine-args", arguments)
    run({}, "score", "--root", root, *teacher, *vllm)
    assert main(["score", "--root", str(other), *map(str, teacher), "--teacher.device=cpu"]) == 0
    ours, theirs = Cache.open(root), Cache.open(other)
    (part,) = ours.parts()
    assert ours.commit_of(part).rows == 24
    mine, its = ours.read(part), theirs.read(part)
    check_agreement(mine, part)
    difference = np.abs(mine["sampled_logprob"] - its["sampled_logprob"])
    assert difference.max() < 5e-4
    assert (mine["behaviour_logprob"] == its["behaviour_logprob"]).all()
    assert np.isfinite(mine["behaviour_logprob"]).all()
    config = TeacherConfig(model=str(teacher_model), device="cpu")
    reference = TransformersTeacher(inspect_model(str(teacher_model)), config)
    found = check_canary(ours, reference, accept_numerics=True)
    assert found is not None
    assert found.within(SAME_CLASS)
    classes = [entry.path for entry in ours.storage.list("canary")]
    assert any("vllm-0.32.0-float32-" in path for path in classes)
