"""Rollouts from elsewhere, checked row by row before anything is written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache.check_rows import bad_rows, unusable_row
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
    number: np.ndarray
    """(rows,) int64: the number of each row in the file or table."""
    left_out: list[tuple[int, str]]
    """Numbers of the rows that cannot be taken, and why."""

    def without(self, problems: Mapping[int, str], *, skip_bad: bool) -> "CheckedRollouts":
        """Leave out rows, or refuse the first.

        Args:
            problems: index in the table and reason of each row that cannot be taken.
            skip_bad: leave them out.

        Raises:
            InputError: there is such a row, and is named; or no other.
        """
        wrong = ((int(self.number[row]), problem) for row, problem in problems.items())
        left_out = sorted([*self.left_out, *wrong])
        if left_out and not skip_bad:
            number, problem = left_out[0]
            more = f" (and {len(left_out) - 1:,} more such rows)" if len(left_out) > 1 else ""
            raise unusable_row(self.where, number, problem + more)
        keep = np.delete(np.arange(len(self.number)), list(problems))
        if not len(keep):
            got = f"none of {len(left_out):,} rows" if left_out else "none"
            expected = "at least one rollout that can be scored"
            raise InputError(self.where, expected, got, "Add rollouts.")
        return CheckedRollouts(self.where, self.table.take(keep), self.number[keep], left_out)


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
    given = CheckedRollouts(where, rows.table, rows.number, rows.bad)
    return given.without(found, skip_bad=skip_bad)


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
