"""The refresher: the stalest prompts first, and parts that are too old leave new snapshots."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, MismatchError, MissingError
from stillroom.cache.store import Cache
from stillroom.replay.cycle import Cycle
from stillroom.replay.policies import Policy, put_policy
from stillroom.replay.prompts import Prompt
from stillroom.replay.refresh import (
    RefreshConfig,
    cycle_name,
    refresh,
    retire_stale,
    stalest,
)
from stillroom.replay.sampler import SamplerConfig
from tests.replay.conftest import add_scored_part, made_up_table, make_prompts, part_meta

SAMPLER = SamplerConfig(samples_per_prompt=2)
PROMPTS = make_prompts(6)


def plan(
    cache: Cache, version: int, prompts: Sequence[Prompt] = PROMPTS, **changes: Any
) -> list[str | None]:
    """Names of the prompts that a policy's cycle samples, three of them by default."""
    config = RefreshConfig(**({"prompts_per_cycle": 3} | changes))
    return names_of(refresh(cache, prompts, SAMPLER, config, version))


def names_of(cycle: Cycle) -> list[str | None]:
    by_id = {prompt.id: prompt.name for prompt in PROMPTS}
    return [by_id[i] for unit in cycle.units for i in unit.prompt_ids]


def record(cache: Cache, parents: dict[int, int]) -> None:
    """Record policies by version, each with its parent; -1 is none."""
    for version, parent in parents.items():
        policy = Policy(
            version=version,
            run="run",
            parent=None if parent < 0 else parent,
            step=version,
            path=None,
            fingerprint=None,
        )
        assert put_policy(cache.storage, policy)


def names(prompts: Sequence[Prompt]) -> list[str | None]:
    return [prompt.name for prompt in prompts]


def test_without_a_history_prompts_keep_their_order(empty_cache: Cache) -> None:
    assert stalest(empty_cache, PROMPTS, 0) == PROMPTS
    assert plan(empty_cache, 0) == ["p0", "p1", "p2"]


def test_what_was_sampled_longest_ago_comes_first(empty_cache: Cache) -> None:
    assert plan(empty_cache, 0) == ["p0", "p1", "p2"]
    assert plan(empty_cache, 1) == ["p3", "p4", "p5"], "never sampled"
    assert plan(empty_cache, 2, prompts_per_cycle=2) == ["p0", "p1"]
    assert names(stalest(empty_cache, PROMPTS, 3)) == ["p2", "p3", "p4", "p5", "p0", "p1"]
    assert plan(empty_cache, 3) == ["p2", "p3", "p4"]
    assert plan(empty_cache, 4) == ["p5", "p0", "p1"]


def test_the_newest_sampling_of_a_prompt_counts(empty_cache: Cache) -> None:
    plan(empty_cache, 0, prompts_per_cycle=6)
    plan(empty_cache, 1, PROMPTS[2:4])
    plan(empty_cache, 2, PROMPTS[:1])
    assert names(stalest(empty_cache, PROMPTS, 3)) == ["p1", "p4", "p5", "p2", "p3", "p0"]


def test_later_policies_and_other_cycles_do_not_count(empty_cache: Cache) -> None:
    """So that planning a policy again, later, gives the same plan."""
    plan(empty_cache, 0)
    expected = names(stalest(empty_cache, PROMPTS, 1))
    plan(empty_cache, 1)
    plan(empty_cache, 2)
    assert names(stalest(empty_cache, PROMPTS, 1)) == expected


def test_versions_that_were_never_sampled_are_no_obstacle(empty_cache: Cache) -> None:
    plan(empty_cache, 5)
    assert names(stalest(empty_cache, PROMPTS, 9)) == ["p3", "p4", "p5", "p0", "p1", "p2"]


def test_new_prompts_come_first_and_lost_ones_are_forgotten(empty_cache: Cache) -> None:
    plan(empty_cache, 0, PROMPTS[:3])
    assert names(stalest(empty_cache, PROMPTS[2:], 1)) == ["p3", "p4", "p5", "p2"]


def test_a_stored_plan_of_the_same_policy_holds(empty_cache: Cache) -> None:
    first = refresh(empty_cache, PROMPTS, SAMPLER, RefreshConfig(prompts_per_cycle=2), 0)
    again = refresh(empty_cache, PROMPTS[::-1], SAMPLER, RefreshConfig(unit_rollouts=1), 0)
    assert again == first
    assert empty_cache.storage.exists(f"units/{cycle_name(0)}.json")


def test_other_settings_than_the_plan_are_refused(empty_cache: Cache) -> None:
    refresh(empty_cache, PROMPTS, SAMPLER, RefreshConfig(), 0)
    with pytest.raises(MismatchError, match="seed = 0; got seed = 9"):
        refresh(empty_cache, PROMPTS, SAMPLER, RefreshConfig(seed=9), 0)
    warmer = replace(SAMPLER, temperature=1.5)
    with pytest.raises(MismatchError, match=r"temperature = .*got temperature = 1\.5"):
        refresh(empty_cache, PROMPTS, warmer, RefreshConfig(), 0)


