"""What a step gets: packed rows with the teacher's scores, as NumPy arrays.

Shapes: T tokens of a micro-batch, R rows in it, P scored positions, K teacher entries, M extra ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.cache.schema import Arrays

EXTRA_DTYPES: dict[str, type] = {
    "extra_id": np.int64,
    "extra_logprob": np.float32,
    "extra_behaviour_logprob": np.float32,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence with its scores."""

    number: int
    """Its number in the snapshot."""
    arrays: Arrays
    """Every column of this one sequence."""
    sampling_temperature: float
    """Temperature of its behaviour logprobs; NaN if unknown."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid end to end."""

    token: np.ndarray
    """(T,) int64."""
    position_id: np.ndarray
    """(T,) int64: restarts at 0 with every row."""
    row_start: np.ndarray
    """(R + 1,) int32: first token of each row; the last entry is T."""
    predict_index: np.ndarray
    """(P,) int64: index of the token whose hidden state predicts the position; one before the token
    that it scores."""
    sampled_id: np.ndarray
    """(P,) int64: the token that it scores."""
    topk_id: np.ndarray
    """(P, K) int64; unused entries are 2**32 - 1."""
    topk_logprob: np.ndarray
    """(P, K) float32 nats; -inf where unused."""
    tail_logprob: np.ndarray
    """(P,) float32 nats."""
    sampled_logprob: np.ndarray
    """(P,) float32 nats, the teacher's."""
    behaviour_logprob: np.ndarray
    """(P,) float32 nats; NaN where unknown."""
    policy_version: np.ndarray
    """(P,) int64: oldest policy that sampled the row; -1 if unknown."""
    sampling_temperature: np.ndarray
    """(P,) float32; NaN if unknown, and then `behaviour_logprob` compares with nothing."""
    source: np.ndarray
    """(P,) int64: index into schema.SOURCES."""
    row: np.ndarray
    """(P,) int64: number in the snapshot of the position's row."""
    extra_id: np.ndarray
    """(P, M) int64: ids that the student chose, or draws from the teacher's tail, as the cache's
    identity says; M is 0 without them. Unused ones are 2**32 - 1. No loss here uses them."""
    extra_logprob: np.ndarray
    """(P, M) float32 nats, the teacher's; -inf where unused."""
    extra_behaviour_logprob: np.ndarray
    """(P, M) float32 nats: of the policy that chose them, or of the draw given the tail; NaN where
    unknown or unused."""

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.sampled_id)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of one step."""

    epoch: int
    first: int
    """g of the step's first row: where the step begins in its epoch."""
    rows: tuple[int, ...]
    """Snapshot rows of the whole step, all ranks, in replay order."""
    num_positions: int
    """N, scored tokens of the whole step, all ranks: what the loss is divided by."""
    micro_batches: tuple[MicroBatch | None, ...]
    """This rank's; None is one that only keeps step with the other ranks."""


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Lay rows end to end."""
    lengths = [len(row.arrays["token"]) for row in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    scored = [np.flatnonzero(row.arrays["scored"]) for row in rows]
    target = np.concatenate([s + start for s, start in zip(scored, starts, strict=False)])
    token = _joined(rows, "token", np.int64)
    counts = [len(s) for s in scored]
    return MicroBatch(
        token=token,
        position_id=np.concatenate([np.arange(n) for n in lengths]),
        row_start=starts.astype(np.int32),
        predict_index=target - 1,
        sampled_id=token[target],
        topk_id=_joined(rows, "topk_id", np.int64),
        topk_logprob=_joined(rows, "topk_logprob", np.float32),
        tail_logprob=_joined(rows, "tail_logprob", np.float32),
        sampled_logprob=_joined(rows, "sampled_logprob", np.float32),
        behaviour_logprob=_joined(rows, "behaviour_logprob", np.float32),
        policy_version=np.repeat([int(r.arrays["policy_version_min"][0]) for r in rows], counts),
        sampling_temperature=np.repeat([np.float32(r.sampling_temperature) for r in rows], counts),
        source=np.repeat([int(r.arrays["source"][0]) for r in rows], counts),
        row=np.repeat([r.number for r in rows], counts),
        **_extra_columns(rows, sum(counts)),
    )


def idle_micro_batch() -> MicroBatch:
    """One token and nothing scored but a dummy: for a rank that must only keep step."""
    zero, none = np.zeros(1, np.int64), np.zeros((1, 0))
    nan = np.full(1, np.nan, np.float32)
    return MicroBatch(
        token=zero,
        position_id=zero,
        row_start=np.array([0, 1], np.int32),
        predict_index=zero,
        sampled_id=zero,
        topk_id=none.astype(np.int64),
        topk_logprob=none.astype(np.float32),
        tail_logprob=nan,
        sampled_logprob=nan,
        behaviour_logprob=nan,
        policy_version=zero,
        sampling_temperature=np.ones(1, np.float32),
        source=zero,
        row=zero,
        **_extra_columns([], 1),
    )


def _extra_columns(rows: Sequence[Row], positions: int) -> dict[str, np.ndarray]:
    if not any(name in row.arrays for row in rows for name in EXTRA_DTYPES):
        return {name: np.zeros((positions, 0), dtype) for name, dtype in EXTRA_DTYPES.items()}
    return {name: _joined(rows, name, dtype) for name, dtype in EXTRA_DTYPES.items()}


def _joined(rows: Sequence[Row], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([row.arrays[name] for row in rows]).astype(dtype)
