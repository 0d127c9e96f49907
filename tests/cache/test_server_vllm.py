"""Answers of a stock vLLM server: what is read of a right one, and that no wrong one is."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.server_protocol import TopK
from stillroom.cache.server_vllm import VllmProtocol
from stillroom.cache.teacher import ScoreRow
from tests.cache.fake_server import vllm_answer
from tests.cache.fakes import VOCAB, FakeTeacher, log_softmax

TOKEN = [3, 1, 4, 1, 5, 9, 2, 6]
ROW = ScoreRow(np.array(TOKEN, np.uint32), np.array([2, 3, 7]))
TOPK = 5
PROTOCOL = VllmProtocol(VOCAB)
WHERE = "row 3, http://node"


def read(answer: Any) -> TopK:
    """What is read of an answer, given as bytes or as JSON."""
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return PROTOCOL.read(body, ROW, TOPK, WHERE)


def right() -> dict[str, Any]:
    """A whole answer."""
    return vllm_answer(FakeTeacher().logit_VV, TOKEN, TOPK)


def test_the_request_asks_for_the_ids_as_they_are() -> None:
    body = PROTOCOL.request(ROW, TOPK, "m")
    assert json.loads(json.dumps(body)) == {
        "model": "m",
        "prompt": [TOKEN],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": TOPK,
        "return_token_ids": True,
    }


@pytest.mark.parametrize("topk", [1, TOPK, VOCAB])
def test_the_likeliest_and_the_sampled_token_are_read(topk: int) -> None:
    logit_VV = FakeTeacher().logit_VV
    answer = vllm_answer(logit_VV, TOKEN, topk)
    listed = answer["choices"][0]["prompt_logprobs"]
    found = PROTOCOL.read(json.dumps(answer).encode(), ROW, topk, WHERE)
    logprob_PV = log_softmax(logit_VV)[[TOKEN[t - 1] for t in ROW.targets]]
    expected_id = np.argsort(-logprob_PV, axis=1)[:, :topk]
    assert (np.sort(found.topk_id, 1) == np.sort(expected_id, 1)).all()
    at_ids = np.take_along_axis(logprob_PV, found.topk_id, 1)
    np.testing.assert_allclose(found.topk_logprob, at_ids, rtol=1e-6)
    sampled = logprob_PV[np.arange(3), ROW.token[ROW.targets]]
    np.testing.assert_allclose(found.sampled_logprob, sampled, rtol=1e-6)
    assert {len(entry) for entry in listed[1:]} <= {topk, topk + 1}


def test_the_order_of_entries_says_nothing() -> None:
    answer = right()
    listed = answer["choices"][0]["prompt_logprobs"]
    expected = read(answer)
    listed[1:] = [dict(reversed(entry.items())) for entry in listed[1:]]
    found = read(answer)
    order = np.argsort(found.topk_id, 1), np.argsort(expected.topk_id, 1)
    for name in ("topk_id", "topk_logprob"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        pair = (np.take_along_axis(a, o, 1) for a, o in zip((mine, theirs), order, strict=True))
        assert (next(pair) == next(pair)).all()
    assert (found.sampled_logprob == expected.sampled_logprob).all()


def test_the_servers_word_for_minus_infinity_is_undone_and_only_it() -> None:
    logit_VV = np.zeros((VOCAB, VOCAB))
    logit_VV[:, 4:] = -np.inf
    logit_VV[:, 3] = -9998.5
    found = PROTOCOL.read(json.dumps(vllm_answer(logit_VV, TOKEN, TOPK)).encode(), ROW, TOPK, WHERE)
    logprobs = np.sort(found.topk_logprob, 1)
    assert np.isneginf(logprobs[:, 0]).all()
    assert (logprobs[:, 1] > -9999.7).all()
    assert np.isfinite(logprobs[:, 1:]).all()
    assert found.sampled_logprob.tolist() == pytest.approx([-math.inf, -math.log(3), -math.inf])


def test_no_number_is_read_as_nan() -> None:
    answer = right()
    entry = answer["choices"][0]["prompt_logprobs"][3]
    for value in entry.values():
        value["logprob"] = None
    found = read(answer)
    assert np.isnan(found.topk_logprob[1]).all()
    assert np.isfinite(found.topk_logprob[[0, 2]]).all()


def test_answers_without_the_sent_ids_are_known_by_their_entries() -> None:
    answer = right()
    del answer["choices"][0]["prompt_token_ids"]
    read(answer)
    other = vllm_answer(FakeTeacher().logit_VV, [7, *TOKEN[:-1]], 1)
    del other["choices"][0]["prompt_token_ids"]
    with pytest.raises(CorruptError, match=r"token 2: expected an entry of its id 4; got none"):
        PROTOCOL.read(json.dumps(other).encode(), ROW, 1, WHERE)


def choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Sets fields of the choice."""
    return lambda answer: answer["choices"][0].update(changes)


