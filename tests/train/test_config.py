"""Settings of training are checked where they are given."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.phases import Phase
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "fast"}, r"^train\.learning_rate: expected float; got 'fast'"),
        ({"max_steps": 2.5}, r"^train\.max_steps: expected int; got 2\.5"),
        ({"save_steps": None}, r"^train\.save_steps: expected int; got None"),
        ({"bf16": 1}, r"^train\.bf16: expected bool; got 1"),
        ({"phases": ("x",)}, r"^train\.phases, item 0: expected settings of Phase.*got 'x'"),
        ({"phases": Phase()}, r"^train\.phases: expected a list"),
        ({"lora": 4}, r"^train\.lora: expected settings of LoraSettings"),
        ({"replay": None}, r"^train\.replay: expected settings of StreamConfig"),
        (
            {"optimizer_args": {"eps": "x"}},
            r"^train\.optimizer_args, key 'eps': expected bool or int or float or tuple; got 'x'",
        ),
        ({"optimizer_args": {"betas": [0.9, "x"]}}, r"key 'betas', item 1: expected float"),
    ],
)
def test_settings_of_a_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReplayConfig(**settings)


def test_python_takes_what_a_file_may_hold() -> None:
    loose: dict[str, Any] = {"learning_rate": "1e-4", "phases": [Phase(max_steps=1)]}
    made = ReplayConfig(num_train_epochs=1, **loose | {"lora": {"r": 4}})
    phases = (Phase(max_steps=1),)
    assert made == ReplayConfig(learning_rate=1e-4, phases=phases, lora=LoraSettings(r=4))
    assert made.phases == phases
    assert type(made.num_train_epochs) is float


def test_arguments_of_an_optimiser_keep_their_types() -> None:
    """A count stays an int, which some of torch's classes ask for."""
    given = {"betas": [0.9, 0.95], "eps": "1e-6", "ns_steps": 3, "lr_decay": 0.5, "fused": True}
    made = build_settings(ReplayConfig, {"optimizer_args": given}, "file").optimizer_args
    assert made == given | {"betas": (0.9, 0.95), "eps": 1e-6}
    assert [type(value) for value in made.values()] == [tuple, float, int, float, bool]
