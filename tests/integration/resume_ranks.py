"""Trains on as many ranks as it was launched with, several runs one after the other; rank 0 leaves
what came out of each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from stillroom.cache.storage import Storage
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.publish import publish, save_student
from stillroom.train.settings import build_settings
from stillroom.train.trainer import ReplayTrainer
from tests.integration.killed_run import arm


class StopAfter(Callback):
    """Stops the training, which leaves a checkpoint."""

    def __init__(self, step: int) -> None:
        """Which step."""
        self._step = step

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Stop there."""
        if outcome.step == self._step:
            trainer.stop("the test says so")


def run(case: dict[str, Any]) -> None:
    """Train, and leave losses and weights in the output folder; or kill one rank at a point."""
    point = case.get("die")
    if point is not None and int(os.environ["RANK"]) == point["rank"]:
        arm(point)
    config = build_settings(ReplayConfig, case["train"], "settings")
    stops = [StopAfter(case["stop"])] if case.get("stop") else []
    output = Path(case["output"])
    trainer = ReplayTrainer(
        case["student"],
        case["root"],
        config,
        output=output,
        run="r",
        policy_version=0,
        callbacks=stops,
    )
    report = trainer.train()
    state = trainer.parallel.full_state_dict()
    if trainer.is_main:
        found = {
            "losses": report.losses,
            "drift": report.drift,
            "held_out": report.held_out,
            "kind": trainer.parallel.kind,
        }
        (output / "report.json").write_text(json.dumps(found))
    if trainer.is_main and not stops:
        storage = Storage(output / "published")
        publish(
            storage,
            trainer.student,
            trainer.files,
            version=1,
            parent=0,
            run="r",
            step=1,
            state=state,
        )
    if not stops:
        save_student(trainer, output / "saved")


def main() -> None:
    """Arguments: a JSON list of runs."""
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        run(case)
    # Taking the process group down can hang: gloo's thread waits for the GIL that its joiner holds.
    os._exit(0)


if __name__ == "__main__":
    main()
