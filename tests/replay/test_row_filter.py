"""Filters: mistakes are refused when they are written down, and equal filters have equal hashes."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError
from stillroom.replay.row_filter import Conditions, RowFilter

GIVEN: dict[str, Any] = {
    "min_policy_version": 1,
    "max_policy_version": 5,
    "max_lag": 2,
    "finish_reasons": ("stop", "length"),
    "sources": ("student", "import"),
    "min_tokens": 2,
    "max_tokens": 9,
    "min_positions": 1,
    "max_positions": 8,
    "prompt_ids": (3, 2**64 - 1),
    "exclude_prompt_ids": (7, 5),
    "exclude_rollouts": (11, 13),
    "ranges": {"x_reward": (0.0, None), "prompt_length": (None, 4)},
}


def within(values: np.ndarray, low: float | None, high: float | None) -> list[bool]:
    """What a range of a user's column makes of values."""
    conditions = Conditions(RowFilter(ranges={"x_a": (low, high)}))
    ((_, held),) = conditions.held(np.ones((len(values), 3)), {"x_a": values})
    return list(held.tolist())


def test_every_setting_is_tried_here() -> None:
    assert GIVEN.keys() == {f.name for f in fields(RowFilter)}


@pytest.mark.parametrize("name", GIVEN)
def test_each_setting_changes_the_digest(name: str) -> None:
    digest = RowFilter(**GIVEN).digest()
    others = {key: value for key, value in GIVEN.items() if key != name}
    assert RowFilter(**others).digest() != digest
    assert RowFilter(**{name: GIVEN[name]}).digest() != RowFilter().digest()


def test_digest_is_that_of_the_set() -> None:
    """Order, repetition and 4 for 4.0 make no other filter; nor does another release."""
    turned: dict[str, Any] = {
        k: v[::-1] + v[:1] if isinstance(v, tuple) else v for k, v in GIVEN.items()
    }
    turned["ranges"] = {"prompt_length": (None, 4.0), "x_reward": (0, None)}
    assert RowFilter(**turned).digest() == RowFilter(**GIVEN).digest()
    assert RowFilter(**GIVEN).digest() == "1725e70bf4fb0554a5c8a37941044541"
    assert RowFilter().digest() == "f0e66d31f512e134e45ee4425136da51"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_lag": -1}, r"rows.max_lag: expected at least 0; got -1\. Correct"),
        ({"min_tokens": -2}, "rows.min_tokens: expected at least 0"),
        ({"min_policy_version": 3, "max_policy_version": 2}, "rows.max_policy_version.*least.*3"),
        ({"min_tokens": 3, "max_tokens": 2}, "rows.max_tokens.*lowest, 3; got 2"),
        ({"min_positions": 3, "max_positions": 2}, "rows.max_positions"),
        ({"finish_reasons": ("stop", "eos")}, "rows.finish_reasons.*stop, length.*got 'eos'"),
        ({"sources": ("teachers",)}, "rows.sources.*teacher, dataset.*got 'teachers'"),
        ({"prompt_ids": (2**64,)}, "rows.prompt_ids.*2\\^64"),
        ({"exclude_rollouts": (-1,)}, "rows.exclude_rollouts.*got -1"),
        ({"ranges": {"reward": (0, 1)}}, "rows.ranges, 'reward'.*x_.*prompt_length"),
        ({"ranges": {"token": (0, 1)}}, "rows.ranges, 'token'"),
        ({"ranges": {"finish_reason": (0, 1)}}, "rows.ranges, 'finish_reason'"),
        ({"ranges": {"x_a": (1.0, 0.5)}}, "rows.ranges, 'x_a'.*lowest, 1.0; got 0.5"),
        ({"ranges": {"x_a": (float("nan"), None)}}, "rows.ranges, 'x_a'.*finite"),
        ({"ranges": {"x_a": (None, float("inf"))}}, "rows.ranges, 'x_a'.*finite"),
        ({"ranges": {"x_a": (1.0,)}}, "rows.ranges, 'x_a'.*lowest and a highest"),
    ],
)
def test_bad_values_are_refused_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowFilter(**values)


def test_bounds_are_included_as_the_column_holds_them() -> None:
    tenths = np.array([0.1, 0.2, np.nan, np.inf, -np.inf], np.float32)
    assert within(tenths, 0.1, 0.2) == [True, True, False, False, False]
    assert within(tenths, 0.1, None) == [True, True, False, True, False]
    assert within(tenths, None, None) == [True, True, False, True, True]
    assert within(tenths, -1e300, 1e300) == [True, True, False, True, True]


def test_integers_are_compared_exactly() -> None:
    """2^63 + 1 and 2^63 are one float64."""
    ids = np.array([0, 2**63, 2**63 + 1, 2**64 - 1], np.uint64)
    assert within(ids, None, 2**63) == [True, True, False, False]
    assert within(ids, 0.5, 2.0**80) == [False, True, True, True]
    assert within(ids, -(2.0**80), -0.5) == [False] * 4


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("min_policy_version", [False, False, True, True]),
        ("max_policy_version", [False, True, True, False]),
    ],
)
def test_an_unknown_policy_fits_no_window(name: str, held: list[bool]) -> None:
    version = np.array([-1, 0, 2, 3], np.int32)
    columns = {"policy_version_min": version, "policy_version_max": version}
    values: dict[str, Any] = {name: 2}
    conditions = Conditions(RowFilter(**values))
    ((found, fits),) = conditions.held(np.ones((4, 3)), columns)
    assert (found, fits.tolist()) == (name, held)


def test_only_what_is_asked_for_is_read() -> None:
    assert Conditions(RowFilter()).columns == set()
    assert Conditions(RowFilter(min_tokens=1, max_positions=3)).columns == set()
    assert Conditions(RowFilter(max_lag=0)).columns == {"policy_version_min"}
    assert Conditions(RowFilter(**GIVEN)).columns == {
        "policy_version_min",
        "policy_version_max",
        "finish_reason",
        "source",
        "prompt_id",
        "rollout_id",
        "x_reward",
        "prompt_length",
    }


def test_a_filter_of_many_ids() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**64, 5000, dtype=np.uint64)
    listed = tuple(ids[::2].tolist())
    conditions = Conditions(RowFilter(exclude_rollouts=listed, prompt_ids=listed))
    columns = {"rollout_id": ids, "prompt_id": ids}
    held = dict(conditions.held(np.ones((len(ids), 3)), columns))
    is_listed = np.arange(len(ids)) % 2 == 0
    np.testing.assert_array_equal(held["prompt_ids"], is_listed)
    np.testing.assert_array_equal(held["exclude_rollouts"], ~is_listed)
