"""Publishing a student: its weights as a folder below the root, then the record that names them."""

import shutil
from pathlib import Path

from stillroom.cache.errors import MismatchError, StorageError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.storage import Storage
from stillroom.replay.policies import Policy, put_policy, read_policy
from stillroom.train.durable import write_folder
from stillroom.train.student import Student

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
) -> Policy:
    """Write a student's weights and make them a policy version.

    Args:
        storage: the cache's; a local folder.
        student: what was trained.
        parent_files: the policy that it was trained from; its tokenizer files are taken over.
        version: the version to publish, one above its parent.
        run: the run that trained it.
        step: optimiser steps that it took.

    Returns:
        The published policy. Publishing the same weights again changes nothing.

    Raises:
        StorageError: the root is no local folder.
        MismatchError: the version exists with other weights.
    """
    check_publishable(storage)
    base = storage.folder

    def fill(folder: Path) -> str:
        _save(student, parent_files, folder)
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
    if not put_policy(storage, policy):
        first = read_policy(storage, version)
        if first.fingerprint != fingerprint:
            do = "Another run published this version: train from the newest policy instead."
            where = f"policy {version}"
            raise MismatchError(
                where, f"fingerprint {fingerprint}", f"{first.fingerprint} of {first.run}", do
            )
    return policy


def _save(student: Student, parent_files: ModelFiles, folder: Path) -> None:
    student.model.save_pretrained(folder)
    for pattern in TOKENIZER_FILES:
        for path in parent_files.folder.glob(pattern):
            if not (folder / path.name).exists() and path.is_file():
                shutil.copyfile(path, folder / path.name)
