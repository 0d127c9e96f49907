"""Checkpoints: all that a run needs to go on as if it had never stopped, written whole or not at
all. Every rank calls these functions; the first one writes and reads.

A checkpoint does not depend on the number of ranks: a run can go on with another, on the same
batches. A damaged one is passed over for the one before, which is said; it is never a silent start
from the beginning.
"""

import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MismatchError, StorageError
from stillroom.replay.state import snapshots_in
from stillroom.train.decisive import differing, named
from stillroom.train.durable import fsync, remove, write_folder
from stillroom.train.full_state import (
    fill_model,
    fill_optimizer,
    gather_model,
    gather_optimizer,
)
from stillroom.train.random_state import random_state, set_random_state
from stillroom.train.ranks import from_every_rank, from_first_rank, rank

WEIGHTS, TRAINING, STATE = "model.safetensors", "training.pt", "state.json"
COMPLETE = "complete.json"
DAMAGED = "It is half written or damaged: delete it to resume from an older one."
ANOTHER_RUN = "Give those to go on with it, or choose another run name or output."
LOWER_RATE = (
    "Lower the learning rate, and begin a run of another name or output: one that goes on from a "
    "checkpoint keeps its settings."
)
START_AGAIN = "Restore one, or delete all of them to start from the beginning."


@dataclass(frozen=True, slots=True)
class Progressed:
    """Where a run stood."""

    step: int
    """Optimiser steps taken; trackers go on from it."""
    rows: int
    """Rows replayed."""
    positions: int
    """Scored tokens replayed."""
    loss: float | None
    """Mean loss of the last step, nats a position."""
    stream: dict[str, Any]
    """State of the replay stream."""
    callbacks: dict[str, dict[str, Any]]
    """States of the callbacks, by their names."""
    student: str
    """Fingerprint of the model that the run began with."""
    settings: dict[str, Any]
    """Its decisive settings, by dotted name."""


def save_checkpoint(
    root: Path,
    progressed: Progressed,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    keep: int,
) -> None:
    """Write `step-N` below root, then drop all but the newest `keep`.

    Args:
        root: folder of the run's checkpoints.
        progressed: where the run stands; rank 0's is written.
        model: not a wrapper around it; its parameters may be sharded.
        optimizer: of the model's parameters.
        schedule: of the learning rate.
        keep: at least 1.

    Raises:
        StorageError: it cannot be written, and older ones are as they were; or those that are no
            longer kept cannot be removed.
    """
    weights, trained = gather_model(model), gather_optimizer(model, optimizer)
    generators = from_every_rank(random_state())

    def fill(folder: Path) -> str:
        save_file(weights, folder / WEIGHTS)
        training = {"optimizer": trained, "schedule": schedule.state_dict(), "random": generators}
        torch.save(training, folder / TRAINING)
        (folder / STATE).write_bytes(jsonfile.dump(asdict(progressed)))
        seal_folder(folder)
        return f"step-{progressed.step:08d}"

    def write() -> None:
        write_folder(root, fill)
        for old in kept_checkpoints(root)[:-keep]:
            remove(old)

    from_first_rank(write)


