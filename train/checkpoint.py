"""Checkpoints: all that a run needs to go on as if it had never stopped, written whole or not at
all."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_model, save_model

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.replay.state import snapshots_in
from stillroom.train.durable import write_folder

FILES = ("model.safetensors", "training.pt", "state.json")
COMPLETE = "complete.json"
DAMAGED = "It is half written or damaged: delete it to resume from an older one."


@dataclass(frozen=True, slots=True)
class Progressed:
    """Where a run stood."""

    step: int
    """Optimiser steps taken."""
    rows: int
    """Rows replayed."""
    positions: int
    """Scored tokens replayed."""
    stream: dict[str, Any]
    """State of the replay stream."""
    drift: dict[str, dict[str, float]]
    """Sums of drift since the last record, by policy version."""


def save_checkpoint(
    root: Path,
    progressed: Progressed,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    keep: int,
) -> None:
    """Write `step-N` below root and drop all but the newest `keep`."""

    def fill(folder: Path) -> str:
        save_model(model, str(folder / FILES[0]))
        training = {
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(training, folder / FILES[1])
        (folder / FILES[2]).write_bytes(jsonfile.dump(asdict(progressed)))
        hashes = {name: _hash(folder / name) for name in FILES}
        (folder / COMPLETE).write_bytes(jsonfile.dump(hashes))
        return f"step-{progressed.step:08d}"

    write_folder(root, fill)
    for old in kept_checkpoints(root)[:-keep]:
        shutil.rmtree(old)


def checkpoints_of(output: Path, run: str) -> Path:
    """Folder of a run's checkpoints."""
    return output / "checkpoints" / run


def kept_checkpoints(root: Path) -> list[Path]:
    """Checkpoints below root, the newest last. Unfinished ones have other names."""
    return sorted(root.glob("step-*"))


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below root, or None."""
    found = kept_checkpoints(root)
    return found[-1] if found else None


def load_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Progressed:
    """Put a checkpoint into model, optimiser, schedule and random generator.

    Raises:
        MissingError: there is no such folder.
        CorruptError: it is half written, or a file's bytes are others.
    """
    if not folder.is_dir():
        raise MissingError(str(folder), "a checkpoint", "nothing", "Check the path.")
    _check_whole(folder)
    load_model(model, str(folder / FILES[0]))
    training = torch.load(folder / FILES[1], weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    schedule.load_state_dict(training["schedule"])
    torch.set_rng_state(training["rng"])
    if len(training["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(training["cuda_rng"])
    return read_progress(folder)


def read_progress(folder: Path) -> Progressed:
    """Where the run of a checkpoint stood.

    Raises:
        CorruptError: the file that says it is damaged.
    """
    path = folder / FILES[2]
    if not path.is_file():
        raise CorruptError(str(folder), "a whole checkpoint", f"no {path.name}", DAMAGED)
    state = jsonfile.load(path.read_bytes(), str(path))
    progressed: Progressed = jsonfile.build(Progressed, state, str(path))
    try:
        found = len(snapshots_in(progressed.stream))
    except CorruptError as error:
        raise CorruptError(str(path), "the state of a stream", error.got, DAMAGED) from error
    if found != 1:
        raise CorruptError(str(path), "the state of a stream of one cache", f"{found}", DAMAGED)
    return progressed


def _check_whole(folder: Path) -> None:
    marker = folder / COMPLETE
    hashes = jsonfile.load(marker.read_bytes(), str(marker)) if marker.is_file() else {}
    for name in FILES:
        found = _hash(folder / name) if (folder / name).is_file() else "no file"
        if found != hashes.get(name):
            got = f"{name} with {found} in place of {hashes.get(name)}"
            raise CorruptError(str(folder), "a whole checkpoint", got, DAMAGED)


def _hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()
