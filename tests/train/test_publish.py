"""Publishing: the weights, then the record; the same again changes nothing, others are refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillroom.cache.causal_lm import load_causal_lm
from stillroom.cache.errors import ConfigError, MismatchError, StorageError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.policies import open_policy, policy_versions, read_policy, register_initial
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.lora import add_lora, merged_state
from stillroom.train.model_folder import write_model
from stillroom.train.publish import publish, save_student
from stillroom.train.student import load_student
from stillroom.train.trainer import ReplayTrainer


def test_published_student_is_the_trained_one(student_dir: Path, tmp_path: Path) -> None:
    """The folder loads as the student that was published, with its tokenizer."""
    storage = Storage(tmp_path)
    files = inspect_model(str(student_dir))
    register_initial(storage, files, "r")
    student = load_student(files, "float32", torch.device("cpu"))
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    for _ in range(2):
        policy = publish(storage, student, files, version=1, parent=0, run="r", step=7)
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
    first = publish(storage, student, files, version=1, parent=0, run="a", step=1)
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    with pytest.raises(MismatchError, match=r"policy 1.*of a"):
        publish(storage, student, files, version=1, parent=0, run="b", step=1)
    assert open_policy(storage, 1).fingerprint == first.fingerprint


def test_the_parent_is_the_policy_that_was_trained_from(student_dir: Path, tmp_path: Path) -> None:
    """Whatever version others took in between; and a parent is never newer."""
    storage = Storage(tmp_path)
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    assert publish(storage, student, files, version=3, parent=1, run="a", step=1).parent == 1
    assert read_policy(storage, 3).parent == 1
    with pytest.raises(MismatchError, match=r"trained from policy 2; got .* of a, from 1"):
        publish(storage, student, files, version=3, parent=2, run="a", step=1)
    with pytest.raises(ConfigError, match="above its parent, 5"):
        publish(storage, student, files, version=5, parent=5, run="a", step=1)


def test_object_store_is_refused(student_dir: Path) -> None:
    """Weights need a folder."""
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    with pytest.raises(StorageError, match="object store"):
        publish(Storage("s3://bucket/x"), student, files, version=1, parent=0, run="r", step=1)


def test_record_names_the_weights_that_were_trained(student_dir: Path, tmp_path: Path) -> None:
    """Weights left by a run that died before its record are not taken for those of the next."""
    storage = Storage(tmp_path)
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    publish(storage, student, files, version=1, parent=0, run="r", step=1)
    (tmp_path / "policies" / "000001.json").unlink()
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    publish(storage, student, files, version=1, parent=0, run="r", step=1)
    loaded = load_student(open_policy(storage, 1), "float32", torch.device("cpu"))
    for mine, theirs in zip(loaded.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_adapters_are_published_as_weights(student_dir: Path, tmp_path: Path) -> None:
    """A policy with a LoRA loads as a plain model that says the same; its LoRA lies beside it."""
    storage, files = Storage(tmp_path), inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    plain = {name: weight.clone() for name, weight in student.model.state_dict().items()}
    add_lora(student.model, LoraSettings(r=4, alpha=8))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    ids = torch.arange(20)[None]
    student.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = student.model(input_ids=ids, use_cache=False).logits
    policy = publish(storage, student, files, version=1, parent=0, run="r", step=1, adapter=True)
    published = open_policy(storage, 1)
    assert published.fingerprint == policy.fingerprint != files.fingerprint
    loaded = load_causal_lm(published, "float32", torch.device("cpu"))
    assert loaded.state_dict().keys() == plain.keys()
    with torch.no_grad():
        found = loaded(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, load_logits(student_dir, ids), atol=1e-2)
    adapters = load_file(published.folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    assert load_file(published.folder / "model.safetensors").keys() == plain.keys() - {
        "lm_head.weight"
    }


def load_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What a model says to some ids."""
    model = load_causal_lm(inspect_model(str(folder)), "float32", torch.device("cpu"))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def test_a_gathered_state_is_published_as_the_model_itself_is(
    student_dir: Path, tmp_path: Path
) -> None:
    """Where tied weights come as copies, as they do from shards: the same policy to the bit."""
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    state = {name: weight.clone() for name, weight in student.model.state_dict().items()}
    made = [
        publish(
            Storage(tmp_path / name),
            student,
            files,
            version=1,
            parent=0,
            run="r",
            step=1,
            state=given,
        )
        for name, given in (("own", None), ("gathered", state))
    ]
    assert made[0] == made[1]
    assert made[0].fingerprint == files.fingerprint


