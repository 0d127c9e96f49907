"""vLLM's answers as arrays: which token they are of, what is kept, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import NumericsError
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import ScoreRow, ScoreSpec
from stillroom.cache.vllm_logprobs import (
    PADDING,
    TokenLogprobs,
    extra_request,
    from_flat,
    score_row,
    with_extra,
)
from tests.cache.fakes import dense_scores, log_softmax, same_bits

VOCAB = 30
TOPK = 4
ROW = ScoreRow(np.array([3, 1, 4, 1, 5, 9], np.uint32), np.array([2, 3, 5]))
RNG = np.random.default_rng(0)
LOGPROB_TV = log_softmax(RNG.normal(0, 2, (len(ROW.token) - 1, VOCAB))).astype(np.float32)


def answer(topk: int = TOPK) -> TokenLogprobs:
    """What an engine says whose logprobs are `LOGPROB_TV`."""
    order = np.argsort(-LOGPROB_TV, axis=1)[:, :topk]
    ids = np.concatenate([ROW.token[1:, None].astype(np.int64), order], axis=1)
    return TokenLogprobs(ids, np.take_along_axis(LOGPROB_TV, ids, axis=1))


def flat(found: TokenLogprobs) -> Any:
    """The same as vLLM's lists."""
    lists = (found.token_id.ravel().tolist(), found.logprob.ravel().tolist())
    return SimpleNamespace(token_ids=lists[0], logprobs=lists[1])


@pytest.mark.parametrize("mass", [1.0, 0.6])
def test_scores_are_those_of_the_targets(mass: float) -> None:
    scores = score_row(answer(), ROW, ScoreSpec(topk=TOPK, mass=mass), "row 0")
    targets = ROW.targets
    dense = dense_scores(LOGPROB_TV[targets - 1], ROW.token[targets], TOPK, mass)
    assert same_bits(scores.topk_id, dense.topk_id)
    assert same_bits(scores.topk_logprob, dense.topk_logprob)
    assert same_bits(scores.topk_count, dense.topk_count)
    assert np.abs(scores.sampled_logprob - dense.sampled_logprob).max() < 1e-6
    assert np.abs(scores.tail_logprob - dense.tail_logprob).max() <= 2**-9
    assert scores.extra_logprob is None


def test_lists_become_the_same_arrays() -> None:
    found = from_flat(flat(answer()), len(ROW.token) - 1, TOPK, "row 0")
    assert same_bits(found.token_id, answer().token_id)
    assert same_bits(found.logprob, answer().logprob)


@pytest.mark.parametrize("cut", ["token_ids", "logprobs"])
def test_short_lists_are_refused(cut: str) -> None:
    lists = flat(answer())
    getattr(lists, cut).pop()
    with pytest.raises(NumericsError, match=r"row 7: expected 5 logprobs for each of 5"):
        from_flat(lists, 5, TOPK, "row 7")


def test_answers_for_other_tokens_are_refused() -> None:
    shifted = answer()
    shifted.token_id[:, 0] = np.roll(shifted.token_id[:, 0], 1)
    with pytest.raises(NumericsError, match=r"row 7: expected a logprob of the submitted token 4"):
        score_row(shifted, ROW, ScoreSpec(topk=TOPK), "row 7")
    unscored = answer()
    unscored.token_id[0, 0] += 1
    score_row(unscored, ROW, ScoreSpec(topk=TOPK), "row 7")


@pytest.mark.parametrize("change", ["nan", "above", "shape", "id"])
def test_what_no_engine_should_say(change: str) -> None:
    found = answer(TOPK + 1) if change == "shape" else answer()
    if change == "nan":
        found.logprob[1, 2] = np.nan
    if change == "above":
        found.logprob[2, 0] = 0.5
    if change == "id":
        found.token_id[1, 2] = -1
    with pytest.raises(NumericsError, match="row 7"):
        score_row(found, ROW, ScoreSpec(topk=TOPK), "row 7")


def test_extra_ids_are_asked_for_and_come_back() -> None:
    extra = np.array([[7, UNUSED_ID], [8, 2], [UNUSED_ID, UNUSED_ID]], np.uint32)
    row = ScoreRow(ROW.token, ROW.targets, extra)
    wanted, start = extra_request(row)
    assert start == 1
    expected = [[7, PADDING], [8, 2], [PADDING, PADDING], [PADDING, PADDING]]
    assert wanted.tolist() == expected
    assert wanted.dtype == np.int32
    assert len(wanted) == len(ROW.token) - 1 - start
    ids = np.where(wanted == PADDING, 0, wanted)
    logprob = np.take_along_axis(LOGPROB_TV[start:], ids, 1)
    logprob[wanted == PADDING] = -np.inf
    plain = score_row(answer(), row, ScoreSpec(topk=TOPK), "row 0")
    scores = with_extra(plain, logprob, row, "row 0")
    at = LOGPROB_TV[ROW.targets - 1]
    expected_logprob = [[at[0, 7], -np.inf], [at[1, 8], at[1, 2]], [-np.inf, -np.inf]]
    assert scores.extra_logprob is not None
    assert scores.extra_logprob.tolist() == np.array(expected_logprob, np.float16).tolist()
    assert same_bits(scores.topk_id, plain.topk_id)
    for bad in (None, logprob[1:], np.where(wanted == 7, np.nan, logprob)):
        with pytest.raises(NumericsError, match="extra ids"):
            with_extra(plain, bad, row, "row 0")


def test_the_tail_holds_the_extra_ids_that_are_in_it() -> None:
    """Where float32 leaves nothing of 1; each of them counts once, and those that are listed do
    not."""
    rare = np.float32(-16.0)
    listed = np.log(np.full((3, TOPK), 0.25, np.float32))
    token_id = np.tile(np.arange(10, 10 + TOPK), (3, 1))
    sampled = ROW.token[ROW.targets].astype(np.int64)
    ids = np.full((len(ROW.token) - 1, 1 + TOPK), 10)
    logprob = np.full(ids.shape, -9.0, np.float32)
    ids[ROW.targets - 1] = np.concatenate([sampled[:, None], token_id], 1)
    logprob[ROW.targets - 1] = np.concatenate([np.full((3, 1), rare), listed], 1)
    ids[:, 0] = ROW.token[1:]
    extra = np.array([[7, 8], [sampled[1], 8], [11, UNUSED_ID]], np.uint32)
    row = ScoreRow(ROW.token, ROW.targets, extra)
    plain = score_row(TokenLogprobs(ids, logprob), row, ScoreSpec(topk=TOPK), "row 0")
    assert plain.tail_logprob.tolist() == [rare] * 3
    found = np.full((len(ROW.token) - 2, 2), rare)
    found[-1, 0] = listed[0, 0]
    scores = with_extra(plain, found, row, "row 0")
    expected = rare + np.log([3.0, 2.0, 1.0])
    assert np.allclose(scores.tail_logprob, expected, 0, 2**-6)
