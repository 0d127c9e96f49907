"""The ids that a student chose beside each completion token: how they lie in a part, and as
arrays.

In a part they are two columns of lists of lists: for each completion token its ids, as many as
there are up to M, and their behaviour logprobs. A null list of lists is a rollout without any, a
null list a token without any. An id may come twice (draws), and NaN or null is an unknown logprob.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.schema import UNUSED_ID, Arrays

ID, LOGPROB = "extra_id", "extra_behaviour_logprob"
NO_PROBABILITY = "a behaviour logprob of -inf in float32; unknown is NaN or null"


@dataclass(frozen=True, slots=True)
class _Nested:
    """A column of lists of lists, end to end: R rollouts, T tokens of theirs, E entries."""

    given: np.ndarray
    """(R,) bool: the rollout has lists."""
    tokens: np.ndarray
    """(R,) int64: lists of each rollout."""
    counts: np.ndarray
    """(T,) int64: entries of each list; 0 for a null one."""
    values: pa.Array
    """(E,)."""

    @property
    def row(self) -> np.ndarray:
        """(T,) the rollout of each list."""
        return np.repeat(np.arange(len(self.tokens)), self.tokens)


def extra_problems(table: pa.Table, vocab_size: int, most: int) -> dict[int, str]:
    """Rollouts whose extra ids cannot be scored, and what is wrong with them.

    Logprobs are compared with their ids only where every rollout has the right number of lists:
    look again once the rollouts that are named here are left out.

    Args:
        table: rollouts of a part, with its column types.
        vocab_size: ids that the tokenizer knows.
        most: M, ids that may stand beside one token.
    """
    ids, logprobs = _nested(table[ID]), _nested(table[LOGPROB])
    length = pc.list_value_length(table["completion"]).fill_null(0).to_numpy()
    found = _at(ids.given & (ids.tokens != length), "another number of lists than tokens")
    found += _at(logprobs.given & ~ids.given, "behaviour logprobs of no ids")
    found += _at_rows(ids, ids.counts > most, f"more than the {most} that this cache scores")
    if ids.values.null_count:
        found += _at_rows(ids, _any_in(ids, ids.values.is_null()), "an id that is null")
    if len(ids.values):
        beyond = pc.greater_equal(ids.values, vocab_size).fill_null(False)
        found += _at_rows(ids, _any_in(ids, beyond), f"an id not below {vocab_size}")
    return dict(reversed(found or _logprob_problems(ids, logprobs)))


def extra_arrays(table: pa.Table, kept: np.ndarray, start: np.ndarray, most: int) -> Arrays:
    """`extra_id` and `extra_behaviour_logprob` of the scored completion tokens.

    Args:
        table: rollouts that `extra_problems` finds nothing wrong with.
        kept: (completion tokens of all rollouts,) bool: the token is scored.
        start: (rollouts,) where each rollout begins in `kept`.
        most: M, the width of the arrays.

    Returns:
        (P, M) uint32, UNUSED_ID where there is no id, and (P, M) float32 nats, NaN where unknown.
    """
    ids, logprobs = _nested(table[ID]), _nested(table[LOGPROB])
    id_TM = np.full((len(kept), most), UNUSED_ID, np.uint32)
    logprob_TM = np.full((len(kept), most), np.nan, np.float32)
    _fill(id_TM, ids, start)
    _fill(logprob_TM, logprobs, start)
    return {ID: id_TM[kept], LOGPROB: logprob_TM[kept]}


def _fill(array_TM: np.ndarray, column: _Nested, starts: np.ndarray) -> None:
    token = np.arange(len(column.counts)) - np.repeat(
        np.cumsum(column.tokens) - column.tokens, column.tokens
    )
    token += starts[column.row]
    place = np.arange(column.counts.sum()) - np.repeat(
        np.cumsum(column.counts) - column.counts, column.counts
    )
    values = column.values.to_numpy(zero_copy_only=False)
    array_TM[np.repeat(token, column.counts), place] = values


def _logprob_problems(ids: _Nested, logprobs: _Nested) -> list[tuple[int, str]]:
    """Logprobs must be beside the ids, one each, and be logarithms of probabilities."""
    both = ids.given & logprobs.given
    found = _at(both & (ids.tokens != logprobs.tokens), "behaviour logprobs of other tokens")
    if found:
        return found
    beside = ids.counts[both[ids.row]]
    uneven = (logprobs.counts != beside) & (logprobs.counts != 0)
    found = _at_rows(logprobs, uneven, "another number of behaviour logprobs than of ids")
    if len(logprobs.values):
        above = pc.greater(logprobs.values, 0).fill_null(False)
        found += _at_rows(logprobs, _any_in(logprobs, above), "a behaviour logprob above 0")
        never = pc.equal(logprobs.values, -np.inf).fill_null(False)
        found += _at_rows(logprobs, _any_in(logprobs, never), NO_PROBABILITY)
    return found


def _nested(column: pa.ChunkedArray) -> _Nested:
    outer = column.combine_chunks()
    inner = outer.flatten()
    counts = pc.list_value_length(inner).fill_null(0).to_numpy().astype(np.int64)
    return _Nested(
        given=outer.is_valid().to_numpy(zero_copy_only=False),
        tokens=pc.list_value_length(outer).fill_null(0).to_numpy().astype(np.int64),
        counts=counts,
        values=inner.flatten(),
    )


def _any_in(column: _Nested, bad: pa.Array) -> np.ndarray:
    """(T,) bool: one of a token's entries is bad."""
    token = np.repeat(np.arange(len(column.counts)), column.counts)
    counted = np.bincount(token, bad.to_numpy(zero_copy_only=False), len(column.counts))
    return counted > 0


def _at_rows(column: _Nested, bad: np.ndarray, problem: str) -> list[tuple[int, str]]:
    rows = np.unique(column.row[bad]).tolist()
    return [(row, f"{problem}, in {ID}") for row in rows]


def _at(bad: np.ndarray, problem: str) -> list[tuple[int, str]]:
    return [(row, f"{problem}, in {ID}") for row in np.flatnonzero(bad).tolist()]
