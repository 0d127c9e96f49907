"""Rollouts from elsewhere, checked row by row before anything is written."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache.check_rollouts import bad_rows, unusable_row
from stillroom.cache.errors import InputError
from stillroom.cache.fill_rollouts import contradictions, fill_rollouts
from stillroom.cache.foreign_rows import Rows, read_rows
from stillroom.cache.identity import Identity

CHECKED_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class CheckedRollouts:
    """Rollouts that can be scored, of one file or table."""

    where: str
    """The file or table, for messages."""
    table: pa.Table
    """What was given: columns with a part's types, null where something is left open."""
    left_out: list[tuple[int, str]]
    """Numbers of the rows that cannot be scored, and why."""


def check_rollouts(
    batches: Iterable[tuple[Rows, np.ndarray]],
    identity: Identity,
    where: str = "rollouts",
    *,
    skip_bad: bool = False,
) -> CheckedRollouts:
    """Check rollouts before anything is written; see `Cache.add_rollouts`.

    Args:
        batches: tables or lists of mappings, each with the numbers that messages give its rows.
        identity: of the cache that they are meant for.
        where: the file or table, for messages.
        skip_bad: leave out rows that cannot be scored.

    Raises:
        InputError: a row cannot be scored, and is named; or there is none that can.
        ShapeError: a column is missing, unknown or of another type.
    """
    rows = read_rows(batches, where)
    found = _problems(rows.table, identity) if len(rows.table) else {}
    left_out = sorted([*rows.bad, *((int(rows.number[row]), p) for row, p in found.items())])
    if left_out and not skip_bad:
        number, problem = left_out[0]
        more = f" (and {len(left_out) - 1:,} more such rows)" if len(left_out) > 1 else ""
        raise unusable_row(where, number, problem + more)
    good = rows.table.take(np.delete(np.arange(len(rows.table)), list(found)))
    if not len(good):
        got = f"none of {len(left_out):,} rows" if left_out else "none"
        raise InputError(where, "at least one rollout that can be scored", got, "Add rollouts.")
    return CheckedRollouts(where, good, left_out)


def one_batch(data: Any, where: str) -> tuple[Rows, np.ndarray]:
    """A table, a list of mappings, or anything that `pyarrow.table` takes, as rows numbered from 0.

    Raises:
        InputError: it is none of these.
    """
    try:
        rows = data if isinstance(data, pa.Table | list | tuple) else pa.table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        do = "Give a list of rows to learn which of them is wrong."
        raise InputError(where, "a table or a list of mappings", str(error), do) from error
    return rows, np.arange(len(rows))


def _problems(table: pa.Table, identity: Identity) -> dict[int, str]:
    """Indices of the rows that cannot be scored, and why."""
    found = dict(contradictions(table))
    limits = (identity.vocab_size, identity.max_length, identity.student_extra)
    for start in range(0, len(table), CHECKED_ROWS):
        filled = fill_rollouts(table.slice(start, CHECKED_ROWS), None)
        found |= {start + row: problem for row, problem in bad_rows(filled, *limits).items()}
    return found
