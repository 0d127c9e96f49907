"""What other systems call the fields of a rollout: for each a mapping of names, or a function from
one of their records to rows.

Every one is of token ids. Dumps of text alone cannot be imported: ids are never made from text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Layout = Callable[[Record], list[dict[str, Any]]]


def renamed(columns: Mapping[str, str]) -> Layout:
    """Rows whose columns have other names: a part's name to theirs."""

    def rows(record: Record) -> list[dict[str, Any]]:
        return [{ours: record.get(theirs) for ours, theirs in columns.items()}]

    return rows


def verl_batch(record: Record) -> list[dict[str, Any]]:
    """One row of verl's DataProto batch: prompts padded on the left, responses on the right."""
    padded, real = list(record["prompts"]), list(record["attention_mask"])
    prompt = _where(padded, real[: len(padded)])

    def unpadded(name: str) -> list[Any] | None:
        values = record.get(name)
        return None if values is None else _where(values, real[len(padded) :])

    return [
        {
            "prompt": prompt,
            "completion": unpadded("responses"),
            "scored": unpadded("response_mask"),
            "behaviour_logprob": unpadded("rollout_log_probs"),
            "group": record.get("uid"),
        }
    ]


def sglang(record: Record) -> list[dict[str, Any]]:
    """What SGLang's `/generate` answers, with the `input_ids` of its request beside it."""
    meta = record["meta_info"]
    drawn = meta.get("output_token_logprobs")
    completion = record.get("output_ids") or [entry[1] for entry in drawn]
    reason = meta.get("finish_reason") or {}
    return [
        {
            "prompt": record["input_ids"],
            "completion": completion,
            "behaviour_logprob": drawn and [entry[0] for entry in drawn],
            "finish_reason": reason.get("type"),
            "ends_with_stop": reason.get("matched") in completion[-1:],
        }
    ]


def vllm(record: Record) -> list[dict[str, Any]]:
    """One of vLLM's RequestOutput as a mapping, with a row for each of its outputs."""
    rows = []
    for output in record["outputs"]:
        ids, logprobs = list(output["token_ids"]), output.get("logprobs")
        reason, stop = output.get("finish_reason"), output.get("stop_reason")
        rows.append(
            {
                "prompt": record["prompt_token_ids"],
                "completion": ids,
                "behaviour_logprob": logprobs
                and [_of_id(entry, i) for entry, i in zip(logprobs, ids, strict=True)],
                "finish_reason": reason,
                "ends_with_stop": reason == "stop" and not isinstance(stop, str),
            }
        )
    return rows


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
    found = entry[str(token)] if str(token) in entry else entry[token]  # type: ignore[index]
    return float(found["logprob"] if isinstance(found, Mapping) else found)
