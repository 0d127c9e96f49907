"""A training in phases that is killed in any of them goes on to the losses and weights of an
unbroken one, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.pins import active_pins
from stillroom.cache.store import Cache
from tests.integration.test_kill import Runner
from tests.integration.test_kill_training import die, ended, losses

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 12
POINTS = {
    "before the first checkpoint": die("step", nth=2),
    "fine-tuning again": die("step", nth=8),
    "between phases": die("step", nth=4, when="after"),
    "replaying another cache": die("step", nth=6),
    "inside a checkpoint between phases": die("seal_folder", "/checkpoints/r/", 2),
    "trained, not ended": die("step", nth=STEPS, when="after"),
}


def test_killed_phases_go_on_to_the_bit(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    root, other, text = (tmp_path / name for name in ("root", "other", "text.jsonl"))
    make_cache(root)
    replayed = make_cache(other, seed=7)
    text.write_text("".join(json.dumps({"text": "abc " * n}) + "\n" for n in range(1, 8)))
    supervised = {"source": str(text), "batch_rows": 3, "max_length": 24, "max_tokens": 64}
    train: dict[str, Any] = {
        "phases": [
            {"supervised": supervised, "max_steps": 2, "learning_rate": 3e-3},
            {"max_steps": 2},
            {"root": str(other), "max_steps": 2, "objective": {"kind": "reverse"}},
        ],
        "phase_cycles": 2,
        "learning_rate": 1e-2,
        "device": "cpu",
        "save_steps": 2,
        "replay": {"batch_rows": 3, "max_tokens": 256, "block_rows": 2, "window_rows": 4},
    }

    def request(output: Path) -> dict[str, Any]:
        settings = {"output": str(output), "train": train}
        return {"settings": settings, "train": {"root": str(root), "student": str(student_dir)}}

    runner, whole = Runner(), tmp_path / "whole"
    try:
        assert runner.ask(request(whole)) == 0
        assert len(losses(whole)) == STEPS
        for number, (name, point) in enumerate(POINTS.items()):
            output = tmp_path / f"out{number}"
            assert runner.ask(request(output), point) == signal.SIGKILL, name
            assert active_pins(replayed.storage), name
            assert runner.ask(request(output)) == 0, name
            assert losses(output) == losses(whole), name
            assert ended(output) == ended(whole), name
            assert not active_pins(replayed.storage), name
    finally:
        runner.close()
