"""Drift estimates against their definitions, written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.storage import Storage
from stillroom.train.drift import MAX_LOG_RATIO, DriftMeter, put_drift


def test_formulas() -> None:
    """k3 and ESS equal the sums over tokens, policy by policy; unknown logprobs are left out."""
    rng = np.random.default_rng(0)
    behaviour = -rng.random(50).astype(np.float32)
    student = behaviour + rng.normal(0, 0.3, 50).astype(np.float32)
    version = np.repeat([3, 5], 25)
    behaviour[4] = np.nan
    meter = DriftMeter(policy_version=5)
    for part in (slice(0, 10), slice(10, 50)):
        meter.add(student[part], behaviour[part], version[part])
    drift = meter.take()
    for policy, lag, count in (("3", 2, 24), ("5", 0, 25)):
        chosen = [
            float(s) - float(b)
            for s, b, v in zip(student, behaviour, version, strict=True)
            if v == int(policy) and not math.isnan(b)
        ]
        ratio = [math.exp(d) for d in chosen]
        k3 = sum(r - 1 - d for r, d in zip(ratio, chosen, strict=True)) / count
        ess = sum(ratio) ** 2 / (count * sum(r * r for r in ratio))
        assert drift[policy]["positions"] == count
        assert drift[policy]["lag"] == lag
        assert drift[policy]["k3_nats"] == pytest.approx(k3, abs=1e-6)
        assert drift[policy]["ess"] == pytest.approx(ess, abs=1e-6)
    assert meter.take() == {}


def test_no_drift_and_extreme_drift() -> None:
    """Equal policies give 0 and 1; absurd ratios stay finite."""
    meter = DriftMeter(policy_version=0)
    same = -np.ones(8, np.float32)
    meter.add(same, same, np.zeros(8, int))
    assert meter.take()["0"] == {"positions": 8, "k3_nats": 0.0, "ess": 1.0, "lag": 0}
    meter.add(np.array([0.0]), np.array([-1e6]), np.array([0]))
    assert math.isfinite(meter.take()["0"]["k3_nats"])


def test_an_unknown_policy_has_no_lag() -> None:
    meter = DriftMeter(policy_version=5)
    same = -np.ones(8, np.float32)
    meter.add(same, same, np.full(8, -1))
    assert meter.take()["-1"]["lag"] is None


def test_record_is_put_once(tmp_path: Path) -> None:
    """The first record of a step stays."""
    storage = Storage(tmp_path)
    put_drift(storage, "run", 7, {"0": {"ess": 1.0}})
    put_drift(storage, "run", 7, {"0": {"ess": 0.5}})
    stored = jsonfile.load_sealed(storage.get("drift/run/00000007.json"), "x")
    assert stored == {"run": "run", "step": 7, "by_policy": {"0": {"ess": 1.0}}}


def test_state_and_merge() -> None:
    """A meter goes on from its state, and the sums of ranks add up."""
    rng = np.random.default_rng(1)
    student, behaviour = -rng.random((2, 40))
    version = np.repeat([0, 1], 20)
    whole, first, second = (DriftMeter(policy_version=1) for _ in range(3))
    whole.add(student, behaviour, version)
    first.add(student[:25], behaviour[:25], version[:25])
    second.restore(first.state())
    second.add(student[25:], behaviour[25:], version[25:])
    expected = whole.take()
    resumed = second.take()
    rest = DriftMeter(policy_version=1)
    rest.add(student[25:], behaviour[25:], version[25:])
    first.merge([first.by_policy, rest.by_policy])
    merged = first.take()
    for found in (resumed, merged):
        assert found.keys() == expected.keys()
        for policy, values in expected.items():
            assert found[policy] == pytest.approx(values)


@pytest.mark.parametrize("version", [-1, 0, 1_700_000_000, 2**31 - 1])
def test_every_policy_version_that_a_row_can_have_goes_on_from_a_checkpoint(version: int) -> None:
    first, second = DriftMeter(policy_version=0), DriftMeter(policy_version=0)
    first.add(np.zeros(3), np.array([0.1, -0.1, 0.3]), np.full(3, version, np.int32))
    second.restore(jsonfile.load(jsonfile.dump(first.state()), "x"))
    assert second.state() == first.state()
    assert second.take().keys() == {str(version)}


@pytest.mark.parametrize("version", ["-2", "2147483648", "01", "+1", "1_0", "", "9999999999"])
def test_other_policy_versions_are_refused(version: str) -> None:
    meter = DriftMeter(policy_version=0)
    same = np.zeros(3)
    meter.add(same, same, np.zeros(3, int))
    with pytest.raises(CorruptError, match="expected a policy version"):
        meter.restore({version: meter.state()["0"]})


@pytest.mark.parametrize(
    ("n", "log_ratio", "ratio", "ratio_squared"),
    [
        (0, 0.0, 0.0, 0.0),
        (1, 20.0, 1e-9, 1e15),
        (1, -20.0, 1e-9, 1e-18),
        (1, 0.0, 0.9, 1.0),
        (2, 0.0, 2.0, 1.9),
        (2, 0.0, 2.0, -2.0),
        (2, 1.0, 2.0, 2.0),
        (2, 41.0, 1e9, 1e18),
        (2, -41.0, 1e-8, 1e-16),
        (1, math.nan, 1.0, 1.0),
        (1, 0.0, math.nan, 1.0),
        (1, 0.0, 1.0, math.nan),
        (1, 0.0, math.inf, math.inf),
    ],
)
def test_sums_that_no_tokens_have_are_refused(
    n: int, log_ratio: float, ratio: float, ratio_squared: float
) -> None:
    sums = {"n": n, "log_ratio": log_ratio, "ratio": ratio, "ratio_squared": ratio_squared}
    with pytest.raises(CorruptError, match="drift in a checkpoint, policy 0"):
        DriftMeter(policy_version=0).restore({"0": sums})


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1.0, 15.0, 1e6])
def test_sums_of_tokens_are_taken(spread: float) -> None:
    """Also where every token lies at a bound, and after many small additions."""
    rng, meter = np.random.default_rng(7), DriftMeter(policy_version=0)
    for size in (1, 1, *[50] * 200):
        drawn = rng.normal(MAX_LOG_RATIO if spread > 100 else 0, spread, size)
        meter.add(drawn.astype(np.float32), np.zeros(size, np.float32), np.arange(size) % 2)
    for sign in (-1, 1):
        meter.add(np.full(9, sign * 1e9), np.zeros(9), np.full(9, 5 + sign))
    restored = DriftMeter(policy_version=0)
    restored.restore(meter.state())
    assert restored.by_policy == meter.by_policy
