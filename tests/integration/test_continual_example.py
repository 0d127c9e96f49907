"""The example of continual learning, on tiny models: what is learned drifts, and replay wins back
what was."""

import json
import runpy
from pathlib import Path
from typing import Any

import datasets
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "continual" / "continual.py"
SIZES = {
    "documents": 12,
    "row_tokens": 48,
    "measured_rows": 24,
    "answer_tokens": 12,
    "learning_steps": 12,
    "replay_steps": 24,
    "learning_rate": 3e-3,
    "replay_learning_rate": 3e-3,
}


def test_replay_wins_back_what_fine_tuning_lost(
    student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    example: Any = runpy.run_path(str(EXAMPLE))
    found = example["run"](tmp_path / "out", example["Settings"](original=student_dir, **SIZES))
    assert json.loads((tmp_path / "out" / "measured.json").read_text()) == found
    assert list(found) == ["original", "fine-tuned", "replayed", "fine-tuned on"]
    loss = {name: values["text_loss_nats"] for name, values in found.items()}
    assert loss["fine-tuned on"] < loss["fine-tuned"] < loss["original"]
    assert loss["replayed"] < loss["original"], "what was learned is not all lost again"
    for kl in ("forward_kl_nats", "reverse_kl_nats"):
        assert found["original"][kl] == pytest.approx(0, abs=1e-3)
        assert found["fine-tuned"][kl] > 0.01
        assert found["replayed"][kl] < 0.7 * found["fine-tuned"][kl]
        assert found["fine-tuned on"][kl] > found["fine-tuned"][kl]
