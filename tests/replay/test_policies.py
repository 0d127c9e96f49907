"""Policies: a version is one student, for ever, and its weights are checked at opening."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.storage import Storage
from stillroom.replay.policies import (
    Policy,
    check_student,
    free_version,
    line_of,
    newest_kept,
    open_policy,
    policy_folder,
    policy_path,
    policy_versions,
    put_policy,
    read_policy,
    record_unkept,
    register_initial,
)
from tests.conftest import VOCAB, save_llama


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(tmp_path / "root")


@pytest.fixture
def student(student_dir: Path, tmp_path: Path) -> ModelFiles:
    """A student in a folder that a test may change."""
    return inspect_model(str(shutil.copytree(student_dir, tmp_path / "student")))


def policy_of(version: int, files: ModelFiles, **changes: Any) -> Policy:
    """A policy with these weights."""
    policy = Policy(
        version=version,
        run="run-a",
        parent=version - 1,
        step=10,
        path=str(files.folder),
        fingerprint=files.fingerprint,
    )
    return replace(policy, **changes)


def test_a_published_policy_is_read_back(storage: Storage, student: ModelFiles) -> None:
    policy = policy_of(3, student)
    assert put_policy(storage, policy)
    assert read_policy(storage, 3) == policy
    assert policy_path(3) == "policies/000003.json"


def test_the_first_policy_of_a_version_holds(storage: Storage, student: ModelFiles) -> None:
    first = policy_of(1, student)
    assert put_policy(storage, first)
    assert not put_policy(storage, replace(first, run="run-b", fingerprint="other"))
    assert read_policy(storage, 1) == first


def test_versions_are_listed_in_order_and_weights_are_not_mistaken_for_them(
    storage: Storage, student: ModelFiles
) -> None:
    assert policy_versions(storage) == []
    for version in (2, 0, 1_000_000, 10):
        put_policy(storage, policy_of(version, student))
    storage.put_new("policies/v000011-run/config.json", b"{}")
    assert policy_versions(storage) == [0, 2, 10, 1_000_000]


def test_a_policy_that_is_not_there_or_damaged_is_named(
    storage: Storage, student: ModelFiles
) -> None:
    with pytest.raises(MissingError, match="policy 4"):
        read_policy(storage, 4)
    storage.put_new(policy_path(5), b'{"version": 5}')
    with pytest.raises(CorruptError, match=r"000005\.json"):
        read_policy(storage, 5)
    storage.put_new(policy_path(6), bytes(1 << 17))
    with pytest.raises(CorruptError, match=r"000006\.json: expected at most 65536 bytes"):
        read_policy(storage, 6)


@pytest.mark.parametrize(
    "changes",
    [{"version": 4}, {"path": "../x"}, {"path": "policies/../../x"}],
)
def test_a_policy_of_another_version_or_outside_of_the_root_is_refused(
    changes: dict[str, Any], storage: Storage, student: ModelFiles
) -> None:
    wrong = replace(policy_of(3, student), **changes)
    storage.put_new(policy_path(3), jsonfile.dump_sealed(asdict(wrong)))
    with pytest.raises(CorruptError, match="expected policy 3, its weights below the root"):
        read_policy(storage, 3)


@pytest.mark.parametrize("parent", [3, 4, -1])
def test_a_parent_that_is_not_older_is_refused(
    storage: Storage, student: ModelFiles, parent: int
) -> None:
    put_policy(storage, policy_of(3, student, parent=parent))
    with pytest.raises(CorruptError, match="expected a parent below 3"):
        read_policy(storage, 3)


def test_registering_the_same_student_again_changes_nothing(
    storage: Storage, student: ModelFiles, tmp_path: Path
) -> None:
    register_initial(storage, student, "run-a")
    first = read_policy(storage, 0)
    assert (first.parent, first.step, first.run) == (None, 0, "run-a")
    register_initial(storage, student, "run-b")
    moved = inspect_model(str(shutil.copytree(student.folder, tmp_path / "moved")))
    register_initial(storage, moved, "run-c")
    assert read_policy(storage, 0) == first


def test_another_student_is_no_initial_student(
    storage: Storage, student: ModelFiles, teacher_dir: Path
) -> None:
    register_initial(storage, student, "run-a")
    with pytest.raises(MismatchError, match="one initial student"):
        register_initial(storage, inspect_model(str(teacher_dir)), "run-b")
    assert read_policy(storage, 0).fingerprint == student.fingerprint


def test_opening_a_policy_gives_its_files(storage: Storage, student: ModelFiles) -> None:
    register_initial(storage, student, "run-a")
    assert open_policy(storage, 0) == student


def test_a_path_below_the_root_moves_with_it(
    storage: Storage, student: ModelFiles, tmp_path: Path
) -> None:
    shutil.copytree(student.folder, tmp_path / "root" / "policies" / "v000001-run-a")
    policy = policy_of(1, student, path="policies/v000001-run-a")
    put_policy(storage, policy)
    assert policy_folder(storage, policy) == tmp_path / "root" / "policies" / "v000001-run-a"
    shutil.move(tmp_path / "root", tmp_path / "elsewhere")
    moved = open_policy(Storage(tmp_path / "elsewhere"), 1)
    assert moved.folder == tmp_path / "elsewhere" / "policies" / "v000001-run-a"


def test_a_student_whose_weights_nobody_kept_has_a_version_of_its_own(
    storage: Storage, student: ModelFiles
) -> None:
    register_initial(storage, student, "run-a")
    put_policy(storage, policy_of(4, student))
    unkept = record_unkept(storage, run="run-b", parent=4, step=16)
    assert (unkept.version, unkept.path, unkept.fingerprint) == (5, None, None)
    assert read_policy(storage, 5) == unkept
    assert record_unkept(storage, run="run-b", parent=5, step=32).version == 6
    with pytest.raises(MissingError, match="run-b went on from it after step 16"):
        open_policy(storage, 5, student)


def test_the_newest_with_weights_is_none_that_nobody_kept(
    storage: Storage, student: ModelFiles
) -> None:
    assert newest_kept(storage) is None
    register_initial(storage, student, "run-a")
    put_policy(storage, policy_of(2, student))
    assert newest_kept(storage) == 2
    for parent in (2, 3):
        record_unkept(storage, run="run-b", parent=parent, step=16)
    assert newest_kept(storage) == 2
    assert free_version(storage, 2) == 5
    put_policy(storage, policy_of(5, student))
    assert newest_kept(storage) == 5
    assert free_version(storage, 2) == 5, "that another run published is not passed over"


def test_a_line_goes_from_child_to_parent(storage: Storage, student: ModelFiles) -> None:
    register_initial(storage, student, "run-a")
    for version, parent in ((1, 0), (2, 1), (3, 2), (5, 1)):
        put_policy(storage, policy_of(version, student, parent=parent))
    assert line_of(storage, 5, 9) == [5, 1, 0]
    assert line_of(storage, 3, 2) == [3, 2]
    put_policy(storage, policy_of(7, student, parent=6))
    with pytest.raises(MissingError, match="policy 6"):
        line_of(storage, 7, 2)


def test_an_unkept_version_is_never_anothers(
    storage: Storage, student: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take the number between the look and the put."""
    for version in (0, 1, 2):
        put_policy(storage, policy_of(version, student))
    monkeypatch.setattr("stillroom.replay.policies.policy_versions", lambda _: [0])
    assert record_unkept(storage, run="run-b", parent=0, step=4).version == 3
    assert read_policy(storage, 1).run == "run-a"


