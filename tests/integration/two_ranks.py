"""Trains for a few steps on as many ranks as it was launched with; rank 0 saves what came out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.train.config import ReplayConfig
from stillroom.train.settings import build_settings
from stillroom.train.trainer import ReplayTrainer


def main() -> None:
    """Arguments: root, student folder, output folder, settings as JSON."""
    root, student, output, settings = sys.argv[1:]
    torch.set_num_threads(1)
    cache = Cache.open(root)
    config = build_settings(ReplayConfig, json.loads(settings), "settings")
    trainer = ReplayTrainer(
        inspect_model(student), 0, cache, cache.snapshot(), config, Path(output), "ranks"
    )
    report = trainer.train()
    if torch.distributed.get_rank() == 0:
        weights = {name: p.detach() for name, p in trainer.student.named_parameters()}
        torch.save(weights, Path(output) / "weights.pt")
        (Path(output) / "report.json").write_text(
            json.dumps({"losses": report.losses, "drift": report.drift, "rows": report.rows})
        )
    # Taking the process group down can hang: gloo's thread waits for the GIL that its joiner holds.
    os._exit(0)


if __name__ == "__main__":
    main()
