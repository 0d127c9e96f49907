"""Weights of draws: their kinds, limits and what they refuse."""

import math

import pytest
import torch

from stillroom.cache.errors import ConfigError, NumericsError
from stillroom.train.importance import importance_weight

STUDENT = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
BEHAVIOUR = torch.tensor([-1.0, -3.0, -1.9, 0.0], dtype=torch.float64)
RATIOS = [1.0, math.exp(2.0), math.exp(0.9), math.exp(-1.0)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0] * 4),
        ("full", RATIOS),
        ("tis", [1.0, 2.0, 2.0, RATIOS[3]]),
        ("icepop", [1.0, 0.0, RATIOS[2], 0.0]),
    ],
)
def test_kinds(kind: str, expected: list[float]) -> None:
    assert importance_weight(STUDENT, BEHAVIOUR, kind).tolist() == pytest.approx(expected)


def test_limits_are_settings_and_included() -> None:
    student = torch.tensor([0.0, math.log(0.5), math.log(0.25)], dtype=torch.float64)
    behaviour = torch.full_like(student, math.log(0.5))
    weight = importance_weight(student, behaviour, "icepop", bounds=(0.5, 2.0))
    assert weight.tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert importance_weight(student, behaviour, "tis", 0.75).tolist() == [0.75, 0.75, 0.5]


@pytest.mark.parametrize("gap", [21.0, 1e4])
def test_log_ratios_are_clamped(gap: float) -> None:
    student = torch.tensor([[-gap, 0.0, -math.inf]])
    behaviour = torch.tensor([[0.0, -gap, -1.0]])
    weight = importance_weight(student, behaviour, "full")
    assert weight[0].tolist() == pytest.approx([math.exp(-20), math.exp(20), math.exp(-20)])


def test_no_gradient_flows_through_a_weight() -> None:
    assert not importance_weight(STUDENT.clone().requires_grad_(), BEHAVIOUR).requires_grad


def test_unknown_behaviour_is_refused_by_row_where_it_is_read() -> None:
    unknown = BEHAVIOUR.clone()
    unknown[2] = math.nan
    for kind in ("full", "tis", "icepop"):
        with pytest.raises(NumericsError, match=r"row 2.*importance='none'"):
            importance_weight(STUDENT, unknown, kind)
    assert importance_weight(STUDENT, unknown, "none").tolist() == [1.0] * 4
    for impossible in (-math.inf, math.inf, 0.5):
        unknown[2] = impossible
        with pytest.raises(NumericsError, match=r"row 2.*above -inf and of at most 0"):
            importance_weight(STUDENT, unknown)
    with pytest.raises(ConfigError, match=r"'tis'.*got 'some'"):
        importance_weight(STUDENT, BEHAVIOUR, "some")
