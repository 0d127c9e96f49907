"""How sequences are cut into row groups and pages, and which columns a file has."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.parquet_layout import (
    GROUP_ENTRIES,
    GROUP_POSITIONS,
    GROUP_TOKENS,
    PAGES,
    cut,
    fields_of,
    group_positions,
    page_rows,
    row_groups,
)
from stillroom.cache.schema import BY_NAME, COLUMNS
from tests.cache.conftest import QUICK


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_runs_are_as_long_as_they_may_be(
    rows: list[tuple[int, int]], first: int, second: int
) -> None:
    sizes = np.array(rows, np.int64).reshape(-1, 2)
    runs = cut([(sizes[:, 0], first), (sizes[:, 1], second)])
    assert sum(runs) == len(rows)
    start = 0
    for count in runs:
        own, more = sizes[start : start + count], sizes[start : start + count + 1]
        assert count == 1 or (own.sum(axis=0) <= (first, second)).all()
        assert len(more) == count or (more.sum(axis=0) > (first, second)).any()
        start += count


def test_row_groups_stay_within_positions_and_tokens() -> None:
    ones = np.ones(20_000, np.int64)
    assert row_groups(ones, ones, 0 * ones, 64) == [8192, 8192, 3616]
    assert set(row_groups(ones, 0 * ones + GROUP_TOKENS // 2, 0 * ones, 64)) == {2}
    assert set(row_groups(ones, ones, 0 * ones + GROUP_TOKENS, 64)) == {1}
    long = np.array([10**6, 1, 1])
    assert row_groups(long, long, 0 * long, 64) == [1, 2]


@pytest.mark.parametrize(
    ("topk", "positions"),
    [(1, GROUP_POSITIONS), (128, GROUP_POSITIONS), (1024, 1024), (65535, GROUP_ENTRIES // 65535)],
)
def test_many_entries_a_position_make_groups_shorter(topk: int, positions: int) -> None:
    assert group_positions(topk) == positions
    field = next(field for field in fields_of({}, extra=False) if field.name == "topk_id")
    pages = page_rows(field, np.ones(positions, np.int64), topk)
    assert sum(pages) == positions
    assert len(pages) == PAGES


def test_columns_are_those_of_the_schema_but_for_what_lists_tell() -> None:
    fields = fields_of({"x_b": "position", "x_a": "sequence"}, extra=True)
    told = {c.name for c in COLUMNS if c.axis == "edge"} | {"topk_count"}
    assert {field.name for field in fields} == BY_NAME.keys() - told | {"x_a", "x_b"}
    assert fields_of({"x_a": "sequence", "x_b": "position"}, extra=True) == fields
    depth = {field.name: field.depth for field in fields}
    assert (depth["x_a"], depth["x_b"], depth["token"], depth["extra_logprob"]) == (0, 1, 1, 2)
    assert not any(field.name.startswith("extra_") for field in fields_of({}, extra=False))
