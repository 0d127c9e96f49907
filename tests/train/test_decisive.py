"""Which settings decide what a run is: those of training, but for what only decides how it runs."""

from dataclasses import replace
from typing import Any

import pytest

from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.decisive import FREE, decisive_settings, differing, named
from stillroom.train.phases import Phase

CONFIG = ReplayConfig()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"learning_rate": 1e-3}, ["train.learning_rate"]),
        ({"optimizer_args": {"eps": 1e-4}}, ["train.optimizer_args.eps"]),
        ({"kind": "reverse", "seed": 3}, ["train.kind", "train.seed"]),
        ({"max_steps": 9}, ["train.max_steps"]),
        ({"gradient_accumulation_steps": 2}, ["train.gradient_accumulation_steps"]),
        ({"phases": (Phase(max_steps=3),)}, ["train.phases"]),
        ({"replay": replace(CONFIG.replay, batch_rows=3)}, ["train.replay.batch_rows"]),
        ({"replay": replace(CONFIG.replay, max_tokens=3000)}, []),
        ({"eval_root": "x", "load_best_model_at_end": True}, ["train.eval_root"]),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-6}}, ["train.lr_scheduler_kwargs.min_lr"]),
        ({"device": "cpu", "parallel": "fsdp", "save_steps": 4, "loss_bytes": 1 << 21}, []),
    ],
    ids=str,
)
def test_what_differs_is_named(changes: dict[str, Any], names: list[str]) -> None:
    earlier, now = (
        decisive_settings(config, "train.") for config in (CONFIG, replace(CONFIG, **changes))
    )
    assert differing(earlier, now) == differing(now, earlier) == names


def test_adapters_decide() -> None:
    settings = decisive_settings(replace(CONFIG, lora=LoraSettings(r=4)), "train.")
    other = decisive_settings(replace(CONFIG, lora=LoraSettings(r=4, alpha=64.0)), "train.")
    names = differing(settings, other)
    assert names == ["train.lora.alpha"]
    assert (named(settings, names), named(other, names)) == (
        "train.lora.alpha = 32.0",
        "train.lora.alpha = 64.0",
    )
    assert "train.lora.r" in differing(settings, decisive_settings(CONFIG, "train."))


def test_every_free_setting_of_training_exists() -> None:
    names = {name.removeprefix("train.") for name in FREE if name.startswith("train.")}
    for name in names:
        owner = CONFIG.replay if name.startswith("replay.") else CONFIG
        assert hasattr(owner, name.removeprefix("replay.")), name
