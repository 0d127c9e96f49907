"""What a server's protocol is to those who speak it, and what must hold for its answers whatever
the protocol.

Shapes: p positions, K entries.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stillroom.cache.errors import CorruptError
from stillroom.cache.teacher import ScoreRow

SLACK = 1e-4
"""By how many nats two figures of one logprob may differ."""


@dataclass(frozen=True, slots=True)
class TopK:
    """What a server tells of a row."""

    topk_id: np.ndarray
    """(p, K) int64."""
    topk_logprob: np.ndarray
    """(p, K) float64, nats; NaN as the server gave it."""
    sampled_logprob: np.ndarray
    """(p,) float64, nats."""


class ServerProtocol(Protocol):
    """Requests and answers of one kind of server; pure."""

    name: str
    health_path: str
    score_path: str
    lists_models: bool
    """Whether it has /v1/models and /version."""
    most_topk: int | None
    """Entries a position that any such server gives; None where a setting of the server decides."""

    def request(self, row: ScoreRow, topk: int, model: str | None) -> dict[str, Any]:
        """The body that asks for a row's scores."""

    def most_bytes(self, row: ScoreRow, topk: int) -> int:
        """No whole answer for the row is longer."""

    def read(self, body: bytes, row: ScoreRow, topk: int, where: str) -> TopK:
        """The answer, checked for being whole and about the row's own tokens.

        Raises:
            CorruptError: it is not.
            NumericsError: the server says that it has no number for a logprob.
        """


def damaged(where: str, expected: str, got: str) -> CorruptError:
    """The error of an answer that is not what the protocol says."""
    do = "Check the server's version, and what lies between it and this machine."
    return CorruptError(where, expected, f"{got:.200}", do)


def load_object(body: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptError: the bytes are none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "JSON", f"{len(body)} bytes that are not: {error}") from error
    if not isinstance(value, dict):
        raise damaged(where, "a JSON object", type(value).__name__)
    return value


def check_topk(found: TopK, row: ScoreRow, vocab_size: int, where: str) -> None:
    """Each position has K different ids of the vocabulary, and the sampled token's logprob is that
    of its entry, or at most the least. NaN is no concern of this check.

    Raises:
        CorruptError: names the first position where that is not so.
    """
    ids = found.topk_id
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        got = f"ids from {ids.min()} to {ids.max()}"
        raise damaged(where, f"token ids below {vocab_size}", got)
    in_order = np.sort(ids, axis=1)
    _refuse((in_order[:, 1:] == in_order[:, :-1]).any(1), where, "different ids", "one twice")
    is_sampled = ids == row.token[row.targets][:, None]
    listed = np.where(is_sampled, found.topk_logprob, 0).sum(1)
    with np.errstate(invalid="ignore"):
        apart = np.abs(listed - found.sampled_logprob) > SLACK
        above = found.sampled_logprob > found.topk_logprob.min(1) + SLACK
    wrong = np.where(is_sampled.any(1), apart, above)
    expected = "the sampled token's logprob in its entry, or none above the least of them"
    _refuse(wrong, where, expected, "another")


def _refuse(wrong: np.ndarray, where: str, expected: str, got: str) -> None:
    if wrong.any():
        raise damaged(f"{where}, position {int(np.flatnonzero(wrong)[0])}", expected, got)
