"""What `run` refuses before it writes anything; that of its models is in tests/integration."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError
from stillroom.cache.teacher import TeacherConfig
from stillroom.replay.prompts import PromptsConfig
from stillroom.replay.refresh import RefreshConfig
from stillroom.train.config import ReplayConfig
from stillroom.train.preflight import check_batch, check_output, settings_of
from stillroom.train.run_config import RunConfig


@pytest.fixture
def config() -> RunConfig:
    """Settings of a run."""
    return RunConfig(
        root="root",
        output="output",
        student="student",
        teacher=TeacherConfig(model="teacher"),
        prompts=PromptsConfig(source="prompts.jsonl"),
        held_out=PromptsConfig(source="held_out.jsonl"),
    )


def write(path: Path, record: dict[str, Any]) -> Path:
    """A file of JSON."""
    path.write_bytes(jsonfile.dump(record))
    return path


def test_the_output_of_the_same_run_or_of_none_is_fine(config: RunConfig, tmp_path: Path) -> None:
    check_output(tmp_path / "run.json", config)
    check_output(write(tmp_path / "run.json", {"settings": settings_of(config)}), config)


def test_the_output_of_another_run_names_what_differs(config: RunConfig, tmp_path: Path) -> None:
    other = settings_of(config) | {"student": "another"}
    path = write(tmp_path / "run.json", {"settings": other})
    with pytest.raises(ConfigError, match=r"student = 'another'; got student = 'student'\. Give"):
        check_output(path, config)


@pytest.mark.parametrize(
    ("record", "got"),
    [
        ({}, "no settings"),
        ({"settings": None}, "settings = None"),
        ({"settings": 3}, "settings = 3"),
        ({"settings": "student"}, "settings = 'student'"),
        ({"settings": [["student", 1]]}, r"settings = \[\['student', 1\]\]"),
    ],
)
def test_a_record_without_settings_is_named(
    config: RunConfig, tmp_path: Path, record: dict[str, Any], got: str
) -> None:
    path = write(tmp_path / "run.json", record)
    with pytest.raises(CorruptError, match=rf"run\.json: expected a run's settings.*; got {got}\."):
        check_output(path, config)


def test_a_step_larger_than_a_round_is_refused(config: RunConfig) -> None:
    check_batch(config, prompts=64)
    with pytest.raises(ConfigError, match=r"batch_rows: expected at most the 63 rollouts .*got 64"):
        check_batch(config, prompts=63)
    fewer = replace(config, refresh=RefreshConfig(prompts_per_cycle=20))
    with pytest.raises(ConfigError, match="20 rollouts"):
        check_batch(fewer, prompts=100)


def test_how_a_run_is_run_may_change(config: RunConfig) -> None:
    """Memory, speed and the number of processes are no part of what a run is."""
    how = ReplayConfig(
        loss_bytes=1 << 24,
        gradient_checkpointing=True,
        torch_compile=True,
        parallel="fsdp",
        device="cpu",
    )
    assert settings_of(replace(config, train=how)) == settings_of(config)
    other = replace(config, train=ReplayConfig(bf16=True))
    assert settings_of(other) != settings_of(config)
