"""What other systems call the fields of a rollout: for each a mapping of names, or a function from
one of their records to rows.

Every one is of token ids. Dumps of text alone cannot be imported: ids are never made from text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillroom.cache.errors import first_line
from stillroom.cache.foreign_rows import Unreadable

Record = Mapping[str, Any]
Row = dict[str, Any] | Unreadable
Layout = Callable[[Record], list[Row]]
OTHER_RECORD = (LookupError, TypeError, ValueError, AttributeError)
"""What a layout raises for a record that is not its."""


def not_of_layout(error: Exception) -> Unreadable:
    """Why a record, or a row of one, is of another layout."""
    if isinstance(error, KeyError):
        return Unreadable(f"another layout: no field {error}")
    return Unreadable(f"another layout: {type(error).__name__}: {first_line(error)}")


def renamed(columns: Mapping[str, str]) -> Layout:
    """Rows whose columns have other names: a part's name to theirs. `prompt` and `completion` must
    be there."""

    def rows(record: Record) -> list[Row]:
        row = {ours: record.get(theirs) for ours, theirs in columns.items()}
        return [row | {ours: record[columns[ours]] for ours in ("prompt", "completion")}]

    return rows


def verl_batch(record: Record) -> list[Row]:
    """One row of verl's DataProto batch: prompts padded on the left, responses on the right."""
    padded, real = list(record["prompts"]), list(record["attention_mask"])
    prompt = _where(padded, real[: len(padded)])
    completion = _where(record["responses"], real[len(padded) :])

    def unpadded(name: str) -> list[Any] | None:
        values = record.get(name)
        return None if values is None else _where(values, real[len(padded) :])

    return [
        {
            "prompt": prompt,
            "completion": completion,
            "scored": unpadded("response_mask"),
            "behaviour_logprob": unpadded("rollout_log_probs"),
            "group": record.get("uid"),
        }
    ]


def sglang(record: Record) -> list[Row]:
    """What SGLang's `/generate` answers, with the `input_ids` of its request beside it."""
    meta = record["meta_info"]
    drawn = meta.get("output_token_logprobs") or []
    completion = record.get("output_ids") or [entry[1] for entry in drawn]
    reason = meta.get("finish_reason") or {}
    return [
        {
            "prompt": record["input_ids"],
            "completion": completion,
            "behaviour_logprob": [entry[0] for entry in drawn] or None,
            "finish_reason": reason.get("type"),
            "ends_with_stop": reason.get("matched") in completion[-1:],
        }
    ]


def vllm(record: Record) -> list[Row]:
    """One of vLLM's RequestOutput as a mapping, with a row for each of its outputs."""
    prompt, rows = record["prompt_token_ids"], list[Row]()
    for output in record["outputs"]:
        try:
            rows.append(_vllm_output(prompt, output))
        except OTHER_RECORD as error:
            rows.append(not_of_layout(error))
    return rows


def _vllm_output(prompt: Any, output: Record) -> Row:
    ids, logprobs = list(output["token_ids"]), output.get("logprobs") or []
    pairs = zip(logprobs, ids, strict=True) if logprobs else ()
    reason, stop = output.get("finish_reason"), output.get("stop_reason")
    return {
        "prompt": prompt,
        "completion": ids,
        "behaviour_logprob": [_of_id(entry, i) for entry, i in pairs] or None,
        "finish_reason": reason,
        "ends_with_stop": reason == "stop" and not isinstance(stop, str),
    }


LAYOUTS: dict[str, Layout] = {
    "verl": renamed(
        {
            "prompt": "prompt_ids",
            "completion": "response_ids",
            "scored": "response_mask",
            "behaviour_logprob": "response_logprobs",
        }
    ),
    "verl-batch": verl_batch,
    "trl": renamed(
        {
            "prompt": "prompt_ids",
            "completion": "completion_ids",
            "scored": "env_mask",
            "behaviour_logprob": "logprobs",
        }
    ),
    "sglang": sglang,
    "vllm": vllm,
}
"""verl: an AgentLoopOutput; trl: what a rollout function returns, one row a completion."""


def _where(values: Sequence[Any], mask: Sequence[Any]) -> list[Any]:
    return [value for value, real in zip(values, mask, strict=True) if real]


def _of_id(entry: Record, token: int) -> float:
    """JSON has made strings of the ids; a logprob stands in an object of its own."""
    found = entry[str(token)] if str(token) in entry else entry.get(token)  # type: ignore[call-overload]
    if found is None:
        raise ValueError(f"no logprob of token {token}")
    return float(found["logprob"] if isinstance(found, Mapping) else found)
