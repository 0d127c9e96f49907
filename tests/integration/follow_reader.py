"""One rank of a stream that follows a cache, joined to the others by gloo; leaves what it got at
every step."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stillroom.cache.errors import CorruptError, MismatchError
from stillroom.cache.store import Cache
from stillroom.replay.config import AT_EPOCH_END, StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.follow import agree_by_torch
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_record import record

BROKEN = CorruptError("commits/x", "a commit", "none", "Restore it.")


def caught(error: Exception) -> str:
    """What a rank sees where rank 0 meets an error; one that cannot be pickled, too."""

    def fail() -> None:
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    try:
        agree_by_torch(fail)
    except Exception as seen:
        return f"{type(seen).__name__}: {seen}"
    return "nothing"


def opened_differently(source: Source, config: StreamConfig, rank: int, world: int) -> str:
    """What the ranks see that open streams with seeds and forms of their own."""
    try:
        own = replace(config, seed=rank)
        ReplayStream(source, own, rank=rank, world=world, one_row=rank > 0)
    except MismatchError as error:
        return str(error)
    return "nothing"


def read(stream: ReplayStream, steps: int, adoptions: int) -> list[dict[str, Any]]:
    """What a rank gets in so many steps, and as many more as these adoptions take."""
    log: list[dict[str, Any]] = []
    followed: list[str] = []
    while len(log) < steps or len(followed) <= adoptions:
        state = stream.state_dict()
        batch = record(stream.next_batch())
        log.append({"state": state, "snapshot": stream.snapshots[0], "batch": batch})
        followed += [new for new in stream.snapshots if new not in followed]
        time.sleep(0.01)
    return log


def main() -> None:
    """Arguments: root, snapshot, folder for what comes out, settings as JSON, rank, world, steps
    and adoptions to be made at least."""
    root, snapshot, folder, settings, *numbers = sys.argv[1:]
    rank, world, steps, adoptions = map(int, numbers)
    meeting = Path(folder, "ranks").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    cache = Cache.open(root)
    source = Source(cache, cache.open_snapshot(snapshot))
    config = StreamConfig(**json.loads(settings))
    refused = opened_differently(source, config, rank, world)
    log = read(ReplayStream(source, config, rank=rank, world=world), steps, adoptions)
    at_ends = replace(config, follow_every_steps=AT_EPOCH_END)
    epochs = read(ReplayStream(source, at_ends, rank=rank, world=world), 0, 2)
    errors = [caught(error) for error in (BROKEN, threading.ThreadError())]
    found = {"log": log, "epochs": epochs, "errors": errors, "refused": refused}
    Path(folder, f"rank-{rank}").write_bytes(pickle.dumps(found))
    # Taking the process group down can hang: gloo's thread waits for the GIL that its joiner holds.
    os._exit(0)


if __name__ == "__main__":
    main()
