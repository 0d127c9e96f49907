"""Settings of a small run on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts that are in no other file."""
    path = tmp_path_factory.mktemp("held") / "held_out.jsonl"
    rows = [{"prompt_name": f"h{i}", "prompt": f"held {i}: abc"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def run_settings(
    teacher_dir: Path, student_dir: Path, prompts_file: Path, held_out_file: Path
) -> Callable[[Path], dict[str, Any]]:
    """Settings of a two-round run below a folder, as a YAML file would give them."""

    def make(folder: Path) -> dict[str, Any]:
        return {
            "root": str(folder / "root"),
            "output": str(folder / "out"),
            "student": str(student_dir),
            "teacher": {"model": str(teacher_dir), "device": "cpu"},
            "prompts": {"source": str(prompts_file)},
            "held_out": {"source": str(held_out_file)},
            "rounds": 2,
            "topk": 16,
            "sampler": {"max_new_tokens": 8, "device": "cpu"},
            "refresh": {"prompts_per_cycle": 6, "unit_rollouts": 3},
            "train": {
                "num_train_epochs": 2,
                "learning_rate": 1e-2,
                "device": "cpu",
                "drift_every_steps": 3,
                "save_steps": 2,
                "replay": {"batch_rows": 3, "max_tokens": 256, "block_rows": 2, "window_rows": 4},
            },
        }

    return make
