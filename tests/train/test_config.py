"""Settings of training are checked where they are given."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.settings import build_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "cuda:0"),
        ("parallel", "pipeline"),
        ("num_train_epochs", 0.0),
        ("learning_rate", float("nan")),
        ("max_grad_norm", -1.0),
        ("temperature", 0.0),
        ("max_steps", 0),
        ("gradient_accumulation_steps", 0),
        ("save_total_limit", 0),
        ("drift_every_steps", 0),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("save_steps", -1),
        ("loss_bytes", 1),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{name}: "):
        ReplayConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_steps", 5),
        ("stop_reverse_kl", 0.1),
        ("early_stopping_patience", 2),
        ("load_best_model_at_end", True),
    ],
)
def test_measuring_needs_a_cache_to_measure_on(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{name}: .*nothing without train\.eval_root"):
        ReplayConfig(**{name: value})
    assert getattr(ReplayConfig(**{"eval_root": "held", name: value}), name) == value


def test_adapters_come_from_nested_settings() -> None:
    made = build_settings(ReplayConfig, {"lora": {"r": 4, "target_modules": ["q_proj"]}}, "file")
    assert made.lora == LoraSettings(r=4, target_modules=("q_proj",))
    assert not made.publishes_adapter
    assert ReplayConfig(lora=LoraSettings(publish="adapter")).publishes_adapter
    assert build_settings(ReplayConfig, {"lora": None}, "file").lora is None
    with pytest.raises(ConfigError, match=r"key 'rank'.*unknown key"):
        build_settings(ReplayConfig, {"lora": {"rank": 4}}, "file")
    with pytest.raises(ConfigError, match="settings of LoraSettings as key: value"):
        build_settings(ReplayConfig, {"lora": 4}, "file")
