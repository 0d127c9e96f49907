"""Saving a student as a folder, and publishing one: its weights as a folder below the root, then
the record that names them."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from stillroom.cache.errors import ConfigError, MismatchError, StorageError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.storage import Storage, local_path
from stillroom.replay.policies import Policy, put_policy, read_policy
from stillroom.train.durable import write_folder
from stillroom.train.lora import save_adapter
from stillroom.train.model_folder import write_model
from stillroom.train.ranks import from_first_rank
from stillroom.train.student import Student

if TYPE_CHECKING:
    from stillroom.train.trainer import ReplayTrainer

ADAPTER = "adapter"
"""Sub-folder of a published policy that holds its LoRA as peft reads it, where that is wanted."""
ABANDONED_AFTER_S = 24 * 3600.0
"""An unfinished folder of a policy that was not written to for so long belongs to nobody."""


def save_student(trainer: "ReplayTrainer", folder: str | Path) -> Path:
    """Save a trainer's student as a plain Hugging Face model with its tokenizer; with LoRA settings
    of `publish: adapter`, the LoRA is in its sub-folder `adapter`. Every rank calls it.

    Args:
        trainer: after `train`, or at any step of it.
        folder: where to; it must not be there yet, and is there whole or not at all.

    Returns:
        The folder, as an absolute path.

    Raises:
        ConfigError: there is something already.
        StorageError: it cannot be written.
        MismatchError: it would not have its parent's tokenizer.
    """
    target = local_path(str(folder)).absolute()
    state = trainer.parallel.full_state_dict()

    def save() -> None:
        if target.exists():
            do = "Choose another, or remove it."
            raise ConfigError(str(target), "a folder that is not there yet", "one that is", do)

        def fill(temporary: Path) -> str:
            adapter = trainer.config.publishes_adapter
            _save(trainer.student.model, state, trainer.files, temporary, adapter)
            return target.name

        write_folder(target.parent, fill)

    from_first_rank(save)
    return target


def check_publishable(storage: Storage) -> None:
    """Refuse a root that no student can be published into; before it is trained.

    Raises:
        StorageError: the root is no local folder.
    """
    if not storage.is_local:
        do = "Train with a root on a shared file system."
        raise StorageError(storage.root, "a folder to publish weights in", "an object store", do)


def publish(
    storage: Storage,
    student: Student,
    parent_files: ModelFiles,
    *,
    version: int,
    parent: int,
    run: str,
    step: int,
    state: Mapping[str, torch.Tensor] | None = None,
    adapter: bool = False,
    announce: Callable[[Policy], None] = lambda policy: None,
) -> Policy:
    """Write a student's weights and make them a policy version. Of several ranks, one calls it.

    Args:
        storage: the cache's; a local folder.
        student: what was trained.
        parent_files: the policy that it was trained from; its tokenizer files are taken over.
        version: the version to publish.
        parent: the version that it was trained from, a lower one.
        run: the run that trained it.
        step: optimiser steps that it took.
        state: its whole state with adapters, from `Parallel.full_state_dict`; None takes the
            model's own, where this process holds all of it.
        adapter: also leave its LoRA in the sub-folder `adapter`.
        announce: is told of the policy once its weights are written, before anybody sees it.

    Returns:
        The published policy. Publishing the same weights again changes nothing.

    Raises:
        StorageError: the root is no local folder.
        MismatchError: the version has other weights or another parent, or no parent's tokenizer.
        ConfigError: the version is not above its parent.
    """
    check_publishable(storage)
    if not 0 <= parent < version:
        expected = f"one above its parent, {parent}"
        raise ConfigError("the version to publish", expected, f"{version}", "Swap them.")
    base = storage.folder

    def fill(folder: Path) -> str:
        whole = student.model.state_dict() if state is None else dict(state)
        saved = _save(student.model, whole, parent_files, folder, adapter)
        return f"v{version:06d}-{saved.fingerprint}"

    _sweep(base / "policies")
    folder = write_folder(base / "policies", fill)
    policy = Policy(
        version=version,
        run=run,
        parent=parent,
        step=step,
        path=f"policies/{folder.name}",
        fingerprint=inspect_model(str(folder)).fingerprint,
    )
    announce(policy)
    _put(storage, policy)
    return policy


def _sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished: no publishing takes so long between files."""
    for unfinished in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            touched = max(path.stat().st_mtime for path in (unfinished, *unfinished.rglob("*")))
            if time.time() - touched > ABANDONED_AFTER_S:
                shutil.rmtree(unfinished)


def _put(storage: Storage, policy: Policy) -> None:
    if put_policy(storage, policy):
        return
    first = read_policy(storage, policy.version)
    if (first.fingerprint, first.parent) != (policy.fingerprint, policy.parent):
        do = "Another run published this version: train from the newest policy instead."
        expected = f"fingerprint {policy.fingerprint}, trained from policy {policy.parent}"
        got = f"{first.fingerprint} of {first.run}, from {first.parent}"
        raise MismatchError(f"policy {policy.version}", expected, got, do)


def _save(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    parent_files: ModelFiles,
    folder: Path,
    adapter: bool,
) -> ModelFiles:
    """Write a whole state, and its LoRA beside it where wanted."""
    written = write_model(model, state, parent_files, folder)
    if adapter:
        (folder / ADAPTER).mkdir()
        save_adapter(model, state, folder / ADAPTER, str(parent_files.folder))
    return written
