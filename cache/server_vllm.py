"""The protocol of a stock vLLM server: /v1/completions with prompt_logprobs, as JSON.

Each position of the prompt comes as an object of K entries by token id, or K + 1 where the token
that stands there is not among the K likeliest.
"""

import math
from typing import Any

import numpy as np

from stillroom.cache.server_protocol import TopK, check_topk, damaged, load_object
from stillroom.cache.teacher import ScoreRow

CLAMPED = -9999.0
"""What these servers write for minus infinity, which JSON has no word for."""
ENTRY_BYTES = 512
"""Of one entry: an id, a logprob, a rank, and the token's text."""
OTHER_BYTES = 1 << 20


class VllmProtocol:
    """See `server_protocol.ServerProtocol`.

    Args:
        vocab_size: ids are below it.
    """

    name = "vllm"
    health_path = "/health"
    score_path = "/v1/completions"
    lists_models = True
    most_topk: int | None = None

    def __init__(self, vocab_size: int) -> None:
        """Nothing is asked yet."""
        self._vocab_size = vocab_size

    def request(self, row: ScoreRow, topk: int, model: str | None) -> dict[str, Any]:
        """One prompt of ids; the token that must be generated after it is not looked at."""
        return {
            "model": model,
            "prompt": [row.token.tolist()],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": topk,
            "return_token_ids": True,
        }

    def most_bytes(self, row: ScoreRow, topk: int) -> int:
        """A generous share for each entry of each position."""
        return len(row.token) * (topk + 1) * ENTRY_BYTES + OTHER_BYTES

    def read(self, body: bytes, row: ScoreRow, topk: int, where: str) -> TopK:
        """See `server_protocol.ServerProtocol`."""
        listed = self._listed(load_object(body, where), row, where)
        tokens = row.token[row.targets].tolist()
        ids: list[int] = []
        logprobs: list[float] = []
        sampled: list[float] = []
        for index, token in zip(row.targets.tolist(), tokens, strict=True):
            entry = self._entry(listed[index], topk, f"{where}, token {index}")
            own = entry.get(token)
            if own is None:
                raise damaged(f"{where}, token {index}", f"an entry of its id {token}", "none")
            sampled.append(own)
            if len(entry) > topk:
                del entry[token]
            ids += entry
            logprobs += entry.values()
        shape = (len(tokens), topk)
        found = TopK(
            np.array(ids, np.int64).reshape(shape),
            _unclamped(logprobs).reshape(shape),
            _unclamped(sampled),
        )
        check_topk(found, row, self._vocab_size, where)
        return found

    def _listed(self, answer: dict[str, Any], row: ScoreRow, where: str) -> list[Any]:
        """An item for each token of the row."""
        choices = answer.get("choices")
        if not isinstance(choices, list):
            raise damaged(where, "a list of choices", type(choices).__name__)
        own = [c for c in choices if isinstance(c, dict) and c.get("index") == 0]
        if len(own) != 1 or len(choices) != 1:
            got = f"{len(own)} such among {len(choices)}"
            raise damaged(where, "one choice, of index 0", got)
        sent = own[0].get("prompt_token_ids")
        if sent is not None and sent != row.token.tolist():
            raise damaged(where, "scores of the ids that were sent", "those of others")
        listed = own[0].get("prompt_logprobs")
        if not isinstance(listed, list) or len(listed) != len(row.token):
            got = f"{len(listed)}" if isinstance(listed, list) else type(listed).__name__
            raise damaged(where, f"prompt_logprobs of {len(row.token)} tokens", got)
        return listed

    def _entry(self, entry: Any, topk: int, where: str) -> dict[int, float]:
        """Logprobs by id; NaN where the server gave null."""
        if not isinstance(entry, dict) or not topk <= len(entry) <= topk + 1:
            got = f"{len(entry)}" if isinstance(entry, dict) else type(entry).__name__
            raise damaged(where, f"{topk} or {topk + 1} entries", got)
        try:
            ids = [int(key) for key in entry]
            logprobs = [_number(value["logprob"]) for value in entry.values()]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise damaged(where, "logprobs by token id", f"{error!r}") from error
        if list(map(str, ids)) != list(entry) or not 0 <= min(ids) <= max(ids) < self._vocab_size:
            got = f"ids from {min(entry)} to {max(entry)}"
            raise damaged(where, f"token ids below {self._vocab_size}", got)
        return dict(zip(ids, logprobs, strict=True))


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (float, int):
        raise TypeError(f"{type(value).__name__} as a logprob")
    return float(value)


def _unclamped(logprobs: list[float]) -> np.ndarray:
    found = np.array(logprobs, np.float64)
    found[found == CLAMPED] = -np.inf
    return found
