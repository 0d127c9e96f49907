"""Which of some candidate tokens become a position's entries, where no more is known than the
candidates and the probability outside of them.

All is in logs: a token of -800 nats has a logprob, but no probability that float64 can hold.

Shapes: p positions, C candidates, K entries.
"""

import numpy as np

from stillroom.cache.rounded import rounded
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreSpec


def keep_likeliest(
    candidate_id: np.ndarray,
    logprob: np.ndarray,
    outside: np.ndarray,
    sampled_logprob: np.ndarray,
    spec: ScoreSpec,
) -> RowScores:
    """Scores of one row: the K likeliest candidates, cut by mass; the others go to the tail.

    Args:
        candidate_id: (p, C) ids, none twice in a row; UNUSED_ID where there are fewer than C, but K
            at least.
        logprob: (p, C) float64, nats; -inf where there is no candidate.
        outside: (p,) float64, nats: log of the probability of all other tokens.
        sampled_logprob: (p,) nats, of the token that was sampled.
        spec: K and the mass.
    """
    order = np.lexsort((candidate_id, -logprob), axis=-1)
    candidate_id, logprob = (np.take_along_axis(x, order, -1) for x in (candidate_id, logprob))
    top_id, top = candidate_id[:, : spec.topk], logprob[:, : spec.topk]
    kept = np.ones(top.shape, bool)
    if spec.mass < 1:
        kept[:, 1:] = np.cumsum(np.exp(top), -1)[:, :-1] < spec.mass
    dropped = np.concatenate([np.where(kept, -np.inf, top), logprob[:, spec.topk :]], 1)
    return rounded(
        {
            "topk_id": np.where(kept, top_id, UNUSED_ID),
            "topk_logprob": np.where(kept, top, -np.inf),
            "topk_count": kept.sum(-1),
            "tail_logprob": np.logaddexp(outside, np.logaddexp.reduce(dropped, -1)),
            "sampled_logprob": sampled_logprob,
        }
    )
