"""docs/training.md runs, and its settings are some."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.policies import policy_versions, register_initial
from stillroom.train import ReplayConfig
from stillroom.train.phases import Phase
from stillroom.train.settings import build_settings

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def blocks(language: str) -> list[str]:
    """Its listings."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_code_runs(
    make_cache: Callable[..., Cache],
    student_dir: Path,
    teacher_dir: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cache = make_cache(tmp_path / "cache")
    register_initial(cache.storage, inspect_model(str(student_dir)), "test")
    found: dict[str, Any] = {
        "student": str(student_dir),
        "teacher": str(teacher_dir),
        "prompts": str(prompts_file),
        "cache": str(tmp_path / "cache"),
        "output": tmp_path / "output",
    }
    for block in blocks("python"):
        exec(block, found)
    assert found["report"].steps == len(found["report"].losses) == 6
    saved = inspect_model(str(tmp_path / "output" / "student"))
    first = inspect_model(str(student_dir))
    assert saved.fingerprint != first.fingerprint
    assert saved.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert found["refreshed"].steps == 6
    assert policy_versions(cache.storage) == [0, 1, 2]
    assert found["found"].loss > 0
    assert found["again"].callbacks[-1].__class__ is found["StopWhenLow"]


def test_the_settings_are_some() -> None:
    made = [build_settings(ReplayConfig, yaml.safe_load(b)["train"], "x") for b in blocks("yaml")]
    lora, phases, measured = made
    assert lora.publishes_adapter
    assert [type(phase) for phase in phases.phases] == [Phase, Phase]
    assert measured.load_best_model_at_end


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", TEXT))
    known = {
        *ReplayConfig.__dataclass_fields__,
        *StreamConfig.__dataclass_fields__,
        "target_modules",
    }
    assert named - known == {"run_name", "save_student"}
