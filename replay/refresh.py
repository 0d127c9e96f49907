"""The refresher: what to sample next from the newest student, and which parts are too old to
replay.

It plans and retires; the rollout job samples, and the score job scores. Nothing is deleted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.part import policy_of
from stillroom.cache.store import Cache
from stillroom.replay.cycle import (
    Cycle,
    Unit,
    has_cycle,
    load_cycle,
    plan_cycle,
    store_cycle,
)
from stillroom.replay.policies import line_of
from stillroom.replay.prompts import Prompt
from stillroom.replay.sampler import SamplerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshConfig:
    """How much is sampled anew from each student, and how long rollouts stay in use."""

    prompts_per_cycle: int = 512
    """Prompts that are sampled anew; >= 1. Those sampled longest ago come first."""
    unit_rollouts: int = 4096
    """Rollouts of a part, the unit of scoring work; >= 1."""
    max_lag: int = 1
    """Parts of students more than this many behind the newest, from parent to child, are retired;
    >= 0."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.prompts_per_cycle, self.unit_rollouts) < 1 or self.max_lag < 0:
            got = f"{self.prompts_per_cycle}, {self.unit_rollouts} and {self.max_lag}"
            names = "refresh.prompts_per_cycle, unit_rollouts, max_lag"
            raise ConfigError(names, "at least 1, 1 and 0", got, "Change them.")


def refresh(
    cache: Cache,
    prompts: Sequence[Prompt],
    sampler: SamplerConfig,
    config: RefreshConfig,
    policy_version: int,
) -> Cycle:
    """Plan the sampling of one policy, once: a stored plan of the same policy is taken as it is.

    Returns:
        The cycle to roll out.

    Raises:
        MismatchError: the policy is planned already, with other sampler settings or another seed:
            parts would record what was not used.
    """
    chosen = stalest(cache, prompts, policy_version)[: config.prompts_per_cycle]
    cycle = plan_cycle(
        chosen,
        sampler,
        policy_version=policy_version,
        seed=config.seed,
        unit_rollouts=config.unit_rollouts,
    )
    stored = store_cycle(cache, cycle_name(policy_version), cycle)
    for unit in stored.units:
        _check_settings(cache, unit, {**sampler.recorded(), "seed": config.seed})
    return stored


def _check_settings(cache: Cache, unit: Unit, asked: dict[str, Any]) -> None:
    planned = {**unit.sampler, "seed": unit.seed}
    differing = [key for key in asked if planned.get(key) != asked[key]]
    if differing:
        where = cache.storage.describe(f"units/{cycle_name(unit.policy_version)}.json")
        do = f"Policy {unit.policy_version} is planned already: use those settings."
        expected, got = (
            ", ".join(f"{key} = {values.get(key)!r}" for key in differing)
            for values in (planned, asked)
        )
        raise MismatchError(where, expected, got, do)


def retire_stale(cache: Cache, policy_version: int, max_lag: int) -> list[str]:
    """Retire parts that are more than `max_lag` policies behind; returns those retired now.

    How far a part is behind is how many of the policy, its parent, the parent's parent and so on
    are newer than the part's: versions that other runs took, or a run that was resumed from an
    older checkpoint, do not count.

    Raises:
        MissingError: the policy, or one that it comes from, is not recorded; none is retired.
    """
    line = line_of(cache.storage, policy_version, max_lag + 1)
    if len(line) <= max_lag:
        return []
    already = cache.retired()
    stale = [p for p in cache.parts() if policy_of(p) < line[max_lag] and p not in already]
    for part in stale:
        cache.retire(part, f"more than {max_lag} versions behind policy {policy_version}")
    return stale


def stalest(cache: Cache, prompts: Sequence[Prompt], policy_version: int) -> list[Prompt]:
    """Prompts by the newest earlier policy that sampled them, oldest (or never) first; ties in
    their own order."""
    newest: dict[int, int] = {}
    for version in range(policy_version):
        if has_cycle(cache, cycle_name(version)):
            cycle = load_cycle(cache, cycle_name(version))
            newest |= dict.fromkeys((i for unit in cycle.units for i in unit.prompt_ids), version)
    return sorted(prompts, key=lambda prompt: newest.get(prompt.id, -1))


def cycle_name(policy_version: int) -> str:
    """Name of the cycle that samples a policy."""
    return f"v{policy_version:06d}"
