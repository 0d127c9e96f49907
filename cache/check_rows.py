"""Which rollouts of a part cannot be scored, and why."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.errors import InputError
from stillroom.cache.extra import ID, LOGPROB, NO_PROBABILITY, extra_problems
from stillroom.cache.lists import Lists, list_column
from stillroom.cache.schema import FINISH_REASONS, SOURCES, USER_PREFIX

NO_LIMIT = 2**31 - 1

Rule = tuple[np.ndarray, Callable[[int], str]]
"""(rows,) bool: the rows that break it; and what is wrong with such a row."""


def check_rows(
    table: pa.Table,
    vocab_size: int,
    where: str,
    max_length: int = NO_LIMIT,
    max_extra: int = NO_LIMIT,
) -> None:
    """Refuse rollouts that cannot be scored: no tokens, ids out of range, lists of unequal length,
    or more extra ids beside a token than the cache scores.

    Args:
        table: rollouts with the columns and types of a part.
        vocab_size: ids are below it.
        where: the part or file, for messages.
        max_length: longest sequence that the teacher reads, in tokens.
        max_extra: extra ids that may stand beside one token.

    Raises:
        InputError: names the first such row, and says how many there are; or there is none at all.
    """
    if not len(table):
        raise InputError(where, "at least one rollout", "none", "Leave the part out.")
    found = bad_rows(table, vocab_size, max_length, max_extra)
    if found:
        row, problem = next(iter(found.items()))
        more = f" (and {len(found) - 1:,} more such rows)" if len(found) > 1 else ""
        raise unusable_row(where, row, problem + more)


def unusable_row(where: str, row: int, problem: str) -> InputError:
    """The error that names a row."""
    do = "Leave the row out, or repair it."
    return InputError(f"{where}, row {row}", "a rollout that can be scored", problem, do)


def bad_rows(
    table: pa.Table, vocab_size: int, max_length: int = NO_LIMIT, max_extra: int = NO_LIMIT
) -> dict[int, str]:
    """Rows that cannot be scored, in order, each with the first thing that is wrong with it; the
    arguments are those of `check_rows`."""
    found: dict[int, str] = {}
    for broken, problem in _rules(table, vocab_size, max_length):
        for row in np.flatnonzero(broken).tolist():
            if row not in found:
                found[row] = problem(row)
    good = np.delete(np.arange(len(table)), list(found))
    return dict(sorted((found | _bad_extra(table, good, vocab_size, max_extra)).items()))


def _bad_extra(
    table: pa.Table, good: np.ndarray, vocab_size: int, max_extra: int
) -> dict[int, str]:
    columns = table.select(["completion", ID, LOGPROB])
    if columns[ID].null_count == columns[LOGPROB].null_count == len(table):
        return {}
    found: dict[int, str] = {}
    while problems := extra_problems(columns.take(good), vocab_size, max_extra):
        found |= {int(good[at]): problem for at, problem in problems.items()}
        good = np.delete(good, list(problems))
    return found


def _rules(table: pa.Table, vocab_size: int, max_length: int) -> Iterator[Rule]:
    prompt, completion, own = (
        list_column(table[name]) for name in ("prompt", "completion", "teacher_prompt")
    )
    yield prompt.lengths == 0, lambda _: "an empty prompt"
    yield completion.lengths == 0, lambda _: "an empty completion"
    yield from _token_rules((prompt, completion, own), vocab_size)
    yield _name_rule(table, "finish_reason", FINISH_REASONS)
    yield _name_rule(table, "source", SOURCES)
    user = [n for n in table.column_names if n.startswith(USER_PREFIX)]
    for name in ("scored", "behaviour_logprob", *user):
        if pa.types.is_list(table.schema.field(name).type):
            yield _length_rule(name, list_column(table[name]), completion)
    yield _mask_rule(list_column(table["scored"]))
    yield from _logprob_rules(list_column(table["behaviour_logprob"]))
    read = np.where(own.lengths > 0, own.lengths, prompt.lengths) + completion.lengths
    yield read > max_length, lambda row: f"{read[row]} tokens; the teacher reads {max_length}"


def _token_rules(columns: tuple[Lists, ...], vocab_size: int) -> Iterator[Rule]:
    missing = [lists.any_in_row(lists.value_is_null) for lists in columns]
    yield np.any(missing, axis=0), lambda _: "a token without an id"
    beyond = [lists.any_in_row(lists.values >= vocab_size) for lists in columns]

    def too_large(row: int) -> str:
        largest = max(int(lists.row(row).max(initial=0)) for lists in columns)
        return f"token id {largest}, but the vocabulary has {vocab_size}"

    yield np.any(beyond, axis=0), too_large


def _name_rule(table: pa.Table, name: str, names: tuple[str, ...]) -> Rule:
    known = pc.is_in(table[name], value_set=pa.array(names, pa.string())).to_numpy()
    return ~known, lambda row: f"{name} {table[name][row].as_py()!r}, which is none of {names}"


def _length_rule(name: str, lists: Lists, completion: Lists) -> Rule:
    lengths, expected = lists.lengths, completion.lengths
    return ~lists.is_null & (
        lengths != expected
    ), lambda row: f"{lengths[row]} values of {name!r} for {expected[row]} completion tokens"


def _mask_rule(scored: Lists) -> Rule:
    ones = scored.any_in_row(scored.values == 1)
    others = scored.any_in_row((scored.values > 1) | scored.value_is_null)
    problem = "a 'scored' mask with no 1, or with other values than 0 and 1"
    return ~scored.is_null & (~ones | others), lambda _: problem


def _logprob_rules(logprob: Lists) -> Iterator[Rule]:
    yield logprob.any_in_row(logprob.values > 0), lambda _: "a behaviour logprob above 0"
    yield logprob.any_in_row(logprob.values == -np.inf), lambda _: NO_PROBABILITY
