"""`stillroom train` publishes the same student however its processes are launched, and says what
it does not read of what a launcher was told."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.replay.policies import policy_folder, read_policy, register_initial

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BIN = Path(sys.executable).parent
FLAGS = {
    "run-name": "launched",
    "train.device": "cpu",
    "train.optimizer": "SGD",
    "train.learning-rate": "0.01",
    "train.replay.batch-rows": "5",
    "train.replay.max-tokens": "40",
}


def free_port() -> str:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launchers() -> dict[str, list[str]]:
    """What stands in front of the command."""
    accelerate = [str(BIN / "accelerate"), "launch", "--cpu", "--num_machines", "1"]
    ranks = ["--num_processes", "2", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    return {
        "alone": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
        "accelerate": [*accelerate, *ranks, "--main_process_port", free_port()],
    }


def test_every_launcher_gives_the_same(
    tmp_path: Path, make_cache: Callable[..., Cache], student_dir: Path
) -> None:
    cache = make_cache(tmp_path / "root", rows=11)
    register_initial(cache.storage, inspect_model(str(student_dir)), "init")
    found: dict[str, Any] = {}
    for name, launcher in launchers().items():
        root, output = tmp_path / name / "root", tmp_path / name / "out"
        shutil.copytree(tmp_path / "root", root)
        flags = FLAGS | {"root": str(root), "output": str(output)}
        if name != "alone":
            flags["train.parallel"] = {"torchrun": "fsdp", "accelerate": "ddp"}[name]
        command = [str(BIN / "stillroom"), "train"]
        done = subprocess.run(
            [*launcher, *command, *(f"--{key}={value}" for key, value in flags.items())],
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("train: policy 0 -> 1") == 1, "one rank publishes, and says so"
        told = int(name == "accelerate")
        assert done.stdout.count("launcher asks for precision bf16, which is not read") == told
        storage = Cache.open(str(root)).storage
        found[name] = load_file(
            policy_folder(storage, read_policy(storage, 1)) / "model.safetensors"
        )
        assert (output / "launched-000000.json").is_file()
    for name in ("torchrun", "accelerate"):
        assert found[name].keys() == found["alone"].keys()
        for key, weight in found["alone"].items():
            assert abs(found[name][key] - weight).max() < 1e-6, f"{name}: {key}"
