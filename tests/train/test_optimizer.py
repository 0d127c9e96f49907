"""Optimisers and schedules by name; what none can be made of is refused without a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillroom.cache.errors import ConfigError
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.optimizer import (
    UNSHARDED,
    check_sharded,
    check_trainable,
    make_optimizer,
    make_schedule,
)

CPU = torch.device("cpu")


def parameters() -> list[torch.nn.Parameter]:
    """A matrix, and one that is not trained."""
    frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return [torch.nn.Parameter(torch.ones(2, 2)), frozen]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", {"eps": 1e-5, "betas": (0.8, 0.9), "amsgrad": True}),
        ("SGD", {"momentum": 0.5}),
        ("Adafactor", {}),
        ("Rprop", {}),
        ("Muon", {}),
    ],
)
def test_any_class_of_torch_with_its_arguments(name: str, settings: dict[str, Any]) -> None:
    config = ReplayConfig(optimizer=name, optimizer_args=settings, learning_rate=0.25)
    matrix, frozen = parameters()
    made = make_optimizer([matrix, frozen], config)
    (group,) = made.param_groups
    assert type(made).__name__ == name
    assert group["params"] == [matrix], "frozen ones are no part of it"
    assert group["lr"] == 0.25
    assert {key: group[key] for key in settings} == settings
    assert group.get("weight_decay", 0) == 0, "none but what is set"
    matrix.grad = torch.ones(2, 2)
    made.step()
    assert not torch.equal(matrix, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": "Adagrid"}, r"train\.optimizer: expected a class in torch\.optim"),
        ({"optimizer": "lr_scheduler"}, r"train\.optimizer: expected a class in torch\.optim"),
        ({"optimizer": "LBFGS"}, r"train\.optimizer: expected one that needs no closure"),
        ({"optimizer": "Muon"}, r"train\.optimizer: .*2D parameters"),
        ({"optimizer": "SparseAdam"}, r"train\.optimizer: .*take a step.*dense gradients"),
        ({"optimizer": "Rprop", "weight_decay": 0.1}, r"train\.optimizer.*weight_decay"),
        ({"optimizer_args": {"epsilon": 1.0}}, r"train\.optimizer.*epsilon"),
        ({"optimizer_args": {"lr": 1.0}}, r"train\.optimizer_args.*got lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"train\.lr_scheduler_type.*decay_steps"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2.0}},
            r"train\.lr_scheduler_type.*power",
        ),
        ({"lr_scheduler_kwargs": {"power": 2.0}}, r"train\.lr_scheduler_kwargs.*got power"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_warmup_steps": 2}},
            r"train\.lr_scheduler_kwargs.*got num_warmup_steps.*train\.warmup_steps",
        ),
        ({"lr_scheduler_type": "foo"}, r"train\.lr_scheduler_type.*foo"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, r"train\.lr_scheduler_type.*counts steps"),
    ],
)
def test_what_cannot_be_made_is_named(changes: dict[str, Any], match: str) -> None:
    check_trainable(ReplayConfig(), CPU)
    with pytest.raises(ConfigError, match=match):
        check_trainable(ReplayConfig(**changes), CPU)


@pytest.mark.parametrize("name", UNSHARDED)
def test_what_cannot_step_on_shards_is_named(name: str) -> None:
    """Where weights are shared out: with fsdp, over several processes."""
    config = ReplayConfig(optimizer=name, parallel="fsdp")
    check_sharded(config, 1)
    check_sharded(ReplayConfig(optimizer=name), 2)
    check_sharded(ReplayConfig(parallel="fsdp"), 2)
    with pytest.raises(ConfigError, match=rf"with fsdp: .*got '{name}'\. Use ddp"):
        check_sharded(config, 2)


def test_adapters_are_matrices_alone() -> None:
    check_trainable(ReplayConfig(optimizer="Muon", lora=LoraSettings()), CPU)


def test_a_schedule_warms_up_and_falls() -> None:
    config = ReplayConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2)
    optimizer = make_optimizer(parameters(), config)
    schedule, rates = make_schedule(optimizer, config, total_steps=4), []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("cosine_with_min_lr", {"min_lr": 0.5}, [1.0, 0.75, 0.5]),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 1, "decay_type": "linear", "min_lr_ratio": 0.25},
            [1.0, 1.0, 0.25],
        ),
    ],
)
def test_schedules_with_arguments_of_their_own(
    name: str, kwargs: dict[str, Any], expected: list[float]
) -> None:
    config = ReplayConfig(learning_rate=1.0, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)
    check_trainable(config, CPU)
    optimizer = make_optimizer(parameters(), config)
    schedule, rates = make_schedule(optimizer, config, total_steps=2), []
    for _ in range(3):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)
