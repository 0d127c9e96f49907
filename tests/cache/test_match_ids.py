"""Maps between vocabularies: exact where a teacher knows every token, refused everywhere else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from stillroom.cache.errors import InputError, MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.match_ids import match_ids
from tests.conftest import VOCAB
from tests.vocabularies import change_json, reordered


@pytest.fixture
def student(student_dir: Path) -> ModelFiles:
    """The tiny student."""
    return inspect_model(str(student_dir))


@pytest.fixture
def other(teacher_dir: Path, tmp_path: Path) -> Path:
    """A teacher with the same tokens in another order and three more."""
    return reordered(teacher_dir, tmp_path / "other", more=["zq", "bc", "<|more|>"])


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """What its tokenizer.json holds."""
    value: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return value


def test_same_tokenizer_needs_no_map(student: ModelFiles, teacher_dir: Path) -> None:
    assert match_ids(inspect_model(str(teacher_dir)), student) is None


def test_every_token_keeps_its_string(student: ModelFiles, other: Path) -> None:
    teacher = inspect_model(str(other))
    found = match_ids(teacher, student)
    assert found is not None
    assert (found.vocab_size, found.teacher_vocab_size) == (VOCAB, VOCAB + 3)
    assert found.tokenizer == student.tokenizer_fingerprint
    assert found.teacher_tokenizer == teacher.tokenizer_fingerprint
    own, known = (Tokenizer.from_file(str(f.folder / "tokenizer.json")) for f in (student, teacher))
    strings = [known.id_to_token(int(i)) for i in found.teacher_id]
    assert strings == [own.id_to_token(i) for i in range(VOCAB)]
    assert {known.id_to_token(int(i)) for i in found.teacher_only} == {"zq", "bc", "<|more|>"}
    text = "an abc, abcabc: caf\u00e9<|end|>"
    assert found.teacher_id[own.encode(text).ids].tolist() == known.encode(text).ids


def test_tokens_without_a_partner_are_named(student: ModelFiles, other: Path) -> None:
    raw = tokenizer_of(other)
    for token in ("ab", "abc"):
        raw["model"]["vocab"][f"{token}?"] = raw["model"]["vocab"].pop(token)
    raw["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match=rf"2 of its {VOCAB} tokens .* such as 'ab', 'abc'"):
        match_ids(inspect_model(str(other)), student)


def test_a_student_with_more_tokens_is_refused(teacher_dir: Path, other: Path) -> None:
    with pytest.raises(MismatchError, match=rf"3 of its {VOCAB + 3} tokens"):
        match_ids(inspect_model(str(teacher_dir)), inspect_model(str(other)))


@pytest.mark.parametrize("merges", [[["b", "c"]], [["a", "b"], ["ab", "c"], ["z", "q"]]])
def test_other_merges_are_refused(
    student: ModelFiles, other: Path, merges: list[list[str]]
) -> None:
    """The tokens are all there, but text becomes others."""
    raw = tokenizer_of(other)
    raw["model"]["merges"] = merges
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match="expected the same tokens for the same text; got"):
        match_ids(inspect_model(str(other)), student)


def test_a_special_token_of_the_teacher_alone_is_no_text(student: ModelFiles, other: Path) -> None:
    raw = tokenizer_of(other)
    token = raw["added_tokens"][0]
    own = {"id": raw["model"]["vocab"]["<|more|>"], "content": "<|more|>"}
    raw["added_tokens"].append(token | own)
    (other / "tokenizer.json").write_text(json.dumps(raw))
    found = match_ids(inspect_model(str(other)), student)
    assert found is not None
    assert len(found.teacher_only) == 3
    raw["added_tokens"][-1]["special"] = False
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match=r"others in 1 of .*<\|more\|>"):
        match_ids(inspect_model(str(other)), student)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    ],
)
def test_another_reading_of_text_is_refused(
    student: ModelFiles, other: Path, changes: dict[str, Any]
) -> None:
    raw = tokenizer_of(other)
    if "pre_tokenizer" in changes:
        changes["pre_tokenizer"] = raw["pre_tokenizer"] | changes["pre_tokenizer"]
    (other / "tokenizer.json").write_text(json.dumps(raw | changes))
    with pytest.raises(MismatchError, match=r"others in \d+ of \d+ lines, such as \['"):
        match_ids(inspect_model(str(other)), student)


def test_another_text_of_a_token_is_refused(student: ModelFiles, other: Path) -> None:
    change_json(other / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(MismatchError, match="expected the same text for each token; got other"):
        match_ids(inspect_model(str(other)), student)


def test_ids_without_a_token_are_refused(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    """No teacher could be asked about them, and a student can sample them."""
    folder = reordered(student_dir, tmp_path / "holes")
    raw = tokenizer_of(folder)
    raw["model"]["vocab"]["abc"] = VOCAB + 4
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    change_json(folder / "config.json", vocab_size=VOCAB + 5)
    with pytest.raises(InputError, match=r"a token for each id; got 5 ids without one"):
        match_ids(inspect_model(str(teacher_dir)), inspect_model(str(folder)))


def test_a_folder_without_tokenizer_json_is_named(
    student: ModelFiles, other: Path, tmp_path: Path
) -> None:
    teacher = inspect_model(str(other))
    (other / "tokenizer.json").unlink()
    with pytest.raises(MissingError, match=r"tokenizer\.json: expected a tokenizer to map"):
        match_ids(teacher, student)


def test_ids_are_mapped_there_and_back(student: ModelFiles, other: Path) -> None:
    found = match_ids(inspect_model(str(other)), student)
    assert found is not None
    ids = np.array([[0, 5], [VOCAB - 1, 2**32 - 1]], np.uint32)
    assert (found.to_student(found.to_teacher(ids)) == ids).all()
    assert (found.to_student(found.teacher_only) == 2**32 - 1).all()
