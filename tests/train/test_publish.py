"""Publishing: the weights, then the record; the same again changes nothing, others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillroom.cache.errors import MismatchError, StorageError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.storage import Storage
from stillroom.replay.policies import open_policy, policy_versions, register_initial
from stillroom.train.publish import publish
from stillroom.train.student import load_student


def test_published_student_is_the_trained_one(student_dir: Path, tmp_path: Path) -> None:
    """The folder loads as the student that was published, with its tokenizer."""
    storage = Storage(tmp_path)
    files = inspect_model(str(student_dir))
    register_initial(storage, files, "r")
    student = load_student(files, "float32", torch.device("cpu"))
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    for _ in range(2):
        policy = publish(storage, student, files, version=1, run="r", step=7)
    assert (policy.parent, policy.step, policy.run) == (0, 7, "r")
    assert policy_versions(storage) == [0, 1]
    loaded = load_student(open_policy(storage, 1), "float32", torch.device("cpu"))
    for mine, theirs in zip(loaded.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert open_policy(storage, 1).tokenizer_fingerprint == files.tokenizer_fingerprint


def test_another_run_is_refused(student_dir: Path, tmp_path: Path) -> None:
    """A version that exists with other weights is not replaced."""
    storage = Storage(tmp_path)
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    first = publish(storage, student, files, version=1, run="a", step=1)
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    with pytest.raises(MismatchError, match=r"policy 1.*of a"):
        publish(storage, student, files, version=1, run="b", step=1)
    assert open_policy(storage, 1).fingerprint == first.fingerprint


def test_object_store_is_refused(student_dir: Path) -> None:
    """Weights need a folder."""
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    with pytest.raises(StorageError, match="object store"):
        publish(Storage("s3://bucket/x"), student, files, version=1, run="r", step=1)


def test_record_names_the_weights_that_were_trained(student_dir: Path, tmp_path: Path) -> None:
    """Weights left by a run that died before its record are not taken for those of the next."""
    storage = Storage(tmp_path)
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    publish(storage, student, files, version=1, run="r", step=1)
    (tmp_path / "policies" / "000001.json").unlink()
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    publish(storage, student, files, version=1, run="r", step=1)
    loaded = load_student(open_policy(storage, 1), "float32", torch.device("cpu"))
    for mine, theirs in zip(loaded.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
