"""Which settings decide what a run is, by dotted name; all others may change while it goes on."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stillroom.cache import jsonfile

FREE = frozenset(
    {
        "rounds",
        "accept_numerics",
        "teacher.max_batch_tokens",
        "teacher.head_rows",
        "teacher.device",
        "sampler.device",
        "train.device",
        "train.parallel",
        "train.gradient_checkpointing",
        "train.torch_compile",
        "train.loss_bytes",
        "train.save_steps",
        "train.save_total_limit",
        "train.drift_every_steps",
        "train.load_best_model_at_end",
        "train.replay.max_tokens",
        "train.replay.cached_bytes",
        "train.replay.ahead_bytes",
        "train.replay.threads",
        "train.replay.share_prompts",
        "train.replay.even_ranks",
    }
)
"""Settings that may change while a run goes on: they decide how it runs, and when and with which
of its students it ends, not what it learns."""


def decisive_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings that decide what a run is, by dotted name, as they come back from JSON.

    Args:
        config: all settings.
        prefix: where they stand among those of `run`, such as `train.`.
    """
    flat = jsonfile.load(jsonfile.dump(_flat(asdict(config), prefix)), "settings")
    return {name: value for name, value in flat.items() if name not in FREE}


def differing(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that are not the same in both, sorted."""
    return sorted(k for k in now.keys() | earlier.keys() if now.get(k) != earlier.get(k))


def named(settings: Mapping[str, Any], names: list[str]) -> str:
    """`name = value, ...`; a setting that is not there is None."""
    return ", ".join(f"{name} = {settings.get(name)!r:.200}" for name in names)


def _flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return out
