"""The protocol of the scoring endpoint of TRL 1.1 to 1.10: /get_sequence_logprobs/, whose arrays
come as base64.

Shapes: T tokens from the first that is scored, K entries.
"""

import base64
from typing import Any

import numpy as np

from stillroom.cache.errors import NumericsError
from stillroom.cache.server_protocol import TopK, check_topk, damaged, load_object
from stillroom.cache.teacher import ScoreRow

MOST_TOPK = 20
"""vLLM's own limit, which these servers do not change: one that is asked for more never answers
again."""
FLOAT, INT = np.dtype("<f4"), np.dtype("<i4")


class TrlProtocol:
    """See `server_protocol.ServerProtocol`.

    Args:
        vocab_size: ids are below it.
    """

    name = "trl"
    health_path = "/health/"
    score_path = "/get_sequence_logprobs/"
    lists_models = False
    most_topk: int | None = MOST_TOPK

    def __init__(self, vocab_size: int) -> None:
        """Nothing is asked yet."""
        self._vocab_size = vocab_size

    def request(self, row: ScoreRow, topk: int, model: str | None) -> dict[str, Any]:
        """One sequence; all before its first scored token counts as prompt."""
        return {
            "sequences": [row.token.tolist()],
            "prompt_lengths": [int(row.targets[0])],
            "top_logprobs": topk,
            "temperature": 1.0,
            "response_format": "binary",
        }

    def most_bytes(self, row: ScoreRow, topk: int) -> int:
        """Twice what base64 takes for an id and a logprob of each entry, and room for the rest."""
        return len(row.token) * (topk + 1) * 24 + (64 << 10)

    def read(self, body: bytes, row: ScoreRow, topk: int, where: str) -> TopK:
        """See `server_protocol.ServerProtocol`."""
        answer = load_object(body, where)
        first = int(row.targets[0])
        tokens = len(row.token) - first
        for name, expected in (("shape", [1, tokens, topk]), ("completion_lengths", [tokens])):
            if answer.get(name) != expected:
                raise damaged(where, f"{name} {expected}", f"{answer.get(name)}")
        actual_id = _array(answer, "actual_token_ids_b64", INT, (tokens, 1), where)[:, 0]
        if (actual_id != row.token[first:]).any():
            raise damaged(where, "scores of the ids that were sent", "those of others")
        picked = row.targets - first
        actual = _array(answer, "actual_logprobs_b64", FLOAT, (tokens, 1), where)[picked, 0]
        topk_id = _array(answer, "token_ids_b64", INT, (tokens, topk), where)[picked]
        topk_logprob = _array(answer, "logprobs_b64", FLOAT, (tokens, topk), where)[picked]
        _refuse_unknown(np.column_stack([actual, topk_logprob]), where)
        found = TopK(
            topk_id.astype(np.int64), topk_logprob.astype(np.float64), actual.astype(np.float64)
        )
        check_topk(found, row, self._vocab_size, where)
        return found


def _array(
    answer: dict[str, Any], name: str, dtype: np.dtype[Any], shape: tuple[int, int], where: str
) -> np.ndarray:
    try:
        data = base64.b64decode(answer.get(name, ""), validate=True)
    except (ValueError, TypeError) as error:
        raise damaged(where, f"{name} in base64", f"{error!r}") from error
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) != expected:
        raise damaged(where, f"{expected} bytes of {name}", f"{len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _refuse_unknown(logprob: np.ndarray, where: str) -> None:
    unknown = np.isneginf(logprob).any(1)
    if unknown.any():
        raise NumericsError(
            f"{where}, position {int(np.flatnonzero(unknown)[0])}",
            "finite logprobs of the sampled token and the likeliest ones",
            "-inf, with which these servers stand for NaN and for what they do not have",
            "Check the server's weights and its dtype.",
        )
