"""Phases: what goes together, and which one each step is in."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.errors import ConfigError
from stillroom.train.objective import Objective
from stillroom.train.phases import Phase, PhasePlan, PhaseStep, sources_of
from stillroom.train.settings import build_settings
from stillroom.train.supervised_data import SupervisedConfig

TEXT = SupervisedConfig(source="text.jsonl")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3))
def test_the_plan_is_the_list_over_and_over(batches: list[int], per_step: int, cycles: int) -> None:
    plan = PhasePlan(tuple(batches), per_step, cycles)
    listed = [
        PhaseStep(cycle, phase, step, len(range(count)[step * per_step :][:per_step]))
        for cycle in range(cycles)
        for phase, count in enumerate(batches)
        for step in range(math.ceil(count / per_step))
    ]
    assert [plan.at(step) for step in range(plan.total_steps)] == listed
    assert sum(step.batches for step in listed) == sum(batches) * cycles
    for outside in (-1, plan.total_steps):
        with pytest.raises(ConfigError, match=f"got {outside}"):
            plan.at(outside)


@pytest.mark.parametrize("values", [((), 1, 1), ((0,), 1, 1), ((3, 1), 0, 1), ((3, 1), 1, 0)])
def test_empty_plans_are_refused(values: tuple[tuple[int, ...], int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1 batch"):
        PhasePlan(*values)


@pytest.mark.parametrize(
    ("settings", "per_epoch", "per_step", "expected"),
    [
        ({}, 7, 1, 7),
        ({}, 7, 2, 7),
        ({"num_train_epochs": 2.5}, 7, 1, 18),
        ({"num_train_epochs": 0.01}, 7, 1, 1),
        ({"max_steps": 3}, 7, 2, 6),
    ],
)
def test_batches(settings: dict[str, Any], per_epoch: int, per_step: int, expected: int) -> None:
    assert Phase(**settings).batches(per_epoch, per_step) == expected


def test_objectives() -> None:
    run, own = Objective(kind="reverse"), Objective(kind="jsd", beta=0.5)
    assert Phase().objective_of(run) == run
    assert Phase(objective=own).objective_of(run) == own
    assert Phase(supervised=TEXT).objective_of(run) == Objective(cross_entropy=1.0)
    labelled = Objective(cross_entropy=1.0, cross_entropy_sources=("dataset",))
    assert Phase(supervised=TEXT, objective=labelled).objective_of(run) == labelled


def test_rates() -> None:
    assert Phase().rate_factor(1e-5) == 1
    assert Phase(learning_rate=2e-4).rate_factor(1e-4) == 2


def test_phases_on_the_same_data_share_its_stream() -> None:
    phases = [
        Phase(),
        Phase(supervised=TEXT),
        Phase(objective=Objective(kind="reverse"), learning_rate=1e-3),
        Phase(root="other"),
        Phase(supervised=SupervisedConfig(source="text.jsonl"), max_steps=3),
        Phase(supervised=SupervisedConfig(source="text.jsonl", seed=1)),
    ]
    assert sources_of(phases) == [0, 1, 0, 3, 1, 5]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"supervised": TEXT, "root": "cache"}, "root"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": "3"}, "max_steps"),
        ({"supervised": "text.jsonl"}, "supervised"),
        ({"objective": "reverse"}, "objective"),
        ({"num_train_epochs": 0.0}, "num_train_epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"supervised": TEXT, "objective": Objective()}, "objective.cross_entropy"),
        (
            {
                "supervised": TEXT,
                "objective": Objective(cross_entropy=1.0, cross_entropy_sources=("teacher",)),
            },
            "objective.cross_entropy_sources",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"phase\.{name}: "):
        Phase(**settings)


def test_phases_come_from_nested_settings() -> None:
    """As in a YAML file."""
    values = {
        "supervised": {"source": "text.jsonl", "max_length": 64},
        "max_steps": 8,
        "learning_rate": "2e-4",
    }
    phase = build_settings(Phase, values, "phases")
    expected = SupervisedConfig(source="text.jsonl", max_length=64)
    assert phase == Phase(supervised=expected, max_steps=8, learning_rate=2e-4)
    replayed = build_settings(Phase, {"objective": {"kind": "reverse"}}, "phases")
    assert replayed == Phase(objective=Objective(kind="reverse"))
    with pytest.raises(ConfigError, match=r"Did you mean 'source'"):
        build_settings(Phase, {"supervised": {"sourc": "x"}}, "phases")
