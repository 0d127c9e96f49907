"""Rollouts that another system wrote, as rows with a part's column types, and the reason for each
row that cannot be read.

Every column may be missing or null but `prompt` and `completion`, or `token` and `scored` in their
place: the ids of a whole conversation, of which those before the first scored one are the prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from stillroom.cache.conversation import split_conversations
from stillroom.cache.errors import ShapeError
from stillroom.cache.foreign_columns import KINDS, TOKEN, Kind, cast_column, kind_of
from stillroom.cache.schema import PART_SCHEMA, USER_NAME, USER_PREFIX

Rows: TypeAlias = pa.Table | Sequence[Any]
"""A table, or one mapping from column to value a row."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a row where a file holds something that is none."""

    reason: str


@dataclass(frozen=True, slots=True)
class ForeignRows:
    """Rows that could be read, and those that could not."""

    table: pa.Table
    """The columns that were given, with a part's types; null where a row has none."""
    number: np.ndarray
    """(rows,) int64: the number of each row in the file or table that it came from."""
    bad: list[tuple[int, str]]
    """Numbers of the other rows, and why."""


def read_rows(batches: Iterable[tuple[Rows, np.ndarray]], where: str) -> ForeignRows:
    """Bring rows to a part's column types.

    Args:
        batches: rows, and (rows,) the numbers that messages give them.
        where: the file or table, for messages.

    Raises:
        ShapeError: a column is unknown, missing or twice there, or its type fits no row; names it.
    """
    user_kinds: dict[str, Kind] = {}
    read = [_read_batch(rows, number, user_kinds, where) for rows, number in batches]
    bad = [item for one in read for item in one.bad]
    if not any(len(one.number) for one in read):
        return ForeignRows(pa.table({}), np.empty(0, np.int64), bad)
    names = {name for one in read for name in one.table.column_names}
    missing = sorted({"prompt", "completion"} - names)
    if missing:
        expected = f"the columns 'prompt' and 'completion', or {TOKEN!r} and 'scored'"
        raise ShapeError(where, expected, f"no {missing}", "Rename columns with a mapping.")
    kinds = KINDS | user_kinds
    order = [n for n in (*PART_SCHEMA.names, *sorted(user_kinds)) if n in names]
    schema = pa.schema([(name, kinds[name].target) for name in order])
    return ForeignRows(
        pa.concat_tables([_widened(one, schema) for one in read]),
        np.concatenate([one.number for one in read]),
        bad,
    )


def _read_batch(
    rows: Rows, number: np.ndarray, user_kinds: dict[str, Kind], where: str
) -> ForeignRows:
    columns, bad = _columns(rows)
    _check_names(columns, where)
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        kind = user_kinds.get(name) or kind_of(name, values)
        if kind is None:
            continue
        if name.startswith(USER_PREFIX):
            user_kinds[name] = kind
        arrays[name], wrong = cast_column(name, values, kind, where)
        bad = wrong | bad
    table = pa.table(arrays)
    if TOKEN in arrays:
        table, uncut = split_conversations(table, where)
        bad = uncut | bad
    keep = np.delete(np.arange(len(number)), list(bad))
    return ForeignRows(
        table.take(keep) if bad and arrays else table,
        number[keep],
        [(int(number[row]), reason) for row, reason in sorted(bad.items())],
    )


def _columns(rows: Rows) -> tuple[dict[str, Any], dict[int, str]]:
    """Columns by name, and rows that are none."""
    if isinstance(rows, pa.Table):
        twice = {n for n in rows.column_names if rows.column_names.count(n) > 1}
        if twice:
            raise ShapeError("rollouts", "every column once", f"{sorted(twice)} twice", "Drop one.")
        return {name: rows[name] for name in rows.column_names}, {}
    bad = {
        i: row.reason if isinstance(row, Unreadable) else f"{type(row).__name__}, not a mapping"
        for i, row in enumerate(rows)
        if not isinstance(row, Mapping)
    }
    mappings = [row if isinstance(row, Mapping) else {} for row in rows]
    names = dict.fromkeys(name for row in mappings for name in row)
    return {name: [row.get(name) for row in mappings] for name in names}, bad


def _check_names(names: Iterable[str], where: str) -> None:
    unknown = sorted(str(n) for n in names if n not in KINDS and not USER_NAME.fullmatch(str(n)))
    if unknown:
        expected = f"the columns {sorted(KINDS)} and {USER_PREFIX}NAME"
        do = "Rename them, or name the columns to take."
        raise ShapeError(where, expected, f"{unknown}", do)


def _widened(rows: ForeignRows, schema: pa.Schema) -> pa.Table:
    """The rows with every column of the schema; null where they had none."""
    given = set(rows.table.column_names)
    columns = [
        rows.table[f.name] if f.name in given else pa.nulls(len(rows.number), f.type)
        for f in schema
    ]
    return pa.table(columns, schema)
