"""A checkpoint of one process goes on with two, and one of two with one: the same losses, students
and figures, whether the two hold the whole student each or a shard of it. So does one that is left
when a rank is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.replay.policies import open_policy
from tests.integration.resume_ranks import run
from tests.integration.test_kill_training import die

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TRAIN: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "optimizer_args": {"eps": 1e-4},
    "device": "cpu",
    "drift_every_steps": 10,
    "save_steps": 3,
    "eval_steps": 2,
    "replay": {"batch_rows": 5, "max_tokens": 40, "block_rows": 2, "window_rows": 4},
}
LORA = {"lora": {"r": 4, "alpha": 8}}
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp-lora": {"parallel": "fsdp", **LORA},
}


def published(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of the policy that a run published."""
    storage = Storage(Path(case["output"]) / "published")
    return load_file(open_policy(storage, 1).folder / "model.safetensors")


def check(case: dict[str, Any], whole: dict[str, Any], first: int = 0) -> None:
    """The same as an unbroken run on one process, losses from a step on."""
    found, expected = (
        json.loads((Path(one["output"]) / "report.json").read_text()) for one in (case, whole)
    )
    assert found["losses"] == pytest.approx(expected["losses"][first:], rel=1e-5)
    assert found["drift"]["0"] == pytest.approx(expected["drift"]["0"], rel=1e-3, abs=1e-7)
    kl = "best_reverse_kl_nats"
    assert found["held_out"][kl] == pytest.approx(expected["held_out"][kl], rel=1e-4)
    assert found["held_out"]["best_step"] == expected["held_out"]["best_step"]
    output = Path(case["output"])
    policy = open_policy(Storage(output / "published"), 1)
    assert inspect_model(str(output / "saved")).fingerprint == policy.fingerprint
    mine, theirs = published(case), published(whole)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.allclose(weight, theirs[name], atol=1e-5), name


def on_two_ranks(cases: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Launch these runs."""
    script = Path(__file__).with_name("resume_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = str(Path(__file__).parents[2])
    return subprocess.run(
        [*launch, str(script), json.dumps(cases)],
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_goes_on_with_another_number_of_processes(
    tmp_path: Path, make_cache: Callable[..., Cache], student_dir: Path
) -> None:
    make_cache(tmp_path / "root", rows=11)
    make_cache(tmp_path / "held", rows=3, seed=5)

    def case(name: str, kind: str, **more: Any) -> dict[str, Any]:
        held = {"eval_root": str(tmp_path / "held")}
        return {
            "output": str(tmp_path / name),
            "root": str(tmp_path / "root"),
            "student": str(student_dir),
            "train": {**TRAIN, **held, **KINDS[kind]},
            **more,
        }

    whole, ranks, back = {}, [], []
    for kind, plain in (("ddp", "ddp"), ("fsdp", "ddp"), ("fsdp-lora", "fsdp-lora")):
        if plain not in whole:
            whole[plain] = case(f"whole-{plain}", plain)
            run(whole[plain])
            run(case(f"first-{plain}", plain, stop=4))
        shutil.copytree(tmp_path / f"first-{plain}", tmp_path / f"one-to-{kind}")
        ranks += [case(f"one-to-{kind}", kind), case(f"{kind}-to-one", kind, stop=4)]
        back.append((case(f"{kind}-to-one", kind), whole[plain]))
    done = on_two_ranks(ranks)
    told = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")]
    assert done.returncode == 0, "\n".join(told) or done.stderr
    for resumed, stopped, (alone, expected) in zip(ranks[::2], ranks[1::2], back, strict=True):
        kind = json.loads((Path(stopped["output"]) / "report.json").read_text())["kind"]
        assert kind == stopped["train"]["parallel"]
        check(resumed, expected, first=4)
        run(alone)
        check(alone, expected, first=4)


def test_goes_on_after_a_rank_was_killed(
    tmp_path: Path, make_cache: Callable[..., Cache], student_dir: Path
) -> None:
    """The first while it seals a checkpoint, then the second in a step."""
    make_cache(tmp_path / "root", rows=11)
    make_cache(tmp_path / "held", rows=3, seed=5)
    more = {"eval_root": str(tmp_path / "held"), "save_steps": 1, "parallel": "fsdp"}
    case = {
        "root": str(tmp_path / "root"),
        "student": str(student_dir),
        "train": {**TRAIN, **more},
    }
    whole = {**case, "output": str(tmp_path / "whole")}
    run(whole)
    case["output"] = str(tmp_path / "killed")
    seal = die("seal_folder", r"/checkpoints/r/", 2)
    left = []
    for point in ({"rank": 0, **seal}, {"rank": 1, **die("step", nth=2)}):
        killed = on_two_ranks([{**case, "die": point}])
        assert killed.returncode != 0
        assert "Signal 9 (SIGKILL)" in killed.stderr
        folders = (tmp_path / "killed" / "checkpoints" / "r").glob("step-*")
        left.append(sorted(int(folder.name[5:]) for folder in folders))
    assert left == [[1], [1, 2]]
    done = on_two_ranks([case])
    assert done.returncode == 0, done.stderr
    assert "resumed from step 2" in done.stdout
    check(case, whole, first=2)
