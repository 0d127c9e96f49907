"""Rollouts from elsewhere: the first bad row is named, or all of them are left out."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache import checked_rollouts
from stillroom.cache.checked_rollouts import CheckedRollouts, check_rollouts, one_batch
from stillroom.cache.errors import InputError
from tests.cache.fakes import VOCAB, make_identity

ROW: dict[str, Any] = {"prompt": [1, 2], "completion": [3, 4]}
IDENTITY = make_identity(max_length=6)
BAD: list[tuple[Any, str]] = [
    (ROW | {"prompt": "a"}, "'prompt' is 'a', not a list of token ids"),
    (ROW | {"prompt": None}, "an empty prompt"),
    ({"prompt": [1]}, "an empty completion"),
    (ROW | {"completion": [3, None]}, "a token without an id"),
    (ROW | {"completion": [3, VOCAB]}, f"token id {VOCAB}, but the vocabulary has {VOCAB}"),
    (ROW | {"completion": [3] * 5}, "7 tokens; the teacher reads 6"),
    (ROW | {"behaviour_logprob": [-1.0, np.inf]}, "a behaviour logprob above 0"),
    (ROW | {"behaviour_logprob": [-1.0, -1e300]}, "a behaviour logprob of -inf in float32"),
    (ROW | {"behaviour_logprob": [-1.0]}, "1 values of 'behaviour_logprob' for 2 completion"),
    (ROW | {"scored": [0, 0]}, "a 'scored' mask with no 1"),
    (ROW | {"rollout_id": 7}, "a rollout_id that an earlier row has, 7"),
    (ROW | {"prompt_id": 1}, "prompt_id 1, but its ids hash to"),
    (ROW | {"finish_reason": "tired"}, "finish_reason 'tired'"),
    (ROW | {"x_a": [1.0]}, "1 values of 'x_a' for 2 completion tokens"),
    (ROW | {"extra_id": [[1]] * 2}, "more than the 0 that this cache scores, in extra_id"),
]
GOOD = ROW | {"rollout_id": 7, "behaviour_logprob": [np.nan, -1], "x_a": [0.0, None]}


def check(rows: Any, *, skip_bad: bool = False) -> CheckedRollouts:
    """Check one batch."""
    return check_rollouts([one_batch(rows, "f")], IDENTITY, "f", skip_bad=skip_bad)


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_the_first_bad_row_is_named(bad: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        check([GOOD, ROW, bad, ROW, 5])
    assert caught.value.where == "f, row 2"
    assert caught.value.got.startswith(reason)
    assert caught.value.got.endswith("(and 1 more such rows)")


def test_bad_rows_are_left_out_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_rollouts, "CHECKED_ROWS", 4)
    rows = [GOOD]
    for bad, _ in BAD:
        rows += [bad, ROW]
    checked = check(rows, skip_bad=True)
    assert [row for row, _ in checked.left_out] == list(range(1, len(rows), 2))
    for (_, found), (_, reason) in zip(checked.left_out, BAD, strict=True):
        assert found.startswith(reason)
    assert checked.table["rollout_id"].to_pylist() == [7, *[None] * len(BAD)]
    assert checked.table["completion"].to_pylist() == [[3, 4]] * (1 + len(BAD))


@pytest.mark.parametrize(
    "rows",
    [
        pa.Table.from_pylist([ROW]),
        [ROW],
        (ROW,),
        {"prompt": [[1, 2]], "completion": [[3, 4]]},
        pa.RecordBatch.from_pylist([ROW]),
    ],
)
def test_tables_of_many_kinds_are_taken(rows: Any) -> None:
    assert check(rows).table.to_pylist() == [ROW]


@pytest.mark.parametrize("rows", [5, "rows", {"prompt": [[1]], "completion": [[1], [2]]}])
def test_what_is_no_table_is_refused(rows: Any) -> None:
    with pytest.raises(InputError, match="f: expected a table or a list of mappings"):
        check(rows)


@pytest.mark.parametrize(("rows", "got"), [([], "none"), ([5, 6], "none of 2 rows")])
def test_nothing_to_score_is_refused(rows: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"at least one rollout that can be scored; got {got}\\."):
        check(rows, skip_bad=True)
