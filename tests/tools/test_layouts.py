"""Records as other systems write them become rows, checked on one of each kind."""

from typing import Any

import pytest

from stillroom.cache.foreign_rows import Unreadable
from stillroom.tools.layouts import LAYOUTS, not_of_layout

VERL = {
    "prompt_ids": [1, 2],
    "response_ids": [3, 4, 9, 5],
    "response_mask": [1, 1, 0, 1],
    "response_logprobs": [-0.5, -0.25, 0.0, -1.0],
    "num_turns": 4,
    "metrics": {"generate_sequences": 0.5, "tool_calls": 0.1},
    "extra_fields": {},
}
VERL_BATCH = {
    "prompts": [0, 0, 1, 2],
    "responses": [3, 4, 9, 5, 0],
    "response_mask": [1, 1, 0, 1, 0],
    "input_ids": [0, 0, 1, 2, 3, 4, 9, 5, 0],
    "attention_mask": [0, 0, 1, 1, 1, 1, 1, 1, 0],
    "position_ids": [0, 0, 0, 1, 2, 3, 4, 5, 6],
    "rollout_log_probs": [-0.5, -0.25, 0.0, -1.0, 0.0],
    "uid": "5e1f",
}
TRL = {
    "prompt_ids": [1, 2],
    "completion_ids": [3, 4, 9, 5],
    "logprobs": [-0.5, -0.25, 0.0, -1.0],
    "env_mask": [1, 1, 0, 1],
    "reward": 1.0,
}
SGLANG: dict[str, Any] = {
    "input_ids": [1, 2],
    "text": "ab",
    "output_ids": [3, 4, 7],
    "meta_info": {
        "id": "c0ffee",
        "finish_reason": {"type": "stop", "matched": 7},
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "output_token_logprobs": [[-0.5, 3, None], [-0.25, 4, None], [-1.0, 7, None]],
        "weight_version": "default",
    },
}
VLLM: dict[str, Any] = {
    "request_id": "0",
    "prompt": "hi",
    "prompt_token_ids": [1, 2],
    "prompt_logprobs": None,
    "outputs": [
        {
            "index": 0,
            "text": "ab",
            "token_ids": [3, 7],
            "cumulative_logprob": -1.5,
            "logprobs": [
                {"3": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}},
                {"8": {"logprob": -0.1, "rank": 1}, "7": {"logprob": -1.0, "rank": 2}},
            ],
            "finish_reason": "stop",
            "stop_reason": None,
        },
        {
            "index": 1,
            "text": "abc",
            "token_ids": [3, 4, 5],
            "cumulative_logprob": None,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        },
    ],
    "finished": True,
}
TURNS = {
    "prompt": [1, 2],
    "completion": [3, 4, 9, 5],
    "scored": [1, 1, 0, 1],
    "behaviour_logprob": [-0.5, -0.25, 0.0, -1.0],
}


def laid_out(layout: str, record: Any) -> list[Any]:
    """Rows of a record."""
    return list(LAYOUTS[layout](record))


