"""The best student of a run so far: its weights below `<output>/best/<run>`, each whole or not at
all, kept as long as a checkpoint or the run itself knows it as the best."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stillroom.cache.errors import CorruptError
from stillroom.train.checkpoint import WEIGHTS, check_folder, seal_folder
from stillroom.train.durable import remove, write_folder
from stillroom.train.full_state import fill_model, gather_model
from stillroom.train.ranks import from_first_rank

DO = "Restore it, or set train.load_best_model_at_end to false, which takes the last student."


def best_of(output: Path, run: str) -> Path:
    """Folder of a run's best students."""
    return output / "best" / run


def save_best(root: Path, step: int, model: torch.nn.Module) -> None:
    """Write what trains of the model as the student of a step; every rank calls it.

    Raises:
        StorageError: it cannot be written.
    """
    weights = gather_model(model)

    def fill(folder: Path) -> str:
        save_file(weights, folder / WEIGHTS)
        seal_folder(folder)
        return _name(step)

    from_first_rank(lambda: write_folder(root, fill))


def load_best(root: Path, step: int, model: torch.nn.Module) -> None:
    """Put the student of a step into the model; every rank calls it.

    Raises:
        CorruptError: it is gone or damaged.
        MismatchError: it is of another model.
    """
    folder = root / _name(step)
    weights: dict[str, torch.Tensor] = {}

    def read() -> None:
        try:
            check_folder(folder)
        except CorruptError as error:
            raise CorruptError(error.where, error.expected, error.got, DO) from error
        weights.update(load_file(folder / WEIGHTS))

    from_first_rank(read)
    fill_model(model, weights)


def keep_only(root: Path, steps: Iterable[int]) -> None:
    """Remove the students of other steps, and what a killed process left unfinished."""
    kept = {_name(step) for step in steps}
    for folder in (*root.glob("step-*"), *root.glob(".*.tmp")):
        if folder.name not in kept:
            remove(folder)


def _name(step: int) -> str:
    return f"step-{step:08d}"
