"""What vLLM tells of a sequence's tokens, as arrays, and the scores of a row that follow from it.
Needs no vLLM.

Shapes: n tokens of a sequence, p of them scored, K entries, M extra ids.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillroom.cache.errors import NumericsError
from stillroom.cache.from_topk import scores_from_topk
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec

PADDING = -1
"""vLLM's id for no token."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at some tokens, in their order: column 0 is of the token itself, the others
    of the likeliest, in which it comes again if it is one of them."""

    token_id: np.ndarray
    """(tokens, 1 + K) whole numbers."""
    logprob: np.ndarray
    """(tokens, 1 + K) float32, nats."""


def from_flat(flat: Any, tokens: int, entries: int, where: str) -> TokenLogprobs:
    """vLLM's flat lists as arrays.

    Args:
        flat: vLLM's `FlatLogprobs`: `token_ids` and `logprobs`, all tokens end to end.
        tokens: how many tokens they are of.
        entries: K.
        where: the row, for messages.

    Raises:
        NumericsError: there are not 1 + K of them for each token.
    """
    found = np.array(flat.token_ids, np.int64), np.array(flat.logprobs, np.float32)
    shape = (tokens, 1 + entries)
    if {len(found[0]), len(found[1])} != {tokens * (1 + entries)}:
        raise _wrong(where, f"{shape[1]} logprobs for each of {tokens}", f"{len(found[1])} of them")
    return TokenLogprobs(found[0].reshape(shape), found[1].reshape(shape))


def score_row(found: TokenLogprobs, row: ScoreRow, spec: ScoreSpec, where: str) -> RowScores:
    """Scores of the targets of a row.

    Args:
        found: of all tokens of the row but the first, which nothing predicts.
        row: what the engine was given.
        spec: what is kept: K and the mass; a temperature of 1.
        where: the row, for messages.

    Raises:
        NumericsError: the engine answered for other tokens, or with NaN; names the row.
    """
    if found.logprob.shape != (len(row.token) - 1, 1 + spec.topk):
        expected = f"{1 + spec.topk} logprobs for each of {len(row.token) - 1}"
        raise _wrong(where, expected, f"the shape {found.logprob.shape}")
    token_id, logprob = found.token_id[row.targets - 1], found.logprob[row.targets - 1]
    other = np.flatnonzero(token_id[:, 0] != row.token[row.targets])
    if len(other):
        at = int(row.targets[other[0]])
        expected = f"a logprob of the submitted token {row.token[at]} at index {at}"
        raise _wrong(where, expected, f"one of token {token_id[other[0], 0]}")
    if token_id.min() < 0:
        raise _wrong(where, "ids of tokens", f"{token_id.min()}")
    return scores_from_topk(
        token_id[:, 1:], logprob[:, 1:], token_id[:, 0], logprob[:, 0], spec, where
    )


def extra_request(row: ScoreRow) -> tuple[np.ndarray, int]:
    """What asks vLLM for the scores of a row's extra ids.

    Returns:
        (tokens, M) int32, the ids for each token from the first target to the last token of the
        row, PADDING where there is none; and how many tokens before the first target there are that
        predict another one.
    """
    assert row.extra_id is not None
    start = int(row.targets[0]) - 1
    wanted = np.full((len(row.token) - 1 - start, row.extra_id.shape[1]), PADDING, np.int32)
    ids = row.extra_id.astype(np.int64)
    wanted[row.targets - 1 - start] = np.where(row.extra_id == UNUSED_ID, PADDING, ids)
    return wanted, start


def with_extra(scores: RowScores, found: Any, row: ScoreRow, where: str) -> RowScores:
    """Scores with those of the row's extra ids; the tail is at least what is known to be in it.

    Args:
        scores: without.
        found: (tokens, M) float32, nats: vLLM's answer to `extra_request`.
        row: what it was asked for.
        where: the row, for messages.

    Raises:
        NumericsError: the answer has another shape, or NaN.
    """
    assert row.extra_id is not None
    expected = (len(row.token) - int(row.targets[0]), row.extra_id.shape[1])
    if found is None or found.shape != expected:
        got = "none" if found is None else f"the shape {found.shape}"
        raise _wrong(where, f"logprobs of the extra ids, {expected}", got)
    logprob = np.asarray(found, np.float32)[row.targets - row.targets[0]]
    logprob = np.where(row.extra_id == UNUSED_ID, -np.inf, logprob)
    if np.isnan(logprob).any():
        raise _wrong(where, "finite logprobs of the extra ids", "NaN")
    with np.errstate(over="ignore"):
        half = np.minimum(logprob, 0).astype(np.float16)
    return replace(scores, extra_logprob=half, tail_logprob=_tail_with(scores, half, row))


def _tail_with(scores: RowScores, extra_logprob: np.ndarray, row: ScoreRow) -> np.ndarray:
    """(p,) float16: the tail, or the log of the probability of the tokens in it whose own is known
    where that is more: the sampled one and the extra ones, each once."""
    assert row.extra_id is not None
    ids = np.concatenate([row.token[row.targets, None], row.extra_id], 1)
    own = np.concatenate([scores.sampled_logprob[:, None], extra_logprob], 1, dtype=np.float64)
    for column, token_id in enumerate(ids.T):
        listed = (scores.topk_id == token_id[:, None]).any(1)
        again = (ids[:, :column] == token_id[:, None]).any(1)
        own[listed | again, column] = -np.inf
    with np.errstate(over="ignore"):
        known = np.logaddexp.reduce(own, axis=1).astype(np.float16)
    tail: np.ndarray = np.maximum(scores.tail_logprob, known)
    return tail


def _wrong(where: str, expected: str, got: str) -> NumericsError:
    return NumericsError(where, expected, got, "Report this engine and its version.")
