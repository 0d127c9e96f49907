"""Checkpoints: all that a run needs to go on as if it had never stopped, written whole or not at
all."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.train.durable import write_folder

FILES = ("model.safetensors", "training.pt", "state.json")


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


def save_checkpoint(
    root: Path,
    progressed: Progressed,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    keep: int,
) -> None:
    """Write `step-N` below root and drop all but the newest `keep`."""

    def fill(folder: Path) -> None:
        save_model(model, str(folder / FILES[0]))
        training = {
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(training, folder / FILES[1])
        (folder / FILES[2]).write_bytes(jsonfile.dump(asdict(progressed)))
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        (folder / "complete.json").write_bytes(jsonfile.dump(sizes))

    write_folder(root / f"step-{progressed.step:08d}", fill)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below root, or None. Unfinished ones have other names."""
    found = sorted(root.glob("step-*"))
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
        CorruptError: it is half written, or a file has another size.
    """
    if not folder.is_dir():
        raise MissingError(str(folder), "a checkpoint", "nothing", "Check the path.")
    marker = folder / "complete.json"
    sizes = jsonfile.load(marker.read_bytes(), str(marker)) if marker.is_file() else {}
    for name in FILES:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != sizes.get(name):
            got = f"{size} bytes of {sizes.get(name)} in {name}"
            do = "It is half written or damaged: delete it to resume from an older one."
            raise CorruptError(str(folder), "a whole checkpoint", got, do)
    load_model(model, str(folder / FILES[0]))
    training = torch.load(folder / FILES[1], weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    schedule.load_state_dict(training["schedule"])
    torch.set_rng_state(training["rng"])
    state = jsonfile.load((folder / FILES[2]).read_bytes(), str(folder / FILES[2]))
    restored: Progressed = jsonfile.build(Progressed, state, str(folder / FILES[2]))
    return restored
