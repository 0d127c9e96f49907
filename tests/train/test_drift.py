"""Drift by policy version: over steps, ranks and checkpoints, and the record that is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.storage import Storage
from stillroom.train.callbacks import MicroOutcome, StepOutcome
from stillroom.train.drift import DriftCallback, DriftMeter, put_drift
from stillroom.train.run_snapshot import pin_name
from tests.train.test_drift_sums import outcome


def drawn(seed: int, version: Any, size: int = 20) -> MicroOutcome:
    """A micro-batch with drift."""
    rng = np.random.default_rng(seed)
    behaviour = -rng.random(size)
    return outcome(behaviour + rng.normal(0, 0.3, size), behaviour, version=version)


def step(number: int, *micro: MicroOutcome) -> StepOutcome:
    """One step with these micro-batches."""
    return StepOutcome(number, 0, 1.0, 1.0, 0.1, 40, 4, micro, 0.0, 1.0, 99, 99, 99)


def test_by_policy_and_lag() -> None:
    """Positions go to their policy; where either version is unknown, so is the lag."""
    meter = DriftMeter()
    meter.add(drawn(0, np.repeat([3, 5, -1, 5], 5)))
    drift = meter.take(5)
    assert [(v, m["positions"], m["lag"]) for v, m in drift.items()] == [
        ("-1", 5, None),
        ("3", 5, 2),
        ("5", 10, 0),
    ]
    assert meter.take(5) == {}
    meter.add(drawn(0, 3))
    assert meter.take(-1)["3"]["lag"] is None


def test_state_and_merge() -> None:
    """A meter goes on from its state, and the sums of ranks add up."""
    first, second = drawn(1, np.repeat([0, 1], 10)), drawn(2, 1)
    whole, one, resumed, other = (DriftMeter() for _ in range(4))
    whole.add(first)
    whole.add(second)
    one.add(first)
    resumed.restore(jsonfile.load(jsonfile.dump(one.state()), "x"))
    assert resumed.by_policy == one.by_policy
    resumed.add(second)
    other.add(second)
    one.merge([one.by_policy, other.by_policy])
    expected = whole.take(1)
    assert resumed.take(1) == expected
    merged = one.take(1)
    assert merged.keys() == expected.keys()
    for policy, values in expected.items():
        assert merged[policy] == pytest.approx(values)


@pytest.mark.parametrize("version", [-1, 0, 1_700_000_000, 2**31 - 1])
def test_every_policy_version_that_a_row_can_have_goes_on_from_a_checkpoint(version: int) -> None:
    first, second = DriftMeter(), DriftMeter()
    first.add(drawn(0, np.int32(version)))
    second.restore(jsonfile.load(jsonfile.dump(first.state()), "x"))
    assert second.state() == first.state()
    assert second.take(0).keys() == {str(version)}


@pytest.mark.parametrize("version", ["-2", "2147483648", "01", "+1", "1_0", "", "9999999999"])
def test_other_policy_versions_are_refused(version: str) -> None:
    meter = DriftMeter()
    meter.add(drawn(0, 0))
    with pytest.raises(CorruptError, match="expected a policy version"):
        meter.restore({version: meter.state()["0"]})


def test_sums_that_cannot_be_are_refused() -> None:
    meter = DriftMeter()
    meter.add(drawn(0, 0))
    state = meter.state()
    state["0"]["ratio"] *= 2
    with pytest.raises(CorruptError, match="drift in a checkpoint, policy 0"):
        meter.restore(state)


@pytest.mark.parametrize("wrong", [{"ratio": "2"}, {"n": None}, {"more": 1}])
def test_other_sums_are_refused(wrong: dict[str, Any]) -> None:
    meter = DriftMeter()
    meter.add(drawn(0, 0))
    state = meter.state()
    state["0"] |= wrong
    with pytest.raises(CorruptError, match="drift in a checkpoint, policy 0"):
        meter.restore(state)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"sums": {}, "last": {}},
        {"id": 1, "sums": {}, "last": {}},
        {"id": "a", "sums": {}, "last": {}, "more": {}},
        {"id": "a", "sums": [], "last": {}},
        {"id": "a", "sums": {"0": 1}, "last": {}},
    ],
)
def test_a_state_of_another_shape_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match="drift in a checkpoint"):
        DriftCallback().load_state_dict(state)


def trainer(root: Path) -> Any:
    """As much of a trainer as the callback looks at."""
    logged: list[dict[str, float]] = []
    return SimpleNamespace(
        config=SimpleNamespace(drift_every_steps=2),
        cache=SimpleNamespace(storage=Storage(root)),
        is_main=True,
        output=root,
        run="r",
        policy_version=1,
        step=0,
        log=logged.append,
        logged=logged,
    )


def test_records_are_left_when_due_and_survive_a_checkpoint(tmp_path: Path) -> None:
    """Every second step and at the end; a resumed run leaves the records of an unbroken one."""
    micro = [drawn(i, 0) for i in range(5)]
    records = []
    for name, stops in (("unbroken", 5), ("resumed", 3)):
        made = trainer(tmp_path / name)
        callback = DriftCallback()
        for i in range(5):
            if i == stops:
                state = jsonfile.load(jsonfile.dump(callback.state_dict()), "x")
                callback = DriftCallback()
                callback.load_state_dict(state)
            made.step = i + 1
            callback.on_step(made, step(i + 1, micro[i]))
        report: Any = SimpleNamespace(drift={})
        callback.on_end(made, report)
        storage = made.cache.storage
        paths = [entry.path for entry in storage.list("drift")]
        (run,) = {path.split("/")[1] for path in paths}
        assert run.rpartition("-")[0] == pin_name(tmp_path / name, "r")
        assert paths == [f"drift/{run}/{n:08d}.json" for n in (2, 4, 5)]
        found = [jsonfile.load_sealed(storage.get(path), path) for path in paths]
        assert {record["run"] for record in found} == {run}
        records.append([record["by_policy"] for record in found])
        assert report.drift == records[-1][2]
        assert made.logged[-1]["drift/k3_nats/v0"] == report.drift["0"]["k3_nats"]
    assert records[0] == records[1]


def test_record_is_put_once(tmp_path: Path) -> None:
    """The first record of a step stays."""
    storage = Storage(tmp_path)
    for ess in (1.0, 0.5):
        put_drift(storage, "run", 7, {"0": {"ess": ess}})
    stored = jsonfile.load_sealed(storage.get("drift/run/00000007.json"), "x")
    assert stored == {"run": "run", "step": 7, "by_policy": {"0": {"ess": 1.0}}}


def by_policy_at(root: Path, step: int) -> dict[str, Any]:
    """Records of a step, by their run."""
    storage = Storage(root)
    paths = [entry.path for entry in storage.list("drift")]
    found = [jsonfile.load_sealed(storage.get(p), p) for p in paths if f"/{step:08d}." in p]
    return {record["run"]: record["by_policy"] for record in found}


def take_steps(made: Any, callback: DriftCallback, steps: range, seed: int) -> dict[str, Any]:
    """Steps up to `steps.stop`; what the last two of them drifted by."""
    meter = DriftMeter()
    for i in steps:
        made.step = i + 1
        callback.on_step(made, step(i + 1, drawn(9 * seed + i, 0)))
        if i >= steps.stop - 2:
            meter.add(drawn(9 * seed + i, 0))
    return meter.take(1)


def test_runs_that_begin_anew_leave_records_of_their_own(tmp_path: Path) -> None:
    """Though they have one name and one output."""
    made = trainer(tmp_path)
    expected = [take_steps(made, DriftCallback(), range(4), seed) for seed in (0, 1)]
    found = by_policy_at(tmp_path, 4)
    assert len(found) == 2
    assert all(record in found.values() for record in expected)
    assert expected[0] != expected[1]


def test_a_run_that_goes_on_keeps_its_first_records(tmp_path: Path) -> None:
    """Where the same steps, taken again on other processes, have other last digits."""
    made, callback = trainer(tmp_path), DriftCallback()
    take_steps(made, callback, range(2), 0)
    state = jsonfile.load(jsonfile.dump(callback.state_dict()), "x")
    first = take_steps(made, callback, range(2, 4), 0)
    resumed = DriftCallback()
    resumed.load_state_dict(state)
    take_steps(made, resumed, range(2, 6), 1)
    assert list(by_policy_at(tmp_path, 4).values()) == [first]
    assert by_policy_at(tmp_path, 6).keys() == by_policy_at(tmp_path, 4).keys()