def entry(change: Callable[[dict[str, Any]], Any], at: int = 3) -> Callable[[dict[str, Any]], None]:
    """Puts something else in the place of a token's entries, or changes them."""

    def apply(answer: dict[str, Any]) -> None:
        listed = answer["choices"][0]["prompt_logprobs"]
        changed = change(listed[at])
        listed[at] = listed[at] if changed is None else changed

    return apply


def logprob(value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts something else in the place of one logprob."""
    return entry(lambda e: next(iter(e.values())).update(logprob=value))


def rename(new: str) -> Callable[[dict[str, Any]], None]:
    """Gives the likeliest token that is not the sampled one another id."""

    def change(e: dict[str, Any]) -> dict[str, Any]:
        old = next(key for key in e if key != str(TOKEN[3]))
        return {new if key == old else key: value for key, value in e.items()}

    return entry(change)


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no choices": lambda answer: answer.pop("choices"),
    "choices are no list": lambda answer: answer.update(choices={}),
    "an empty list": lambda answer: answer.update(choices=[]),
    "a choice that is none": lambda answer: answer.update(choices=[1]),
    "index 0 twice": lambda answer: answer["choices"].append(dict(answer["choices"][0])),
    "another choice": lambda answer: answer["choices"].append({"index": 1}),
    "another index": choice(index=1),
    "no logprobs": choice(prompt_logprobs=None),
    "logprobs are no list": choice(prompt_logprobs={}),
    "another id": choice(prompt_token_ids=[*TOKEN[:-1], 7]),
    "fewer ids": choice(prompt_token_ids=TOKEN[:-1]),
    "ids are no list": choice(prompt_token_ids=5),
    "one token fewer": lambda answer: answer["choices"][0]["prompt_logprobs"].pop(),
    "one token more": lambda answer: answer["choices"][0]["prompt_logprobs"].append({}),
    "entries are a list": entry(lambda e: []),
    "no entries": entry(lambda e: {}),
    "fewer entries": entry(lambda e: dict(list(e.items())[:3])),
    "more entries": entry(lambda e: {**e, "30": {"logprob": -90.0}, "31": {"logprob": -91.0}}),
    "an entry is a number": entry(lambda e: dict.fromkeys(e, -1.0)),
    "an entry without logprob": entry(lambda e: {key: {} for key in e}),
    "an id beyond the vocabulary": rename("40"),
    "a negative id": rename("-1"),
    "an id with a blank": rename(" 7"),
    "an id with a zero": rename("07"),
    "an id with a bar": rename("7_0"),
    "an id in other digits": rename("\u0663"),
    "an id that is a word": rename("x"),
    "a large id": rename("9" * 30),
    "an endless id": rename("9" * 5000),
    "a logprob in quotes": logprob("-1"),
    "a logprob that is true": logprob(True),
    "a logprob that is a list": logprob([]),
    "a logprob beyond floats": logprob(-(10**400)),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_refused(spoil: Callable[[dict[str, Any]], Any]) -> None:
    answer = right()
    spoil(answer)
    with pytest.raises(CorruptError, match=r"^row 3, http://node") as caught:
        read(answer)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"<html>busy</html>",
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"choices":' + b"9" * 5000 + b"}", id="endless"),
    ],
)
def test_bytes_that_are_no_answer_are_refused(body: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^row 3, http://node: expected "):
        read(body)


def test_every_cut_of_an_answer_is_refused() -> None:
    body = json.dumps(right()).encode()
    for end in range(0, len(body), 37):
        with pytest.raises(CorruptError):
            read(body[:end])


def test_a_sampled_token_above_the_least_entry_is_refused() -> None:
    """It would be among the K likeliest then: these are not the K likeliest."""
    answer = vllm_answer(FakeTeacher().logit_VV, TOKEN, TOPK)
    listed = answer["choices"][0]["prompt_logprobs"]
    outside = next(t for t in ROW.targets if len(listed[t]) == TOPK + 1)
    listed[outside][str(TOKEN[outside])]["logprob"] = -0.01
    with pytest.raises(CorruptError, match="none above the least"):
        read(answer)


def test_a_whole_answer_is_well_below_the_limit() -> None:
    assert len(json.dumps(right())) < PROTOCOL.most_bytes(ROW, TOPK) / 4
