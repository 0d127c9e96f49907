"""Answers of TRL's scoring endpoint: what is read of a right one, and that no wrong one is."""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import CorruptError, NumericsError
from stillroom.cache.server_protocol import TopK
from stillroom.cache.server_trl import TrlProtocol
from stillroom.cache.teacher import ScoreRow
from tests.cache.fake_server import trl_answer
from tests.cache.fakes import VOCAB, FakeTeacher, log_softmax

TOKEN = [3, 1, 4, 1, 5, 9, 2, 6]
ROW = ScoreRow(np.array(TOKEN, np.uint32), np.array([2, 3, 7]))
TOPK = 5
PROTOCOL = TrlProtocol(VOCAB)


def read(answer: Any) -> TopK:
    """What is read of an answer."""
    return PROTOCOL.read(json.dumps(answer).encode(), ROW, TOPK, "row 3, http://node")


def right() -> dict[str, Any]:
    """A whole answer."""
    return trl_answer(FakeTeacher().logit_VV, TOKEN, 2, TOPK)


def array_of(answer: dict[str, Any], name: str, dtype: str) -> np.ndarray:
    """One array of an answer, writable."""
    return np.frombuffer(base64.b64decode(answer[name]), dtype).copy()


def put(answer: dict[str, Any], name: str, array: np.ndarray) -> None:
    """Put it back."""
    answer[name] = base64.b64encode(array.tobytes()).decode()


def test_the_request_scores_from_the_first_target_on() -> None:
    assert json.loads(json.dumps(PROTOCOL.request(ROW, TOPK, None))) == {
        "sequences": [TOKEN],
        "prompt_lengths": [2],
        "top_logprobs": TOPK,
        "temperature": 1.0,
        "response_format": "binary",
    }


def test_the_likeliest_and_the_sampled_token_are_read() -> None:
    found = read({**right(), "logprobs": None, "logprob_token_ids": None})
    logprob_PV = log_softmax(FakeTeacher().logit_VV)[[TOKEN[t - 1] for t in ROW.targets]]
    assert (found.topk_id == np.argsort(-logprob_PV, axis=1)[:, :TOPK]).all()
    at_ids = np.take_along_axis(logprob_PV, found.topk_id, 1)
    np.testing.assert_allclose(found.topk_logprob, at_ids, rtol=1e-6)
    sampled = logprob_PV[np.arange(3), ROW.token[ROW.targets]]
    np.testing.assert_allclose(found.sampled_logprob, sampled, rtol=1e-6)


def altered(name: str, dtype: str, at: int, value: float) -> Callable[[dict[str, Any]], None]:
    """Puts another number into an array."""

    def apply(answer: dict[str, Any]) -> None:
        array = array_of(answer, name, dtype)
        array[at] = value
        put(answer, name, array)

    return apply


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no shape": lambda answer: answer.pop("shape"),
    "another shape": lambda answer: answer.update(shape=[1, 6, TOPK + 1]),
    "a shape that is none": lambda answer: answer.update(shape="1"),
    "another length": lambda answer: answer.update(completion_lengths=[5]),
    "no lengths": lambda answer: answer.pop("completion_lengths"),
    "no logprobs": lambda answer: answer.pop("logprobs_b64"),
    "null": lambda answer: answer.update(token_ids_b64=None),
    "a number": lambda answer: answer.update(token_ids_b64=7),
    "not base64": lambda answer: answer.update(logprobs_b64="!" + answer["logprobs_b64"][1:]),
    "not ASCII": lambda answer: answer.update(logprobs_b64="\u00e9"),
    "cut": lambda answer: answer.update(logprobs_b64=answer["logprobs_b64"][:-4]),
    "longer": lambda answer: answer.update(actual_logprobs_b64=answer["actual_logprobs_b64"] * 2),
    "other ids": altered("actual_token_ids_b64", "<i4", 1, 30),
    "an id beyond the vocabulary": altered("token_ids_b64", "<i4", 0, VOCAB),
    "a negative id": altered("token_ids_b64", "<i4", 0, -1),
    "an id twice": lambda answer: put(answer, "token_ids_b64", np.zeros((6, TOPK), "<i4")),
    "above its entry": altered("actual_logprobs_b64", "<f4", 0, 5.0),
    "not in the entries": altered("actual_logprobs_b64", "<f4", 0, -1e-3),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_refused(spoil: Callable[[dict[str, Any]], Any]) -> None:
    answer = right()
    spoil(answer)
    with pytest.raises(CorruptError, match=r"^row 3, http://node"):
        read(answer)


@pytest.mark.parametrize(
    ("name", "at"), [("logprobs_b64", TOPK + 2), ("actual_logprobs_b64", 1)], ids=["top", "sampled"]
)
def test_minus_infinity_stands_for_what_the_server_does_not_know(name: str, at: int) -> None:
    answer = right()
    altered(name, "<f4", at, -np.inf)(answer)
    with pytest.raises(NumericsError, match=r"row 3, http://node, position 1: .*stand for NaN"):
        read(answer)


def test_a_whole_answer_is_below_the_limit() -> None:
    assert len(json.dumps(right())) < PROTOCOL.most_bytes(ROW, TOPK)
