"""Cycles: fixed names for planned work, and prompts that stay as they were rendered."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.store import Cache
from stillroom.replay import cycle as cycle_module
from stillroom.replay.cycle import Cycle, Unit, has_cycle, load_cycle, plan_cycle, store_cycle
from stillroom.replay.sampler import SamplerConfig
from tests.replay.conftest import make_prompts

CONFIG = SamplerConfig(samples_per_prompt=2, max_new_tokens=4, temperature=0.7)
PROMPTS = make_prompts(5)
UNIT = Unit(
    policy_version=3,
    source="student",
    prompt_ids=(1, 2**64 - 1),
    sampler={"samples_per_prompt": 1, "temperature": 1.0},
    seed=7,
)


def plan(**changes: Any) -> Cycle:
    """A cycle of three units over five prompts."""
    settings = {"policy_version": 0, "seed": 1, "unit_rollouts": 4} | changes
    return plan_cycle(PROMPTS, CONFIG, **settings)


def test_no_release_changes_the_id_of_a_unit() -> None:
    assert UNIT.id == "1a1eb1de257ed5c9"
    assert [unit.id for unit in plan().units] == [
        "76f57d2551a9e7a5",
        "8f72de30b10fa9c7",
        "0e700f4841c7ab20",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"policy_version": 4},
        {"source": "teacher"},
        {"prompt_ids": (2**64 - 1, 1)},
        {"prompt_ids": (1,)},
        {"sampler": {"samples_per_prompt": 1, "temperature": 0.9}},
        {"sampler": {"samples_per_prompt": 1}},
        {"seed": 8},
    ],
)
def test_every_field_changes_the_id(change: dict[str, Any]) -> None:
    assert replace(UNIT, **change).id != UNIT.id
    assert len(UNIT.id) == 16
    assert int(UNIT.id, 16) >= 0


def test_the_order_of_sampler_settings_does_not_change_the_id() -> None:
    assert replace(UNIT, sampler=dict(reversed(UNIT.sampler.items()))).id == UNIT.id


def test_a_plan_keeps_a_prompts_samples_together() -> None:
    cycle = plan()
    assert [len(unit.prompt_ids) for unit in cycle.units] == [2, 2, 1]
    assert [i for unit in cycle.units for i in unit.prompt_ids] == [p.id for p in PROMPTS]
    assert len({unit.id for unit in cycle.units}) == 3
    for unit in cycle.units:
        assert (unit.policy_version, unit.source, unit.seed) == (0, "student", 1)
        assert unit.sampler == CONFIG.recorded()
    assert [len(unit.prompt_ids) for unit in plan(unit_rollouts=100).units] == [5]


@pytest.mark.parametrize(("unit_rollouts", "prompts"), [(1, 1), (2, 1), (3, 1), (5, 2), (9, 4)])
def test_a_unit_has_at_most_so_many_rollouts_or_one_prompt(
    unit_rollouts: int, prompts: int
) -> None:
    assert len(plan(unit_rollouts=unit_rollouts).units[0].prompt_ids) == prompts


def test_a_plan_of_nothing_or_of_empty_units() -> None:
    assert plan_cycle([], CONFIG, policy_version=0, seed=0, unit_rollouts=4) == Cycle(())
    with pytest.raises(ConfigError, match="unit_rollouts"):
        plan(unit_rollouts=0)


def test_a_cycle_survives_storing() -> None:
    cycle = plan(policy_version=12, source="teacher")
    parsed = Cycle.from_json(cycle.to_json(), "here")
    assert parsed == cycle
    assert [unit.id for unit in parsed.units] == [unit.id for unit in cycle.units]


@pytest.mark.parametrize(
    "data", [b"{}", b'{"units": [{}]}', b'{"units": 3}', b'{"units": [{"prompt_ids": 5}]}', b"[]"]
)
def test_a_damaged_plan_is_named(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"units/a\.json"):
        Cycle.from_json(data, "units/a.json")


def test_the_stored_plan_wins(empty_cache: Cache) -> None:
    first, second = plan(seed=1), plan(seed=2)
    assert store_cycle(empty_cache, "a", first) == first
    assert store_cycle(empty_cache, "a", second) == first
    assert store_cycle(empty_cache, "b", second) == second


def test_a_cycle_is_stored_as_canonical_json(empty_cache: Cache) -> None:
    store_cycle(empty_cache, "a", plan())
    data = empty_cache.storage.get("units/a.json")
    assert data == jsonfile.dump_sealed(jsonfile.load_sealed(data, "a"))


def test_prompts_are_stored_as_they_were_rendered(empty_cache: Cache) -> None:
    assert not has_cycle(empty_cache, "a")
    store_cycle(empty_cache, "a", plan())
    assert has_cycle(empty_cache, "a")
    stored = load_cycle(empty_cache, "a").prompts
    assert [(p.id, p.name) for p in stored] == [(p.id, p.name) for p in PROMPTS]
    for mine, theirs in zip(stored, PROMPTS, strict=True):
        assert mine.token.dtype == np.uint32
        assert np.array_equal(mine.token, theirs.token)


@pytest.mark.parametrize(
    ("name", "bound", "got"),
    [
        ("MAX_BYTES", 900, "[0-9]+ bytes"),
        ("MAX_CONTAINERS", 40, "more than 40 arrays"),
        ("MAX_TOKEN_BYTES", 4, "1 prompt tokens of"),
    ],
)
def test_a_plan_that_could_not_be_read_again_is_not_stored(
    empty_cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str, bound: int, got: str
) -> None:
    cycle = plan_cycle(make_prompts(20), CONFIG, policy_version=0, seed=1, unit_rollouts=2)
    module = cycle_module if hasattr(cycle_module, name) else jsonfile
    monkeypatch.setattr(module, name, bound)
    with pytest.raises(InputError, match=rf"units/a\.json.*{got}.*Plan fewer prompts at a time"):
        store_cycle(empty_cache, "a", cycle)
    assert not has_cycle(empty_cache, "a")
    monkeypatch.undo()
    assert store_cycle(empty_cache, "a", cycle) == cycle


def test_a_plan_that_is_there_holds_also_where_the_other_could_not_be_read(
    empty_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_cycle(empty_cache, "a", plan())
    larger = plan_cycle(make_prompts(40), CONFIG, policy_version=0, seed=1, unit_rollouts=2)
    monkeypatch.setattr(cycle_module, "MAX_BYTES", len(larger.to_json()) - 1)
    with pytest.raises(InputError):
        store_cycle(empty_cache, "b", larger)
    assert store_cycle(empty_cache, "a", larger) == first


def test_a_plan_of_a_tebibyte_is_not_read(empty_cache: Cache) -> None:
    empty_cache.storage.put_new("units/a.json", b"")
    os.truncate(empty_cache.storage.folder / "units/a.json", 1 << 40)
    with pytest.raises(CorruptError, match=r"units/a\.json: expected at most 67108864 bytes"):
        load_cycle(empty_cache, "a")


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": [1]},
        {"lengths": None},
        {"lengths": {}},
        {"lengths": [2**64 - 1, 5]},
        {"names": []},
        {"names": [3, None, None, None, None]},
        {"names": "abcde"},
        {"tokens": "AAAA"},
        {"tokens": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_damaged_prompts_are_named(change: dict[str, Any]) -> None:
    value = jsonfile.load_sealed(plan().to_json(), "x")
    value["prompts"] |= change
    with pytest.raises(CorruptError, match=r"units/a\.json"):
        Cycle.from_json(jsonfile.dump_sealed(value), "units/a.json")


@pytest.mark.parametrize("kind", ["negative", "bool", "float"])
def test_lengths_that_are_none_are_refused_though_they_add_up(kind: str) -> None:
    value = jsonfile.load_sealed(plan().to_json(), "x")
    first, second, *rest = value["prompts"]["lengths"]
    both = first + second
    wrong = {"negative": [-1, both + 1], "bool": [True, both - 1], "float": [float(first), second]}
    value["prompts"]["lengths"] = [*wrong[kind], *rest]
    with pytest.raises(CorruptError, match=r"units/a\.json"):
        Cycle.from_json(jsonfile.dump_sealed(value), "units/a.json")
