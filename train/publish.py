"""Publishing a student: its weights as a folder below the root, then the record that names them.

The folder is a plain model with its tokenizer, whatever it was trained with: adapters are added to
the weights, and shards are put together.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from stillroom.cache.errors import MismatchError, StorageError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.storage import Storage
from stillroom.replay.policies import Policy, put_policy, read_policy
from stillroom.train.durable import write_folder
from stillroom.train.lora import has_lora, merged_state, save_adapter
from stillroom.train.student import Student

ADAPTER = "adapter"
"""Sub-folder of a published policy that holds its LoRA as peft reads it, where that is wanted."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


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
    run: str,
    step: int,
    state: Mapping[str, torch.Tensor] | None = None,
    adapter: bool = False,
) -> Policy:
    """Write a student's weights and make them a policy version. Of several ranks, one calls it.

    Args:
        storage: the cache's; a local folder.
        student: what was trained.
        parent_files: the policy that it was trained from; its tokenizer files are taken over.
        version: the version to publish, one above its parent.
        run: the run that trained it.
        step: optimiser steps that it took.
        state: its whole state with adapters, from `Parallel.full_state_dict`; None takes the
            model's own, where this process holds all of it.
        adapter: also leave its LoRA in the sub-folder `adapter`.

    Returns:
        The published policy. Publishing the same weights again changes nothing.

    Raises:
        StorageError: the root is no local folder.
        MismatchError: the version exists with other weights.
    """
    check_publishable(storage)
    base = storage.folder

    def fill(folder: Path) -> str:
        whole = student.model.state_dict() if state is None else dict(state)
        _save(student.model, whole, parent_files, folder)
        if adapter:
            (folder / ADAPTER).mkdir()
            save_adapter(student.model, whole, folder / ADAPTER, str(parent_files.folder))
        return f"v{version:06d}-{inspect_model(str(folder)).fingerprint}"

    folder = write_folder(base / "policies", fill)
    fingerprint = inspect_model(str(folder)).fingerprint
    policy = Policy(
        version=version,
        run=run,
        parent=version - 1,
        step=step,
        path=f"policies/{folder.name}",
        fingerprint=fingerprint,
    )
    _put(storage, policy)
    return policy


def _put(storage: Storage, policy: Policy) -> None:
    if put_policy(storage, policy):
        return
    first = read_policy(storage, policy.version)
    if first.fingerprint != policy.fingerprint:
        do = "Another run published this version: train from the newest policy instead."
        expected, got = f"fingerprint {policy.fingerprint}", f"{first.fingerprint} of {first.run}"
        raise MismatchError(f"policy {policy.version}", expected, got, do)


def _save(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    parent_files: ModelFiles,
    folder: Path,
) -> None:
    """Write a whole state through a model of the same configuration that holds no weights: the
    trained one may have adapters, or shards of them."""
    weights = merged_state(model, state) if has_lora(model) else state
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=_dtype(weights))
    plain.generation_config = model.generation_config
    tied = plain.all_tied_weights_keys
    hf_logging.disable_progress_bar()
    plain.save_pretrained(
        folder, state_dict={name: w.cpu() for name, w in weights.items() if name not in tied}
    )
    for pattern in TOKENIZER_FILES:
        for path in parent_files.folder.glob(pattern):
            if not (folder / path.name).exists() and path.is_file():
                shutil.copyfile(path, folder / path.name)


def _dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next(weight.dtype for weight in weights.values() if weight.is_floating_point())
