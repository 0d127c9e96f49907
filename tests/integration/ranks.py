"""Trains on several numbers of ranks, each a forked process; torch is imported once.

Reads a plan as JSON: {"root", "output", "worlds": [[ranks, [case, ...]], ...]} with a case {"name",
"student", "settings", "double", "one_row", "compiler", "worse_after", "refused"}. Rank 0 of each
leaves `<ranks>-<name>.npz` in the output: losses, gradient norms, and the student's whole weights.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from stillroom.cache.errors import ConfigError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.store import Cache
from stillroom.train import trainer as trainer_module
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.parallel import decoder_layers
from stillroom.train.settings import build_settings
from stillroom.train.student import Student, load_trainable
from stillroom.train.trainer import ReplayTrainer


class Norms(Callback):
    """Keeps the gradient's norm of each step; makes the student worse after a step, if wanted."""

    def __init__(self, worse_after: int | None) -> None:
        """Keep none yet."""
        self.norms: list[float] = []
        self._worse_after = worse_after

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Keep one."""
        self.norms.append(outcome.gradient_norm)
        if self._worse_after is not None and outcome.step > self._worse_after:
            with torch.no_grad():
                trainer.student.model.model.norm.weight.mul_(2.0)


def loading(case: dict[str, Any]) -> Any:
    """How a case's student is loaded: perhaps in float64, perhaps one that takes no packed rows."""

    def load(files: ModelFiles, config: ReplayConfig, device: torch.device) -> Student:
        student = load_trainable(files, config, device)
        if case.get("compiler"):
            for layer in decoder_layers(student.model):
                layer.compile(dynamic=True, backend=case["compiler"])
        if case.get("one_row"):
            student.why_one_row = "the case says so"
            student.model.set_attn_implementation("sdpa")
        return student.double() if case.get("double") else student

    return load


def train(plan: dict[str, Any], case: dict[str, Any], world: int) -> None:
    """One case, on this rank."""
    cache = Cache.open(plan["root"])
    config = build_settings(ReplayConfig, case["settings"], case["name"])
    vars(trainer_module)["load_trainable"] = loading(case)
    output, norms = Path(plan["output"]) / f"{world}-{case['name']}", Norms(case["worse_after"])
    try:
        trainer = ReplayTrainer(
            case["student"],
            cache,
            config,
            snapshot=cache.snapshot(),
            output=output,
            callbacks=[norms],
        )
    except ConfigError as error:
        if world == 1 or not case["refused"] or case["refused"] not in str(error):
            raise
        return
    assert world == 1 or not case["refused"], "it was to be refused"
    if world > 1:
        expected = "ddp" if config.parallel == "auto" else config.parallel
        assert trainer.parallel.kind == expected, trainer.parallel.kind
        assert trainer.parallel.units == (3 if expected == "fsdp" else 0), "two layers and the rest"
    counters.clear()
    report = trainer.train()
    if case["compiler"]:
        assert counters["stats"]["unique_graphs"] > 0
    weights = trainer.parallel.full_state_dict()
    if trainer.is_main:
        arrays: dict[str, Any] = {
            f"weights/{name}": tensor.numpy() for name, tensor in weights.items()
        }
        arrays |= {"losses": np.array(report.losses), "norms": np.array(norms.norms)}
        arrays |= {"student_step": np.array(report.student_step)}
        np.savez(f"{output}.npz", **arrays)
    else:
        assert weights == {}


def rank_of(plan: dict[str, Any], cases: list[dict[str, Any]], rank: int, world: int) -> None:
    """One rank's life."""
    torch.set_num_threads(1)
    for case in cases:
        train(plan, case, world)


def launch(plan: dict[str, Any], cases: list[dict[str, Any]], world: int) -> None:
    """Fork the ranks and wait for all of them.

    Raises:
        RuntimeError: one failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{rank}"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            status = 1
            try:
                rank_of(plan, cases, rank, world)
                status = 0
            except BaseException as error:
                import traceback

                traceback.print_exception(error)
            finally:
                sys.stderr.flush()
                # Taking gloo down can hang: its thread waits for the GIL that its joiner holds.
                os._exit(status)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {world} ranks failed")


def main() -> None:
    """The plan is the only argument."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    for world, cases in plan["worlds"]:
        launch(plan, cases, world)


if __name__ == "__main__":
    main()
