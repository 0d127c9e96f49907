"""The columns of a shard that come from its part, against the same laid out row by row."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.errors import ShapeError
from stillroom.cache.part import decode_part, encode_part
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import BY_NAME, FINISH_REASONS, PART_SCHEMA, SOURCES, Arrays
from tests.cache.conftest import QUICK
from tests.cache.fakes import make_meta, make_rollout, make_table
from tests.cache.part_twins import TWIN_MAX_EXTRA, USER_TYPES, arrays_of_row, rollouts

META = make_meta(5, policy=2)


def arrays_of(rows: list[dict[str, Any]], **user: pa.DataType) -> Arrays:
    """Encode rollouts, decode them, and lay out the columns."""
    table, _ = decode_part(encode_part(make_table(rows, **user), META), "here")
    return part_arrays(table)


@QUICK
@given(st.lists(rollouts(bad=False), min_size=1, max_size=6))
def test_rollouts_are_laid_end_to_end(rows: list[dict[str, Any]]) -> None:
    table, meta = decode_part(encode_part(make_table(rows, **USER_TYPES), META), "here")
    assert meta == META
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    arrays = part_arrays(chunked, TWIN_MAX_EXTRA)
    twins = [arrays_of_row(row, TWIN_MAX_EXTRA) for row in rows]
    for name in twins[0]:
        expected = [value for twin in twins for value in twin[name]]
        dtype = BY_NAME[name].dtype if name in BY_NAME else "float32"
        width = (TWIN_MAX_EXTRA,) if name.startswith("extra_") else ()
        wanted = np.array(expected, dtype).reshape(-1, *width)
        assert arrays[name].dtype == wanted.dtype
        np.testing.assert_array_equal(arrays[name], wanted, err_msg=name)
    for edge, name in (
        ("sequence_start", "token"),
        ("position_start", "behaviour_logprob"),
        ("teacher_prompt_start", "teacher_prompt"),
    ):
        assert np.diff(arrays[edge]).tolist() == [len(twin[name]) for twin in twins]
        assert arrays[edge].dtype == np.uint64
    assert arrays["prompt_length"].tolist() == [len(row["prompt"]) for row in rows]
    assert arrays["rollout_id"].tolist() == [row["rollout_id"] for row in rows]
    codes = [FINISH_REASONS.index(row["finish_reason"]) for row in rows]
    assert arrays["finish_reason"].tolist() == codes
    assert arrays["source"].tolist() == [SOURCES.index(row["source"]) for row in rows]
    assert arrays["ends_with_stop"].tolist() == [row["ends_with_stop"] for row in rows]
    one = part_arrays(table.slice(len(rows) - 1))
    assert one["token"].tolist() == twins[-1]["token"]


def test_a_scored_mask_drops_positions_and_their_logprobs() -> None:
    row = make_rollout(
        completion=[4, 5, 6, 7], scored=[0, 1, 0, 1], behaviour_logprob=[-1.0, -2.0, -3.0, -4.0]
    )
    arrays = arrays_of([row, make_rollout()])
    assert arrays["scored"].tolist() == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    assert arrays["position_start"].tolist() == [0, 2, 4]
    assert arrays["behaviour_logprob"][:2].tolist() == [-2.0, -4.0]
    assert np.isnan(arrays["behaviour_logprob"][2:]).all()


def test_user_columns_arrive_per_sequence_and_per_token() -> None:
    rows = [
        make_rollout(x_reward=0.5, x_weight=[1.0, 2.0], scored=[0, 1]),
        make_rollout(x_reward=None, x_weight=None),
        make_rollout(x_reward=-1.0, x_weight=[3.0, None]),
    ]
    arrays = arrays_of(rows, x_reward=pa.float64(), x_weight=pa.list_(pa.float64()))
    assert arrays["x_reward"].dtype == arrays["x_weight"].dtype == np.float32
    assert repr(arrays["x_reward"].tolist()) == "[0.5, nan, -1.0]"
    assert repr(arrays["x_weight"].tolist()) == "[2.0, nan, nan, 3.0, nan]"


def test_large_lists_and_other_integers_are_taken() -> None:
    large = pa.large_list(pa.int64())
    fields = [f.with_type(large) if pa.types.is_list(f.type) else f for f in PART_SCHEMA]
    rows = [make_rollout(scored=[1, 1], x_weight=[1, 2])]
    table = make_table(rows, x_weight=pa.large_list(pa.float64()))
    wide = table.cast(pa.schema([*fields[:8], *table.schema][:8] + list(table.schema)[8:]))
    arrays = part_arrays(decode_part(encode_part(wide, META), "here")[0])
    assert arrays["token"].tolist() == [1, 2, 3, 4, 5]
    assert arrays["x_weight"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scored": [1]}, "'scored', row 1: expected 2 values, one a completion token; got 1"),
        ({"x_weight": [1.0] * 3}, "'x_weight', row 1: expected 2 values"),
        ({"finish_reason": "tired"}, "'finish_reason', row 1: expected one of .*; got 'tired'"),
    ],
)
def test_what_was_never_checked_is_refused(change: dict[str, Any], expected: str) -> None:
    rows = [make_rollout(), make_rollout(**change)]
    with pytest.raises(ShapeError, match=f"^{expected}"):
        part_arrays(make_table(rows, **USER_TYPES))
