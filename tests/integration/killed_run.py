"""Runs `run` in forked children that kill themselves at a chosen point; torch is imported once.

Reads one JSON request a line: {"settings": ..., "point": null or {"call", "match", "nth", "when"}},
and answers each with {"signal": number or 0, "status": number}. A child dies by a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stillroom.replay.transformers_sampler
import stillroom.train.trainer
from stillroom.cache.storage import Storage
from stillroom.train import durable, evaluate, publish, stages
from stillroom.train.pipeline import Pipeline
from stillroom.train.run_config import RunConfig
from stillroom.train.settings import build_settings
from stillroom.train.trainer import ReplayTrainer

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
    elif point["call"] == "folder":
        vars(publish)["write_folder"] = deadly(durable.write_folder, point, 0)
    else:
        vars(stages)["write_file"] = deadly(durable.write_file, point, 0)


def child(request: dict[str, Any]) -> None:
    """One run, to its end or its death."""
    torch.set_num_threads(1)
    output = Path(request["settings"]["output"]).with_suffix(".log")
    log = output.open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if request["point"]:
        arm(request["point"])
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
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, code = os.waitpid(pid, 0)
        killed = os.WTERMSIG(code) if os.WIFSIGNALED(code) else 0
        print(json.dumps({"signal": killed, "status": code}), flush=True)


if __name__ == "__main__":
    main()