def test_a_trainer_saves_its_student(
    make_cache: Callable[..., Cache],
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a plain model that says what the trained one says; nothing that is there is replaced."""
    replay = StreamConfig(batch_rows=12, max_tokens=64)
    config = ReplayConfig(
        device="cpu",
        learning_rate=1e-2,
        max_steps=2,
        lora=LoraSettings(r=4, publish="adapter"),
        replay=replay,
    )
    cache = make_cache(tmp_path / "cache")
    trainer = ReplayTrainer(student_dir, cache, config, output=tmp_path / "runs")
    trainer.train()
    monkeypatch.chdir(tmp_path)
    saved = save_student(trainer, "out/student")
    assert saved == tmp_path / "out" / "student"
    assert [path.name for path in saved.parent.iterdir()] == ["student"]
    files = inspect_model(str(saved))
    assert files.tokenizer_fingerprint == trainer.files.tokenizer_fingerprint
    assert (saved / "adapter" / "adapter_model.safetensors").is_file()
    merged = merged_state(trainer.student.model, trainer.parallel.full_state_dict())
    loaded = load_causal_lm(files, "float32", torch.device("cpu")).state_dict()
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[name], merged[name]) for name in merged)
    with pytest.raises(ConfigError, match=r"out/student: expected a folder that is not there yet"):
        save_student(trainer, saved)
    assert inspect_model(str(saved)).fingerprint == files.fingerprint


def test_what_a_killed_process_left_goes_a_day_later(student_dir: Path, tmp_path: Path) -> None:
    """What is being written now may be of a process that is alive."""
    files = inspect_model(str(student_dir))
    student = load_student(files, "float32", torch.device("cpu"))
    folders = [tmp_path / "policies" / f".{name}.tmp" for name in ("old", "written", "new")]
    day_ago = time.time() - 24 * 3600 - 60
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    for path in (folders[0] / "model.safetensors", folders[0], folders[1]):
        os.utime(path, (day_ago, day_ago))
    publish(Storage(tmp_path), student, files, version=1, parent=0, run="r", step=1)
    assert [folder.exists() for folder in folders] == [False, True, True]


@pytest.fixture
def parent(student_dir: Path, tmp_path: Path) -> Path:
    """A student's folder that a test may change."""
    return shutil.copytree(student_dir, tmp_path / "parent")


def test_a_loose_generation_config_is_published_as_it_is(parent: Path, tmp_path: Path) -> None:
    """transformers loads it and refuses to save it."""
    path = parent / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_k": 20}))
    files = inspect_model(str(parent))
    student = load_student(files, "float32", torch.device("cpu"))
    storage = Storage(tmp_path)
    publish(storage, student, files, version=1, parent=0, run="r", step=1)
    saved = open_policy(storage, 1).folder / path.name
    assert saved.read_bytes() == path.read_bytes()


def test_generation_settings_in_the_config_are_published(parent: Path, tmp_path: Path) -> None:
    """Where older folders keep them; ids of tokens alone are none."""
    (parent / "generation_config.json").unlink()
    config, storage = parent / "config.json", Storage(tmp_path)
    for version, settings in ((1, {}), (2, {"temperature": 0.6, "do_sample": True, "top_k": 7})):
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        files = inspect_model(str(parent))
        student = load_student(files, "float32", torch.device("cpu"))
        publish(storage, student, files, version=version, parent=version - 1, run="r", step=1)
        saved = open_policy(storage, version).folder
        assert (saved / "generation_config.json").exists() == bool(settings)
    found = load_causal_lm(inspect_model(str(saved)), "float32", torch.device("cpu"))
    assert found.generation_config.temperature == 0.6
    assert found.generation_config.top_k == 7


def test_half_written_files_of_a_folder_are_replaced(parent: Path, tmp_path: Path) -> None:
    files = inspect_model(str(parent))
    student = load_student(files, "float32", torch.device("cpu"))
    (parent / "additional_chat_templates").mkdir()
    names = ("chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/a.jinja")
    (parent / names[2]).write_text("whole")
    saved = tmp_path / "student"
    (saved / "additional_chat_templates").mkdir(parents=True)
    for name in names:
        (saved / name).write_text("{")
    write_model(student.model, student.model.state_dict(), files, saved)
    for name in names:
        assert (saved / name).read_bytes() == (parent / name).read_bytes()


def test_every_file_of_the_tokenizer_is_published(parent: Path, tmp_path: Path) -> None:
    """Whatever kinds of them there are, and folders."""
    names = ("added_tokens.json", "tekken.json", "additional_chat_templates/tool_use.jinja")
    (parent / "additional_chat_templates").mkdir()
    for name in names:
        (parent / name).write_text("{}")
    files = inspect_model(str(parent))
    student = load_student(files, "float32", torch.device("cpu"))
    publish(Storage(tmp_path), student, files, version=1, parent=0, run="r", step=1)
    saved = open_policy(Storage(tmp_path), 1).folder
    for name in (*names, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (saved / name).read_bytes() == (parent / name).read_bytes()


def test_a_tokenizer_in_the_older_files_alone_is_published(parent: Path, tmp_path: Path) -> None:
    """Its added tokens are in a file of their own."""
    vocab = json.loads((parent / "tokenizer.json").read_text())["model"]["vocab"]
    old = {
        "vocab.json": vocab,
        "added_tokens.json": {"<|extra|>": len(vocab), "<|end|>": len(vocab) + 1},
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"},
    }
    (parent / "tokenizer.json").unlink()
    for name, content in old.items():
        (parent / name).write_text(json.dumps(content))
    (parent / "merges.txt").write_text("a b\nab c\n")
    files = inspect_model(str(parent))
    assert files.vocab_size == len(vocab) + 3, "the two, and one of GPT-2's own"
    student = load_student(files, "float32", torch.device("cpu"))
    publish(Storage(tmp_path), student, files, version=1, parent=0, run="r", step=1)
    saved = open_policy(Storage(tmp_path), 1)
    assert saved.tokenizer_fingerprint == files.tokenizer_fingerprint


@pytest.mark.parametrize("left", ["another tokenizer", "none"])
def test_a_student_without_its_parent_s_tokenizer_is_not_announced(
    parent: Path, tmp_path: Path, left: str
) -> None:
    files = inspect_model(str(parent))
    student = load_student(files, "float32", torch.device("cpu"))
    for path in parent.glob("tokenizer*"):
        if left == "none":
            path.unlink()
        else:
            path.write_text(path.read_text().replace("<|end|>", "<|fin|>"))
    storage = Storage(tmp_path)
    with pytest.raises(MismatchError, match=rf"parent: expected .*{files.tokenizer_fingerprint}"):
        publish(storage, student, files, version=1, parent=0, run="r", step=1)
    assert policy_versions(storage) == []
    assert list((tmp_path / "policies").iterdir()) == []