@pytest.mark.parametrize("field", ["path", "fingerprint"])
def test_weights_and_their_fingerprint_come_together(
    storage: Storage, student: ModelFiles, field: str
) -> None:
    put_policy(storage, policy_of(1, student, **{field: None}))
    with pytest.raises(CorruptError):
        read_policy(storage, 1)


def test_changed_weights_are_refused(storage: Storage, student: ModelFiles) -> None:
    register_initial(storage, student, "run-a")
    path = student.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MismatchError, match="changed after it was published"):
        open_policy(storage, 0)


def test_a_changed_config_is_refused(storage: Storage, student: ModelFiles) -> None:
    register_initial(storage, student, "run-a")
    path = student.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(MismatchError, match="changed after it was published"):
        open_policy(storage, 0)


def test_missing_weights_are_named(storage: Storage, student: ModelFiles) -> None:
    register_initial(storage, student, "run-a")
    (student.folder / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"model\.safetensors"):
        open_policy(storage, 0)
    shutil.rmtree(student.folder)
    with pytest.raises(MissingError, match="the weights of policy 0"):
        open_policy(storage, 0)


def check(files: ModelFiles, teacher: ModelFiles) -> None:
    """Whether a student suits a teacher."""
    check_student(files, teacher.tokenizer_fingerprint, teacher.vocab_size, "the-teacher")


def test_a_student_with_the_teachers_tokenizer_is_accepted(
    student: ModelFiles, teacher_dir: Path, tmp_path: Path
) -> None:
    teacher = inspect_model(str(teacher_dir))
    check(student, teacher)
    check(inspect_model(str(save_llama(tmp_path / "padded", 3, width=VOCAB + 7))), teacher)


def edit_tokenizer(files: ModelFiles, add: dict[str, int], swap: tuple[str, str]) -> ModelFiles:
    """Change the ids of a tokenizer's tokens."""
    path = files.folder / "tokenizer.json"
    value = json.loads(path.read_text())
    vocab = value["model"]["vocab"]
    one, other = swap
    vocab[one], vocab[other] = vocab[other], vocab[one]
    vocab.update(add)
    path.write_text(json.dumps(value))
    return inspect_model(str(files.folder))


def test_a_student_with_another_vocabulary_is_refused(
    student: ModelFiles, teacher_dir: Path
) -> None:
    larger = edit_tokenizer(student, {"new": VOCAB}, ("a", "a"))
    with pytest.raises(MismatchError, match=f"the-teacher, {VOCAB} tokens; got {VOCAB + 1}"):
        check(larger, inspect_model(str(teacher_dir)))


def test_a_student_with_another_tokenizer_of_the_same_size_is_refused(
    student: ModelFiles, teacher_dir: Path
) -> None:
    other = edit_tokenizer(student, {}, ("a", "b"))
    assert other.vocab_size == VOCAB
    with pytest.raises(MismatchError, match="another of the same size"):
        check(other, inspect_model(str(teacher_dir)))


def test_a_student_with_a_head_smaller_than_the_vocabulary_is_refused(
    student: ModelFiles, teacher_dir: Path
) -> None:
    small = replace(student, logit_width=VOCAB - 1)
    with pytest.raises(MismatchError, match=f"at least {VOCAB} rows; got {VOCAB - 1}"):
        check(small, inspect_model(str(teacher_dir)))
