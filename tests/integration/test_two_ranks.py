"""Two processes (gloo) end with the weights of one, also where a rank is idle in a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.train.config import ReplayConfig
from stillroom.train.settings import build_settings
from stillroom.train.trainer import ReplayTrainer

pytestmark = pytest.mark.dist

# 11 rows in batches of 5: the last step of an epoch has one row, so one of two ranks is idle.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "optimizer": "SGD",
    "drift_every_steps": 3,
    "replay": {"batch_rows": 5, "max_tokens": 40, "block_rows": 2, "window_rows": 4},
}


def test_two_ranks_equal_one(
    tmp_path: Path, make_cache: Callable[..., Cache], student_dir: Path
) -> None:
    """The same losses, weights and drift, up to the order of float32 sums."""
    cache = make_cache(tmp_path / "root", rows=11)
    config = build_settings(ReplayConfig, SETTINGS, "settings")
    one = ReplayTrainer(
        inspect_model(str(student_dir)), 0, cache, cache.snapshot(), config, tmp_path / "one", "one"
    )
    report = one.train()
    script = Path(__file__).with_name("two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [
        str(tmp_path / "root"),
        str(student_dir),
        str(tmp_path / "two"),
        json.dumps(SETTINGS),
    ]
    subprocess.run(
        [*launch, str(script), *arguments],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["rows"] == report.rows == 22
    assert two["losses"] == pytest.approx(report.losses, rel=1e-5)
    assert two["drift"]["0"] == pytest.approx(report.drift["0"], rel=1e-4)
    weights = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for name, parameter in one.student.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=1e-6), name