def load_checkpoint(
    root: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Progressed | None:
    """Put the newest whole checkpoint below root into model, optimiser, schedule and generators.

    Each rank's generators go on where they were; a rank that the run did not have keeps its own.

    Returns:
        Where the run stood; None if it has no checkpoint.

    Raises:
        CorruptError: there are checkpoints, and none is whole.
        MismatchError: it is of another student, or was trained by another optimiser.
        StorageError: it cannot be read.
    """
    weights: dict[str, torch.Tensor] = {}
    training: dict[str, Any] = {}

    def read() -> tuple[Progressed, Any, Any] | None:
        folder = newest_checkpoint(root)
        if folder is None:
            return None
        progressed = read_progress(folder)
        weights.update(load_file(folder / WEIGHTS))
        training.update(torch.load(folder / TRAINING, weights_only=True, map_location="cpu"))
        return progressed, training["schedule"], training["random"]

    found = from_first_rank(read)
    if found is None:
        return None
    progressed, schedule_state, generators = found
    fill_model(model, weights)
    fill_optimizer(model, optimizer, training.get("optimizer", {}))
    schedule.load_state_dict(schedule_state)
    if rank() < len(generators):
        set_random_state(generators[rank()])
    assert isinstance(progressed, Progressed)
    return progressed


def checkpoints_of(output: Path, run: str) -> Path:
    """Folder of a run's checkpoints."""
    return output / "checkpoints" / run


def kept_checkpoints(root: Path) -> list[Path]:
    """Checkpoints below root, the newest last. Unfinished and damaged ones have other names."""
    return sorted(root.glob("step-*"))


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below root that is whole, or None where there is none at all.

    Newer ones that are damaged get another name and are told of, and what a killed process left
    unfinished is removed.

    Raises:
        CorruptError: there are checkpoints, and none is whole. All keep their names.
        StorageError: one cannot be read, or what is unfinished cannot be removed.
    """
    for unfinished in root.glob(".*.tmp"):
        remove(unfinished)
    damaged: list[tuple[Path, CorruptError]] = []
    for folder in reversed(kept_checkpoints(root)):
        try:
            check_folder(folder)
            read_progress(folder)
        except CorruptError as error:
            damaged.append((folder, error))
        else:
            break
    else:
        if not damaged:
            return None
        got = f"{len(damaged)} that are damaged: {damaged[0][1].got} in the newest"
        raise CorruptError(str(root), "a whole checkpoint", got, START_AGAIN)
    for bad, why in damaged:
        aside = bad.rename(bad.with_name(f"damaged-{bad.name}-{uuid.uuid4().hex[:8]}"))
        what = f"resuming from {folder.name}, as {bad.name} is damaged ({why.where}: {why.got})"
        print(f"  checkpoints: {what}; it is now {aside}", file=sys.stderr, flush=True)
    fsync(root)
    return folder


def newest_progress(root: Path) -> Progressed | None:
    """Where the newest whole checkpoint below root stood, told to every rank; None without one.

    Raises:
        CorruptError, StorageError: as `newest_checkpoint`.
    """

    def read() -> Progressed | None:
        folder = newest_checkpoint(root)
        return None if folder is None else read_progress(folder)

    found: Progressed | None = from_first_rank(read)
    return found


def check_same_run(found: Progressed, root: Path, student: str, settings: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint with another student or other settings than it was made of.

    Args:
        found: where the run stood.
        root: folder of the run's checkpoints.
        student: fingerprint of the model that the run begins with now.
        settings: the decisive ones, now.

    Raises:
        MismatchError: names what differs, and both values.
    """
    if found.student != student:
        raise MismatchError(str(root), f"a run of student {found.student}", student, ANOTHER_RUN)
    names = differing(found.settings, settings)
    if names:
        expected = f"the settings of the run that is there: {named(found.settings, names)}"
        raise MismatchError(str(root), expected, named(settings, names), ANOTHER_RUN)


def read_progress(folder: Path) -> Progressed:
    """Where the run of a checkpoint stood.

    Raises:
        CorruptError: the file that says it is damaged.
    """
    path = folder / STATE
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


def seal_folder(folder: Path) -> None:
    """Write the hashes of a folder's files into it, as its last file."""
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir())}
    (folder / COMPLETE).write_bytes(jsonfile.dump_sealed(hashes))


def check_folder(folder: Path) -> None:
    """Verify a folder that was sealed.

    Raises:
        CorruptError: a file is missing, or has other bytes.
        StorageError: it cannot be read.
    """
    marker = folder / COMPLETE
    try:
        if not marker.is_file():
            raise CorruptError(str(folder), "a whole folder", f"no {COMPLETE}", DAMAGED)
        for name, expected in jsonfile.load_sealed(marker.read_bytes(), str(marker)).items():
            path = folder / name
            found = _hash(path) if path.is_file() else "no file"
            if found != expected:
                got = f"{name} with {found} in place of {expected}"
                raise CorruptError(str(folder), "a whole folder", got, DAMAGED)
    except StorageError:
        raise
    except OSError as error:
        do = "Make the folder readable."
        raise StorageError(str(folder), "a folder that can be read", str(error), do) from error


def _hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()
