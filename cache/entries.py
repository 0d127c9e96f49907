"""Which of some candidate tokens become a position's entries, where no more is known than the
candidates and the probability outside of them.

Shapes: p positions, C candidates, K entries.
"""

import numpy as np

from stillroom.cache.rounded import rounded
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreSpec


def keep_likeliest(
    candidate_id: np.ndarray,
    probability: np.ndarray,
    outside: np.ndarray,
    sampled_logprob: np.ndarray,
    spec: ScoreSpec,
) -> RowScores:
    """Scores of one row: the K likeliest candidates, cut by mass; the others go to the tail.

    Args:
        candidate_id: (p, C) ids, none twice in a row; UNUSED_ID where there are fewer than C, but K
            at least.
        probability: (p, C) float64; 0 where there is none.
        outside: (p,) float64: probability of all other tokens.
        sampled_logprob: (p,) nats, of the token that was sampled.
        spec: K and the mass.
    """
    last = np.where(candidate_id == UNUSED_ID, np.inf, -probability)
    order = np.lexsort((candidate_id, last), axis=-1)
    candidate_id, probability = (
        np.take_along_axis(x, order, -1) for x in (candidate_id, probability)
    )
    top_id, top = candidate_id[:, : spec.topk], probability[:, : spec.topk]
    kept = np.ones(top.shape, bool)
    if spec.mass < 1:
        kept[:, 1:] = np.cumsum(top, -1)[:, :-1] < spec.mass
    dropped = np.where(kept, 0, top).sum(-1) + probability[:, spec.topk :].sum(-1)
    with np.errstate(divide="ignore"):
        top_logprob, tail = np.log(np.where(kept, top, 0)), np.log(outside + dropped)
    return rounded(
        {
            "topk_id": np.where(kept, top_id, UNUSED_ID),
            "topk_logprob": top_logprob,
            "topk_count": kept.sum(-1),
            "tail_logprob": tail,
            "sampled_logprob": sampled_logprob,
        }
    )