@pytest.mark.parametrize(
    ("layout", "record", "rows"),
    [
        ("verl", VERL, [TURNS]),
        ("verl-batch", VERL_BATCH, [TURNS | {"group": "5e1f"}]),
        ("trl", TRL, [TURNS]),
        (
            "sglang",
            SGLANG,
            [
                {
                    "prompt": [1, 2],
                    "completion": [3, 4, 7],
                    "behaviour_logprob": [-0.5, -0.25, -1.0],
                    "finish_reason": "stop",
                    "ends_with_stop": True,
                }
            ],
        ),
        (
            "vllm",
            VLLM,
            [
                {
                    "prompt": [1, 2],
                    "completion": [3, 7],
                    "behaviour_logprob": [-0.5, -1.0],
                    "finish_reason": "stop",
                    "ends_with_stop": True,
                },
                {
                    "prompt": [1, 2],
                    "completion": [3, 4, 5],
                    "behaviour_logprob": None,
                    "finish_reason": "length",
                    "ends_with_stop": False,
                },
            ],
        ),
    ],
)
def test_a_record_becomes_rows(
    layout: str, record: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    assert laid_out(layout, record) == rows


def test_what_is_not_written_is_left_open() -> None:
    bare = {name: VERL_BATCH[name] for name in ("prompts", "responses", "attention_mask")}
    (row,) = laid_out("verl-batch", bare)
    assert {n for n, v in row.items() if v is None} == {"scored", "behaviour_logprob", "group"}
    (row,) = laid_out("trl", {"prompt_ids": [1], "completion_ids": [2]})
    assert (row["scored"], row["behaviour_logprob"]) == (None, None)


def test_sglang_without_ids_or_without_logprobs() -> None:
    (row,) = laid_out("sglang", {name: SGLANG[name] for name in ("input_ids", "meta_info")})
    assert row["completion"] == [3, 4, 7]
    reason = {"type": "length", "length": 3}
    (row,) = laid_out("sglang", SGLANG | {"meta_info": {"finish_reason": reason}})
    assert (row["behaviour_logprob"], row["finish_reason"]) == (None, "length")
    assert not row["ends_with_stop"]


@pytest.mark.parametrize("ids", [{}, {"output_ids": []}])
def test_an_aborted_request_of_sglang_has_an_empty_completion(ids: dict[str, Any]) -> None:
    aborted: dict[str, Any] = {"finish_reason": {"type": "abort", "message": "m"}}
    for meta in (aborted, aborted | {"output_token_logprobs": []}):
        (row,) = laid_out("sglang", {"input_ids": [1], "meta_info": meta} | ids)
        assert (row["completion"], row["behaviour_logprob"]) == ([], None)
        assert row["finish_reason"] == "abort"


@pytest.mark.parametrize("logprobs", [None, []])
def test_no_logprobs_are_unknown_ones(logprobs: Any) -> None:
    meta = SGLANG["meta_info"] | {"output_token_logprobs": logprobs}
    (row,) = laid_out("sglang", SGLANG | {"meta_info": meta})
    assert (row["completion"], row["behaviour_logprob"]) == ([3, 4, 7], None)
    output = {"token_ids": [3], "logprobs": logprobs}
    (row,) = laid_out("vllm", {"prompt_token_ids": [1], "outputs": [output]})
    assert row["behaviour_logprob"] is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_that_is_missing_is_named(layout: str) -> None:
    records = {"verl": VERL, "verl-batch": VERL_BATCH, "trl": TRL, "sglang": SGLANG, "vllm": VLLM}
    needed = {
        "verl": ("prompt_ids", "response_ids"),
        "verl-batch": ("prompts", "responses", "attention_mask"),
        "trl": ("prompt_ids", "completion_ids"),
        "sglang": ("input_ids", "meta_info"),
        "vllm": ("prompt_token_ids", "outputs"),
    }
    for name in needed[layout]:
        record = {n: value for n, value in records[layout].items() if n != name}
        with pytest.raises(KeyError) as caught:
            laid_out(layout, record)
        assert not_of_layout(caught.value).reason == f"another layout: no field {name!r}"


def test_a_token_without_its_logprob_is_named() -> None:
    outputs = [{"token_ids": [3], "logprobs": [{"8": {"logprob": -0.1}}]}, {"token_ids": [4]}]
    bad, good = laid_out("vllm", {"prompt_token_ids": [1], "outputs": outputs})
    assert bad == Unreadable("another layout: ValueError: no logprob of token 3")
    assert good["completion"] == [4]


def test_a_stop_string_is_no_stop_token() -> None:
    output = VLLM["outputs"][0] | {"stop_reason": "\n\n"}
    (row,) = laid_out("vllm", VLLM | {"outputs": [output]})
    assert (row["finish_reason"], row["ends_with_stop"]) == ("stop", False)
    meta = SGLANG["meta_info"] | {"finish_reason": {"type": "stop", "matched": "\n\n"}}
    (row,) = laid_out("sglang", SGLANG | {"meta_info": meta})
    assert not row["ends_with_stop"]


def test_ids_of_python_are_found_like_those_of_json() -> None:
    output = {"token_ids": (3,), "logprobs": [{3: {"logprob": -0.5}}]}
    (row,) = laid_out("vllm", {"prompt_token_ids": [1], "outputs": [output]})
    assert row["behaviour_logprob"] == [-0.5]
