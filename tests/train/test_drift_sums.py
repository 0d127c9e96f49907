"""Measures of drift against their definitions, written out; impossible sums are refused."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillroom.train.callbacks import MicroOutcome
from stillroom.train.drift_sums import MAX_LOG_RATIO, Sums, can_be


def outcome(
    student: Any, behaviour: Any, row: Any = None, version: Any = 0, tail: Any = 0.1, k: Any = True
) -> MicroOutcome:
    """A micro-batch of P positions: logprobs, the row of each, its policy, the student's mass
    outside, and whether the sampled token was kept. The teacher's mass outside is half of it."""
    student = np.asarray(student, np.float32)
    (num,) = student.shape
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.broadcast_to(np.float32(tail), num))
    micro: Any = SimpleNamespace(
        behaviour_logprob=np.asarray(behaviour, np.float32),
        sampling_temperature=np.ones(num, np.float32),
        policy_version=np.broadcast_to(version, num),
        row=np.arange(num) if row is None else np.asarray(row),
        cache=np.zeros(num, np.int16),
        tail_logprob=log_tail + np.float32(math.log(0.5)),
        topk_id=np.where(np.broadcast_to(k, num), 1, 2)[:, None],
        sampled_id=np.ones(num, np.int64),
    )
    return MicroOutcome(micro, student, -student, student, log_tail)


def added(made: MicroOutcome) -> Sums:
    """All its positions."""
    sums = Sums()
    sums.add(made, np.ones(len(made.loss), bool))
    return sums


def test_formulas() -> None:
    """Written out over tokens and rows; what has no behaviour logprob counts for coverage alone."""
    rng = np.random.default_rng(0)
    behaviour = -rng.random(50).astype(np.float32)
    student = behaviour + rng.normal(0, 0.5, 50).astype(np.float32)
    behaviour[4] = np.nan
    row, tail, kept = np.arange(50) // 7, rng.random(50), rng.random(50) < 0.7
    sums = Sums()
    made = outcome(student, behaviour, row, tail=tail, k=kept)
    for chosen in (np.arange(50) < 21, np.arange(50) >= 21):
        sums.add(made, chosen)
    found = sums.summary()
    d = [float(s) - float(b) for s, b in zip(student, behaviour, strict=True)]
    rows = [
        math.exp(
            np.mean([x for x, r in zip(d, row, strict=True) if r == one and not math.isnan(x)])
        )
        for one in range(8)
    ]
    d = [x for x in d if not math.isnan(x)]
    r = [math.exp(x) for x in d]
    pairs = list(zip(r, d, strict=True))
    expected = {
        "positions": 50,
        "student_tail_mass": tail.mean(),
        "teacher_tail_mass": tail.mean() / 2,
        "outside_topk": 1 - kept.mean(),
        "compared": 49,
        "k1_nats": -sum(d) / 49,
        "k3_nats": sum(x - 1 - y for x, y in pairs) / 49,
        "reverse_nats": sum(x * y - x + 1 for x, y in pairs) / 49,
        "chi_square": sum(x * x for x in r) / 49 - 1,
        "m2": sum(y * y for y in d) / 49,
        "ess": sum(r) ** 2 / (49 * sum(x * x for x in r)),
        "row_ess": sum(rows) ** 2 / (8 * sum(x * x for x in rows)),
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert can_be(sums)


def test_no_drift_and_extreme_drift() -> None:
    """Equal policies give 0 and 1; absurd ratios stay finite."""
    same = added(outcome(-np.ones(8), -np.ones(8))).summary()
    for name in ("k1_nats", "k3_nats", "reverse_nats", "chi_square", "m2"):
        assert same[name] == 0
    assert same["ess"] == same["row_ess"] == 1
    far = added(outcome([0.0, 0.0], [-1e6, 1e6])).summary()
    assert all(math.isfinite(value) for value in far.values() if value is not None)


def test_without_any_behaviour_logprob_only_coverage_is_known() -> None:
    sums = added(outcome(-np.ones(3), np.full(3, np.nan), tail=0.25))
    found = sums.summary()
    assert found["k3_nats"] is found["ess"] is found["row_ess"] is None
    assert found["student_tail_mass"] == pytest.approx(0.25)
    assert can_be(sums)


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1.0, 15.0, 1e6])
def test_sums_of_tokens_can_be(spread: float) -> None:
    """Also where every token lies at a bound, and after many small additions."""
    rng, sums = np.random.default_rng(7), Sums()
    for size in (1, 1, *[50] * 200):
        drawn = rng.normal(MAX_LOG_RATIO if spread > 100 else 0, spread, size)
        tail = rng.choice([0.0, 0.3, 1.0], size)
        made = outcome(drawn, np.zeros(size), rng.integers(0, 9, size), tail=tail)
        sums.add(made, np.ones(size, bool))
    assert can_be(sums)
    for sign in (-1, 1):
        assert can_be(added(outcome(np.full(9, sign * 1e9), np.zeros(9))))


WHOLE = asdict(added(outcome([-1.0, -2.0, -0.5], [-1.1, -1.9, -0.6], [0, 0, 1])))


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": 0},
        {"positions": 2},
        {"outside": 4},
        {"outside": -1},
        {"student_tail": 3.1},
        {"teacher_tail": -0.1},
        {"teacher_tail": math.nan},
        {"n": 0},
        {"n": -1},
        {"log_ratio": 61.0},
        {"log_ratio": math.nan},
        {"log_ratio": 3.0},
        {"log_ratio_squared": 0.0},
        {"log_ratio_squared": 1201.0},
        {"ratio": 1e-9},
        {"ratio": math.inf},
        {"ratio": 4.0},
        {"ratio_log_ratio": -1.0},
        {"ratio_log_ratio": 100.0},
        {"ratio_log_ratio": math.nan},
        {"ratio_squared": 2.0},
        {"ratio_squared": -2.0},
        {"ratio_squared": math.nan},
        {"ratio_squared": 1e20},
        {"rows": 0},
        {"rows": 4},
        {"row_ratio": 0.0},
        {"row_ratio": 9.0},
        {"row_ratio_squared": math.nan},
    ],
    ids=str,
)
def test_sums_that_no_tokens_have(wrong: dict[str, Any]) -> None:
    sums = Sums(**WHOLE)
    assert can_be(sums)
    assert not can_be(replace(sums, **wrong))
