"""What rollouts leave open is filled in; what they say and cannot be so is named."""

from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache.fill_rollouts import contradictions, fill_rollouts, name_rollouts, positions
from stillroom.cache.part import prompt_id, rollout_id
from stillroom.cache.schema import PART_SCHEMA

A, B = [1, 2], [3]


def table(rows: list[dict[str, Any]], **user: pa.DataType) -> pa.Table:
    """Rows with the columns that they name, of a part's types."""
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {field.name: field.type for field in PART_SCHEMA} | user
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds[name]) for name in names]))


def test_everything_but_ids_has_a_default() -> None:
    rows = table([{"prompt": A, "completion": [5]}, {"prompt": B, "completion": [6]}])
    filled = fill_rollouts(rows, None)
    assert filled.column_names == PART_SCHEMA.names
    assert [field.type for field in filled.schema] == [field.type for field in PART_SCHEMA]
    assert filled.to_pylist()[0] == {
        "rollout_id": None,
        "prompt_id": prompt_id(np.array(A)),
        "prompt_name": None,
        "group": filled["group"][0].as_py(),
        "sample_index": 0,
        "prompt": A,
        "completion": [5],
        "scored": None,
        "behaviour_logprob": None,
        "teacher_prompt": None,
        "finish_reason": "unknown",
        "source": "import",
        "policy_version_min": -1,
        "policy_version_max": -1,
        "ends_with_stop": False,
        "extra_id": None,
        "extra_behaviour_logprob": None,
    }
    assert fill_rollouts(rows, 7)["policy_version_max"].to_pylist() == [7, 7]


def test_samples_are_counted_within_their_group() -> None:
    groups: list[dict[str, Any]] = [
        {"prompt": p, "completion": [5], "group": g, "sample_index": s}
        for p, g, s in [(A, None, None), (B, None, None), (A, None, None), (A, 9, None), (A, 9, 5)]
    ]
    filled = fill_rollouts(table(groups), None, "import")
    first, second, *others = filled["group"].to_pylist()
    assert first != second
    assert others == [first, 9, 9]
    assert filled["sample_index"].to_pylist() == [0, 0, 1, 0, 5]
    again = fill_rollouts(table(groups), 7, "import")
    assert again["group"].to_pylist() == [first, second, *others]
    other = fill_rollouts(table(groups), None, "other")["group"].to_pylist()
    assert not {first, second} & set(other)
    assert other[3:] == [9, 9], "what is given stays"


def test_what_is_given_stays() -> None:
    given = {
        "prompt": A,
        "completion": [5],
        "rollout_id": 3,
        "prompt_id": prompt_id(np.array(A)),
        "prompt_name": "n",
        "finish_reason": "stop",
        "source": "teacher",
        "policy_version_min": 2,
        "ends_with_stop": True,
        "x_reward": 0.5,
    }
    row = fill_rollouts(table([given], x_reward=pa.float32()), 7).to_pylist()[0]
    assert {name: row[name] for name in given} == given
    assert row["policy_version_max"] == 2, "one of two bounds is both"


def test_rollouts_without_a_name_get_that_of_their_place() -> None:
    unit = "0" * 16
    rows = table([{"prompt": A, "completion": [5], "rollout_id": i} for i in (None, 4, None)])
    named = name_rollouts(fill_rollouts(rows, None), unit)
    assert named["rollout_id"].to_pylist() == [rollout_id(unit, 0), 4, rollout_id(unit, 2)]


def test_contradictions_are_named() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"prompt_id": 5},
        {"rollout_id": 8},
        {"policy_version_min": -2},
        {"policy_version_max": -2},
        {"policy_version_min": 3, "policy_version_max": 2},
        {"rollout_id": 8},
        {"rollout_id": 2**64 - 1, "prompt_id": prompt_id(np.array(A))},
    ]
    names = dict.fromkeys(name for change in changes for name in change)
    blank = dict.fromkeys(names)
    rows = table([{"prompt": A, "completion": [5]} | blank | change for change in changes])
    assert dict(contradictions(rows)) == {
        1: f"prompt_id 5, but its ids hash to {prompt_id(np.array(A))}",
        3: "policy_version_min -2, below -1 (unknown)",
        4: "policy_version_max -2, below -1 (unknown)",
        5: "a policy_version_min above its policy_version_max",
        6: "a rollout_id that an earlier row has, 8",
    }
    assert not list(contradictions(table([{"prompt": A, "completion": [5]}])))


def test_positions_are_the_scored_tokens() -> None:
    masks = (None, [0, 1, 1], [1, 0, 0])
    rows = [{"prompt": A, "completion": [5, 6, 7], "scored": mask} for mask in masks]
    assert positions(table(rows)).tolist() == [3, 2, 1]
    assert positions(table([{"prompt": A, "completion": [5, 6]}])).tolist() == [2]
