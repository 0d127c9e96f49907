"""From the K likeliest tokens of each position, all that some engines tell, to what is stored.

Shapes: p positions, K entries.
"""

import numpy as np

from stillroom.cache.errors import NumericsError
from stillroom.cache.rounded import LOW_32, rounded
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreSpec

SLACK = 1e-4
"""How far above 1 rounding may carry the sum of a position's probabilities: a float32 softmax of
262,144 logits carries it 1.5e-5."""


def scores_from_topk(
    topk_id: np.ndarray,
    topk_logprob: np.ndarray,
    sampled_id: np.ndarray,
    sampled_logprob: np.ndarray,
    spec: ScoreSpec,
    where: str = "scores",
) -> RowScores:
    """Scores of one row.

    The tail is 1 less the entries' probabilities, summed in float64. What the engine's float32
    leaves of it is good to about 1e-6 of probability: where more than the tail is lost to that, the
    tail is what is known of it all the same, which is the entries that a mass cut-off leaves out,
    and the sampled token if it is none of the entries.

    Args:
        topk_id: (p, K) whole numbers: different ids in each row.
        topk_logprob: (p, K) float32 or float64, nats over the full vocabulary, in any order.
        sampled_id: (p,) whole numbers: the tokens that were sampled.
        sampled_logprob: (p,) float32 or float64, nats, of these tokens.
        spec: what is kept: K and the mass; a temperature of 1 and no extra ids.
        where: the row, for messages.

    Raises:
        NumericsError: NaN, a logprob above 0, nothing finite, or a sum above 1; names the row and
            the position.
    """
    logprob = np.ascontiguousarray(topk_logprob, np.float32)
    sampled = sampled_logprob.astype(np.float32)
    probability = np.exp(logprob, dtype=np.float64)
    total = probability.sum(-1)
    _refuse_bad(total, sampled, where)
    logprob = np.minimum(logprob, 0)
    unlisted = (topk_id != sampled_id[:, None]).all(-1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - total, 0))
    tail = np.maximum(tail, np.where(unlisted, sampled, -np.inf))
    count = np.full(len(logprob), spec.topk)
    if spec.mass < 1:
        topk_id, logprob, probability = _likeliest_first(topk_id, logprob)
        kept = _kept(probability, spec.mass)
        left_out = np.where(kept, -np.inf, logprob.astype(np.float64))
        tail = np.logaddexp(tail, np.logaddexp.reduce(left_out, -1))
        topk_id = np.where(kept, topk_id, UNUSED_ID)
        logprob = np.where(kept, logprob, -np.inf)
        count = kept.sum(-1)
    return rounded(
        {
            "topk_id": topk_id,
            "topk_logprob": logprob,
            "topk_count": count,
            "tail_logprob": tail,
            "sampled_logprob": sampled,
        }
    )


def _likeliest_first(
    topk_id: np.ndarray, logprob: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, logprobs and probabilities; of equal ones the lower id comes first. As in `rounded`, a
    magnitude and an id are sorted as one number."""
    key = np.abs(logprob).view(np.uint32).astype(np.uint64) << np.uint64(32)
    key |= topk_id.astype(np.uint64)
    key.sort(axis=-1)
    logprob = -(key >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return (key & LOW_32).astype(np.int64), logprob, np.exp(logprob, dtype=np.float64)


def _kept(probability: np.ndarray, mass: float) -> np.ndarray:
    """(p, K) bool: entries before which less than the mass is covered."""
    before = np.zeros_like(probability)
    np.cumsum(probability[:, :-1], axis=-1, out=before[:, 1:])
    kept: np.ndarray = before < mass
    return kept


def _refuse_bad(total: np.ndarray, sampled: np.ndarray, where: str) -> None:
    """total is (p,), the entries' probability; "not (good)", because NaN compares false."""
    bad = ~((total > 0) & (total <= 1 + SLACK) & (sampled <= SLACK))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise NumericsError(
            f"{where}, position {at}",
            "log probabilities of at most 0 whose probabilities sum to at most 1",
            f"{sampled[at]:.4g} for the sampled token and a sum of {total[at]:.6g}",
            "Check the engine's weights, its dtype, and that it gives log probabilities.",
        )
