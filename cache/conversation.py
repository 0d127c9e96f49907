"""Whole conversations, one list of ids each, cut into the prompt and the completion of a part."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.errors import ShapeError
from stillroom.cache.foreign_columns import TOKEN, is_list
from stillroom.cache.lists import edges, list_column

NOT_PER_TOKEN = ("teacher_prompt",)


def split_conversations(table: pa.Table, where: str) -> tuple[pa.Table, dict[int, str]]:
    """Cut each conversation before its first scored token: what comes before is the prompt, the
    rest is the completion, whether scored or not.

    Args:
        table: the columns `token` and `scored`; other lists but `teacher_prompt` have a value a
            token too, and lose those of the prompt.
        where: the file or table, for messages.

    Returns:
        The table with `prompt` and `completion` in the place of `token`, and the rows that cannot
        be cut, with the reason; those keep no meaning.

    Raises:
        ShapeError: there is a prompt or a completion too, or no column `scored`.
    """
    both = sorted({"prompt", "completion"} & set(table.column_names))
    if both or "scored" not in table.column_names:
        got = f"{TOKEN!r} and {both}" if both else f"{TOKEN!r} without 'scored'"
        expected = f"'prompt' and 'completion', or {TOKEN!r} and 'scored'"
        raise ShapeError(where, expected, got, "Leave one form out.")
    scored = list_column(table["scored"])
    length = _lengths(table[TOKEN])
    first = _first_one(scored.values, scored.start)
    bad = _bad_rows(table, length, first)
    ok = np.ones(len(table), bool)
    ok[list(bad)] = False
    columns = {}
    for name in table.column_names:
        column, renamed = table[name], "completion" if name == TOKEN else name
        if is_list(column.type) and name not in NOT_PER_TOKEN:
            cut = np.where(ok, first, 0).clip(max=_lengths(column))
            if name == TOKEN:
                columns["prompt"] = _part_of(column, cut, head=True)
            column = _part_of(column, cut, head=False)
        columns[renamed] = column
    return pa.table(columns), bad


def _bad_rows(table: pa.Table, length: np.ndarray, first: np.ndarray) -> dict[int, str]:
    bad: dict[int, str] = {}
    for name in table.column_names:
        if not is_list(table.schema.field(name).type) or name in (TOKEN, *NOT_PER_TOKEN):
            continue
        given, found = table[name].is_valid().to_numpy(), _lengths(table[name])
        for row in np.flatnonzero(given & (found != length)).tolist():
            reason = f"{found[row]} values of {name!r} for {length[row]} tokens"
            bad.setdefault(row, reason)
    for row in np.flatnonzero(first < 0).tolist():
        bad.setdefault(row, f"{TOKEN!r} without a 1 in 'scored'")
    for row in np.flatnonzero(first == 0).tolist():
        bad.setdefault(row, f"{TOKEN!r} whose first id is scored: no prompt comes before it")
    return bad


def _first_one(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(rows,) index of each row's first 1, counted from its start; -1 if there is none."""
    ones = np.append(np.flatnonzero(values == 1), len(values))
    found = ones[np.searchsorted(ones[:-1], start[:-1])]
    return np.where(found < start[1:], found - start[:-1], -1)


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return lengths


def _part_of(column: pa.ChunkedArray, cut: np.ndarray, *, head: bool) -> pa.Array:
    """The first `cut[row]` values of each list, or the others; null lists stay null."""
    array, lengths = column.combine_chunks(), _lengths(column)
    within = np.arange(lengths.sum()) - np.repeat(edges(lengths)[:-1], lengths)
    in_head = within < np.repeat(cut, lengths)
    values = array.flatten().filter(pa.array(in_head if head else ~in_head))
    offsets = edges(cut if head else lengths - cut).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=array.is_null())