def test_settings_reach_the_plan(empty_cache: Cache) -> None:
    config = RefreshConfig(prompts_per_cycle=5, unit_rollouts=4, seed=8)
    cycle = refresh(empty_cache, PROMPTS, SAMPLER, config, 3)
    assert [len(unit.prompt_ids) for unit in cycle.units] == [2, 2, 1]
    assert {(unit.policy_version, unit.seed) for unit in cycle.units} == {(3, 8)}
    assert all(unit.sampler == SAMPLER.recorded() for unit in cycle.units)


def test_names_of_cycles_sort_by_version() -> None:
    assert cycle_name(7) == "v000007"
    assert sorted(map(cycle_name, (10, 9, 123_456))) == ["v000009", "v000010", "v123456"]


@pytest.mark.parametrize(
    ("newest", "max_lag", "kept"),
    [(3, 0, {3}), (3, 1, {2, 3}), (3, 2, {1, 2, 3}), (3, 9, {0, 1, 2, 3}), (9, 1, set())],
)
def test_parts_beyond_the_lag_are_retired(
    empty_cache: Cache, newest: int, max_lag: int, kept: set[int]
) -> None:
    record(empty_cache, {v: v - 1 for v in range(10)})
    parts = {v: add_scored_part(empty_cache, v, v, 2) for v in range(4)}
    retired = retire_stale(empty_cache, newest, max_lag)
    assert retired == [part for version, part in parts.items() if version not in kept]
    assert empty_cache.retired() == set(retired)
    in_use = {commit.policy_version for commit in empty_cache.snapshot().commits}
    assert in_use == kept


@pytest.mark.parametrize(
    ("max_lag", "kept"), [(0, {7}), (1, {3, 4, 5, 6, 7}), (2, {2, 3, 4, 5, 6, 7})]
)
def test_versions_that_it_does_not_come_from_use_up_no_lag(
    empty_cache: Cache, max_lag: int, kept: set[int]
) -> None:
    record(empty_cache, {v: v - 1 for v in range(7)} | {7: 3})
    parts = {v: add_scored_part(empty_cache, v, v, 2) for v in range(8)}
    retired = retire_stale(empty_cache, 7, max_lag)
    assert retired == [part for version, part in parts.items() if version not in kept]


def test_a_line_that_is_not_recorded_retires_nothing(empty_cache: Cache) -> None:
    record(empty_cache, {3: 2})
    add_scored_part(empty_cache, 0, 0, 2)
    with pytest.raises(MissingError, match="policy 2"):
        retire_stale(empty_cache, 3, 1)
    assert empty_cache.retired() == set()
    with pytest.raises(MissingError, match="policy 4"):
        retire_stale(empty_cache, 4, 0)


def test_newer_parts_than_the_policy_are_kept(empty_cache: Cache) -> None:
    record(empty_cache, {2: 1})
    add_scored_part(empty_cache, 5, 0, 2)
    assert retire_stale(empty_cache, 2, 0) == []


def test_retired_parts_are_not_scored_but_stay_readable(empty_cache: Cache) -> None:
    add_scored_part(empty_cache, 0, 0, 3)
    pinned = empty_cache.snapshot()
    meta = part_meta(0, 1)
    empty_cache.add_part(made_up_table(np.random.default_rng(0), 2, 0), meta)
    fresh = part_meta(1, 2)
    empty_cache.add_part(made_up_table(np.random.default_rng(0), 2, 1), fresh)
    assert empty_cache.unscored() == [meta.name, fresh.name]
    record(empty_cache, {1: 0})
    retire_stale(empty_cache, 1, 0)
    assert empty_cache.unscored() == [fresh.name]
    assert empty_cache.snapshot().rows == 0
    assert empty_cache.open_snapshot(pinned.id).rows == 3
    assert empty_cache.shard(pinned.commits[0]).read("prompt_length").shape == (3,)
    assert len(empty_cache.parts()) == 3, "nothing is deleted"


def test_retiring_again_returns_only_what_is_new(empty_cache: Cache) -> None:
    record(empty_cache, {1: 0, 2: 1})
    first = add_scored_part(empty_cache, 0, 0, 2)
    second = add_scored_part(empty_cache, 1, 1, 2)
    assert retire_stale(empty_cache, 1, 0) == [first]
    assert retire_stale(empty_cache, 1, 0) == []
    assert retire_stale(empty_cache, 2, 0) == [second]
    assert empty_cache.retired() == {first, second}


@pytest.mark.parametrize("wrong", [{"prompts_per_cycle": 0}, {"unit_rollouts": 0}, {"max_lag": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="refresh"):
        RefreshConfig(**wrong)
