"""Scores as they are stored: rounded, and each position's entries in the format's order."""

from collections.abc import Mapping

import numpy as np

from stillroom.cache.teacher import RowScores

HALF_SHIFT, ID_SHIFT = np.uint64(48), np.uint64(16)
MAGNITUDE, LOW_16, LOW_32 = np.uint16(0x7FFF), np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)


def rounded(columns: Mapping[str, np.ndarray]) -> RowScores:
    """Round to storage precision and put entries into the format's order; what is below float16's
    range becomes -inf.

    Args:
        columns: those of `teacher.RowScores` by name, (p, K), (p, M) or (p,): whole-number ids from
            0 to 2**32 - 1, logprobs in nats. Extra ones may be missing.
    """
    topk_id, topk_logprob = _ordered(columns["topk_id"], _float16(columns["topk_logprob"]))
    extra = {}
    if "extra_logprob" in columns:
        extra["extra_logprob"] = _float16(columns["extra_logprob"])
    if "extra_id" in columns:
        extra["extra_id"] = columns["extra_id"].astype(np.uint32)
        given = np.minimum(columns["extra_behaviour_logprob"], 0)
        extra["extra_behaviour_logprob"] = given.astype(np.float32)
    return RowScores(
        topk_id=topk_id,
        topk_logprob=topk_logprob,
        topk_count=columns["topk_count"].astype(np.uint16),
        tail_logprob=_float16(columns["tail_logprob"]),
        sampled_logprob=np.minimum(columns["sampled_logprob"], 0).astype(np.float32),
        **extra,
    )


def _ordered(topk_id: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries by logprob descending, then by id. A magnitude, an id and the logprob's bits make one
    64-bit number, whose sort is an order of magnitude quicker than one by two keys."""
    bits = half.view(np.uint16)
    key = (bits & MAGNITUDE).astype(np.uint64) << HALF_SHIFT
    key |= topk_id.astype(np.uint64) << ID_SHIFT
    key |= bits
    key.sort(axis=-1)
    sorted_half = (key & LOW_16).astype(np.uint16).view(np.float16)
    return ((key >> ID_SHIFT) & LOW_32).astype(np.uint32), sorted_half


def _float16(logprob: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half: np.ndarray = np.minimum(logprob, 0).astype(np.float16)
    return half
