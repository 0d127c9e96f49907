"""What accelerate's launcher asks for is told of where the settings do not say it."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.train.config import ReplayConfig
from stillroom.train.launcher import asked_in_vain

ENVIRON = {
    "FSDP": {"ACCELERATE_USE_FSDP": "true"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "precision bf16": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "compiler inductor": {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
}
SAID: dict[str, dict[str, Any]] = {
    "FSDP": {"parallel": "fsdp"},
    "DeepSpeed": {"parallel": "fsdp"},
    "precision bf16": {"bf16": True},
    "compiler inductor": {"torch_compile": True},
}


@pytest.mark.parametrize("name", ENVIRON)
def test_each_names_its_setting(name: str) -> None:
    said = asked_in_vain(ReplayConfig(), ENVIRON[name])
    ((setting, value),) = SAID[name].items()
    assert f"asks for {name}, which" in said
    assert said.endswith(f"train.{setting}: {str(value).lower()}")
    assert asked_in_vain(ReplayConfig(**SAID[name]), ENVIRON[name]) == ""


def test_all_at_once_and_nothing() -> None:
    everything = {key: value for one in ENVIRON.values() for key, value in one.items()}
    said = asked_in_vain(ReplayConfig(), everything)
    assert all(name in said for name in ENVIRON)
    assert said.count("train.parallel") == 1
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    assert asked_in_vain(ReplayConfig(), launched) == asked_in_vain(ReplayConfig(), {}) == ""
