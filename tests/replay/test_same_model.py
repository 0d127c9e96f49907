"""Which folder can take the place of another in an engine that runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import InputError, MismatchError
from stillroom.cache.fingerprint import inspect_model
from stillroom.replay.same_model import check_same_model
from tests.conftest import save_llama


def check(first: Path, second: Path) -> None:
    """Compare two folders."""
    check_same_model(inspect_model(str(first)), inspect_model(str(second)))


def change_config(folder: Path, *without: str, **values: Any) -> Path:
    """Set values in a folder's config, and remove some."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({n: v for n, v in config.items() if n not in without}))
    return folder


def test_other_weights_are_the_same_model(teacher_dir: Path, student_dir: Path) -> None:
    check(teacher_dir, student_dir)


def test_what_an_older_version_wrote_is_the_same_model(teacher_dir: Path, tmp_path: Path) -> None:
    """It left out what has a default, and named its own version."""
    older = change_config(save_llama(tmp_path / "older", 4), transformers_version="4.0.0")
    check(teacher_dir, change_config(older, "attention_bias", dtype="bfloat16"))


def test_other_settings_are_named(teacher_dir: Path, tmp_path: Path) -> None:
    other = change_config(save_llama(tmp_path / "other", 4), rms_norm_eps=0.5)
    with pytest.raises(MismatchError, match="rms_norm_eps"):
        check(teacher_dir, other)


def test_another_tokenizer_is_named(teacher_dir: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", 4)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][1]["content"] = "<|person|>"
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="the tokenizer"):
        check(teacher_dir, other)


@pytest.mark.parametrize("change", ["gone", "shape", "more"])
def test_other_tensors_are_named(teacher_dir: Path, tmp_path: Path, change: str) -> None:
    from safetensors.numpy import load_file, save_file

    other = save_llama(tmp_path / "other", 4)
    path, name = other / "model.safetensors", "model.norm.weight"
    tensors = load_file(path)
    if change == "gone":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1].copy()
    else:
        name = "model.norm.zero"
        tensors[name] = tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=name):
        check(teacher_dir, other)


def test_a_tied_head_may_be_stored_or_not(teacher_dir: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    other = save_llama(tmp_path / "other", 4)
    path = other / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    check(teacher_dir, other)
    check(other, teacher_dir)


def test_a_config_that_cannot_be_read(teacher_dir: Path, tmp_path: Path) -> None:
    other = change_config(save_llama(tmp_path / "other", 4), model_type="no-such-model")
    with pytest.raises(InputError, match="a model"):
        check(teacher_dir, other)
