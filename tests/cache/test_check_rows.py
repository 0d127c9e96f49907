"""Rollouts that cannot be scored are named, each with its reason."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.check_rows import bad_rows
from stillroom.cache.errors import InputError
from stillroom.cache.part import encode_part
from tests.cache.conftest import QUICK
from tests.cache.fakes import VOCAB, make_meta, make_rollout, make_table
from tests.cache.part_twins import (
    TWIN_MAX_EXTRA,
    TWIN_MAX_LENGTH,
    USER_TYPES,
    extra_is_bad,
    problem_of,
    rollouts,
)

META = make_meta(5, policy=2)


@QUICK
@given(st.lists(rollouts(bad=True), min_size=1, max_size=6))
def test_every_bad_row_is_found_with_its_first_problem(rows: list[dict[str, Any]]) -> None:
    table = make_table(rows, **USER_TYPES)
    found = bad_rows(table, VOCAB, TWIN_MAX_LENGTH, TWIN_MAX_EXTRA)
    expected = {i: problem_of(row) for i, row in enumerate(rows)}
    assert {i: p for i, p in found.items() if not p.endswith("in extra_id")} == {
        i: p for i, p in expected.items() if p
    }
    of_extra = [i for i, row in enumerate(rows) if not expected[i] and extra_is_bad(row)]
    assert [i for i, p in found.items() if p.endswith("in extra_id")] == of_extra
    assert list(found) == sorted(found)
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    assert bad_rows(chunked, VOCAB, TWIN_MAX_LENGTH, TWIN_MAX_EXTRA) == found


def test_a_slice_is_checked_alone() -> None:
    rows = [make_rollout(prompt=[VOCAB]), make_rollout(), make_rollout(scored=[0, 0])]
    assert list(bad_rows(make_table(rows).slice(1), VOCAB)) == [1]
    assert bad_rows(make_table(rows).slice(1, 1), VOCAB) == {}


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": []}, "an empty prompt"),
    "no completion": ({"completion": []}, "an empty completion"),
    "a large id": ({"completion": [4, VOCAB]}, f"token id {VOCAB}, but the vocabulary has {VOCAB}"),
    "a large id in the prompt": ({"prompt": [2**32 - 1]}, "token id 4294967295"),
    "a large id for the teacher": ({"teacher_prompt": [VOCAB]}, f"token id {VOCAB}"),
    "no id": ({"completion": [4, None]}, "a token without an id"),
    "a short mask": ({"scored": [1]}, "1 values of 'scored' for 2 completion tokens"),
    "an empty mask": ({"scored": []}, "0 values of 'scored'"),
    "a mask of zeros": ({"scored": [0, 0]}, "a 'scored' mask with no 1"),
    "a mask with 2": ({"scored": [1, 2]}, "other values than 0 and 1"),
    "a mask with a gap": ({"scored": [1, None]}, "other values than 0 and 1"),
    "few logprobs": ({"behaviour_logprob": [-1.0]}, "1 values of 'behaviour_logprob'"),
    "a positive logprob": ({"behaviour_logprob": [-1.0, 1e-3]}, "a behaviour logprob above 0"),
    "an infinite logprob": ({"behaviour_logprob": [-1.0, np.inf]}, "a behaviour logprob above 0"),
    "no probability": ({"behaviour_logprob": [-1.0, -np.inf]}, "a behaviour logprob of -inf"),
    "another finish": ({"finish_reason": "tired"}, "finish_reason 'tired'"),
    "another source": ({"source": "me"}, "source 'me'"),
}


@pytest.mark.parametrize(("change", "problem"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_scored_is_named(change: dict[str, Any], problem: str) -> None:
    rows = [make_rollout(), make_rollout(), make_rollout(**change), make_rollout(prompt=[])]
    where = f"{META.name}, row 2: expected a rollout that can be scored; got "
    with pytest.raises(InputError, match=f"^{where}.*{re.escape(problem)}"):
        encode_part(make_table(rows), META)


def test_a_user_column_of_another_length_is_named() -> None:
    rows = [make_rollout(x_weight=[1.0, 2.0]), make_rollout(x_weight=[1.0])]
    with pytest.raises(InputError, match=r"row 1: .*1 values of 'x_weight' for 2"):
        encode_part(make_table(rows, x_weight=pa.list_(pa.float32())), META)


def test_a_row_that_the_teacher_cannot_read_whole_is_named() -> None:
    rows = [make_rollout(teacher_prompt=[1]), make_rollout(), make_rollout(teacher_prompt=[1] * 4)]
    encode_part(make_table(rows[:2]), META, max_length=5)
    message = r"row 1: .*got 5 tokens; the teacher reads 4 \(and 1 more such rows\)"
    with pytest.raises(InputError, match=message):
        encode_part(make_table(rows), META, max_length=4)
    with pytest.raises(InputError, match=r"row 2: .*got 6 tokens; the teacher reads 5"):
        encode_part(make_table(rows), META, max_length=5)


def test_an_extra_id_that_was_never_chosen_is_named() -> None:
    beside = {"extra_id": [[1], [2]], "extra_behaviour_logprob": [[-1.0], [-np.inf]]}
    with pytest.raises(InputError, match=r"row 1: .*a behaviour logprob of -inf .*, in extra_id"):
        encode_part(make_table([make_rollout(), make_rollout(**beside)]), META)


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match=f"^{META.name}: expected at least one rollout"):
        encode_part(make_table([]), META)
