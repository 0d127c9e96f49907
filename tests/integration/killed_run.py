"""Runs `run`, a training alone, or a command, in forked children that kill themselves at a chosen
point; torch is imported once.

Reads one JSON request a line: {"settings": ..., "point": null or {"call", "match", "nth", "when"}},
for a training with "train": {"root", "student"} beside them, for a command with its arguments as
"command" and none of its settings but "output", and answers each with {"signal":
number or 0, "status": number}. A child dies by a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

import stillroom.replay.transformers_sampler
import stillroom.train.trainer
from stillroom.cache.storage import Storage
from stillroom.tools import work
from stillroom.tools.cli import main as command
from stillroom.train import best, checkpoint, durable, evaluate, publish, stages
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.full_state import gather_model
from stillroom.train.pipeline import Pipeline
from stillroom.train.run_config import RunConfig
from stillroom.train.settings import build_settings
from stillroom.train.trainer import ReplayTrainer

FOLDER_AT = {"save_file": 1, "seal_folder": 0, "write_folder": 0}
"""Which argument of a function is the path."""
PRELOADED = (stillroom.replay.transformers_sampler, evaluate)


def deadly(function: Callable[..., Any], point: dict[str, Any], name_at: int) -> Callable[..., Any]:
    """Kill this process before or after the nth call whose argument `name_at` matches."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        matches = re.search(point["match"], str(args[name_at])) is not None
        calls += matches
        due = matches and calls == point["nth"]
        if due and point["when"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def arm(point: dict[str, Any]) -> None:
    """Lay the charge."""
    if point["call"] == "put":
        Storage.put_new = deadly(Storage.put_new, point, 1)  # type: ignore[method-assign]
    elif point["call"] == "step":
        ReplayTrainer._take_step = deadly(  # type: ignore[method-assign]
            ReplayTrainer._take_step, {**point, "match": ""}, 0
        )
    elif point["call"] in ("save_file", "seal_folder", "write_folder"):
        for module in (checkpoint, best):
            function = vars(module)[point["call"]]
            vars(module)[point["call"]] = deadly(function, point, FOLDER_AT[point["call"]])
    elif point["call"] == "torch.save":
        vars(torch)["save"] = deadly(torch.save, point, 1)
    elif point["call"] == "rename":
        Path.rename = deadly(Path.rename, point, 0)  # type: ignore[method-assign]
    elif point["call"] == "rmtree":
        vars(shutil)["rmtree"] = deadly(shutil.rmtree, point, 0)
    elif point["call"] == "unlink":
        vars(os)["unlink"] = deadly(os.unlink, point, 0)
    elif point["call"] == "folder":
        vars(publish)["write_folder"] = deadly(durable.write_folder, point, 0)
    else:
        for writer in (stages, work):
            vars(writer)["write_file"] = deadly(durable.write_file, point, 0)


class Losses(Callback):
    """Leaves the loss of each step, to the bit, and a digest of the weights at the end."""

    def __init__(self, output: Path) -> None:
        """Append to what earlier processes left."""
        self._path = output / "losses.jsonl"

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """One line a step."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": outcome.step, "loss": outcome.loss.hex()}) + "\n")

    def on_end(self, trainer: ReplayTrainer, report: Any) -> None:
        """The student, and what was measured."""
        weights = gather_model(trainer.student.model)
        state = xxhash.xxh3_128()
        for name, tensor in sorted(weights.items()):
            state.update(name.encode() + tensor.detach().numpy().tobytes())
        ended = {
            "weights": state.hexdigest(),
            "drift": report.drift,
            "held_out": report.held_out,
            "stopped": report.stopped,
            "rows": report.rows,
            "positions": report.positions,
            "student_step": report.student_step,
        }
        (self._path.parent / "ended.json").write_text(json.dumps(ended))


def train(request: dict[str, Any], output: Path) -> None:
    """One training alone."""
    config = build_settings(ReplayConfig, request["settings"]["train"], "request")
    output.mkdir(exist_ok=True)
    trainer = ReplayTrainer(
        request["train"]["student"],
        request["train"]["root"],
        config,
        output=output,
        run="r",
        policy_version=0,
        callbacks=(Losses(output),),
    )
    trainer.train()


def child(request: dict[str, Any]) -> None:
    """One run, to its end or its death."""
    torch.set_num_threads(1)
    output = Path(request["settings"]["output"]).with_suffix(".log")
    log = output.open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if request["point"]:
        arm(request["point"])
    if "command" in request:
        assert command(request["command"]) == 0
    elif "train" in request:
        train(request, Path(request["settings"]["output"]))
    else:
        Pipeline(build_settings(RunConfig, request["settings"], "request")).run()


def main() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(request)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(pid, 0)
        killed = os.WTERMSIG(code) if os.WIFSIGNALED(code) else 0
        print(json.dumps({"signal": killed, "status": code}), flush=True)


if __name__ == "__main__":
    main()
