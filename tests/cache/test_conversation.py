"""Whole conversations are cut before their first scored token."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.conversation import split_conversations
from stillroom.cache.errors import ShapeError
from tests.cache.conftest import QUICK

TYPES = {
    "token": pa.list_(pa.uint32()),
    "scored": pa.list_(pa.uint8()),
    "behaviour_logprob": pa.list_(pa.float32()),
    "teacher_prompt": pa.list_(pa.uint32()),
    "extra_id": pa.list_(pa.list_(pa.uint32())),
    "x_weight": pa.list_(pa.float32()),
    "x_reward": pa.float32(),
}
SCHEMA = pa.schema(TYPES)
PER_TOKEN = ("scored", "behaviour_logprob", "extra_id", "x_weight")


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Any conversation, some of which cannot be cut."""
    token = draw(st.lists(st.integers(0, 9), min_size=2, max_size=6) | st.sampled_from([None, []]))
    n = len(token or []) + draw(st.sampled_from([0, 0, 0, 0, 0, 1]))

    def per_token(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | st.lists(values, min_size=n, max_size=n))

    mask = [0, *draw(st.lists(st.integers(0, 1), min_size=max(0, n - 1), max_size=max(0, n - 1)))]
    scored = draw(st.sampled_from([mask[:n], mask[:n], mask[:n], mask[n:0:-1], None]))
    return {
        "token": token,
        "scored": scored,
        "behaviour_logprob": per_token(st.just(-0.5) | st.none()),
        "teacher_prompt": draw(st.none() | st.just([1])),
        "extra_id": per_token(st.none() | st.lists(st.integers(0, 9), max_size=2)),
        "x_weight": per_token(st.just(1.0)),
        "x_reward": draw(st.none() | st.just(2.0)),
    }


def problem_of(row: dict[str, Any]) -> str | None:
    """What keeps a conversation from being cut."""
    token, scored = row["token"] or [], row["scored"] or []
    for name in PER_TOKEN:
        if row[name] is not None and len(row[name]) != len(token):
            return f"{len(row[name])} values of {name!r} for {len(token)} tokens"
    if 1 not in scored:
        return "'token' without a 1 in 'scored'"
    if scored[0] == 1:
        return "'token' whose first id is scored: no prompt comes before it"
    return None


@QUICK
@given(st.lists(conversations(), max_size=6), st.integers(0, 6))
def test_cuts_are_those_of_plain_python(rows: list[dict[str, Any]], first: int) -> None:
    table, bad = split_conversations(pa.Table.from_pylist(rows, SCHEMA).slice(first), "here")
    rows = rows[first:]
    assert bad == {i: p for i, row in enumerate(rows) if (p := problem_of(row))}
    for row, cut in zip(rows, table.to_pylist(), strict=True):
        if problem_of(row):
            continue
        at = row["scored"].index(1)
        expected = {name: row[name] and row[name][at:] for name in PER_TOKEN}
        expected |= {"prompt": row["token"][:at], "completion": row["token"][at:]}
        assert cut == {n: v for n, v in (row | expected).items() if n != "token"}


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (["token", "x_reward"], "'token' without 'scored'"),
        (["token", "scored", "prompt"], r"'token' and \['prompt'\]"),
    ],
)
def test_two_forms_at_once_are_refused(names: list[str], got: str) -> None:
    kinds = TYPES | {"prompt": TYPES["token"]}
    schema = pa.schema([(name, kinds[name]) for name in names])
    with pytest.raises(ShapeError, match=f"^here: expected 'prompt' and .*; got {got}"):
        split_conversations(pa.Table.from_pylist([], schema), "here")
