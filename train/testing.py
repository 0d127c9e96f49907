"""Teacher targets made from full distributions, for tests of losses."""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from stillroom.train.target import TeacherTarget


def exact_target(
    teacher_logits: NDArray[np.float64],
    num_kept: int,
    sampled_id: list[int],
    extra_id: list[list[int]] | None = None,
    behaviour_logits: NDArray[np.float64] | None = None,
) -> TeacherTarget:
    """Cache dense rows without rounding, every position scored.

    Args:
        teacher_logits: (T, V).
        num_kept: K, the likeliest tokens that are kept; 0 to V.
        sampled_id: T token ids.
        extra_id: T lists of M further ids, -1 where unused. None: no extra ids.
        behaviour_logits: (T, V), of the policy that sampled. None: its logprobs are not known.

    Returns:
        T positions, float64.
    """
    logprob = torch.from_numpy(teacher_logits).log_softmax(1)
    kept = logprob.topk(num_kept, dim=1)
    sampled = torch.tensor(sampled_id, dtype=torch.int64)
    target = TeacherTarget(
        topk_id=kept.indices,
        topk_logprob=kept.values,
        tail_logprob=logprob.scatter(1, kept.indices, -math.inf).logsumexp(1),
        sampled_id=sampled,
        sampled_logprob=logprob.gather(1, sampled[:, None]).squeeze(1),
        behaviour_logprob=None,
        mask=torch.ones(len(sampled), dtype=torch.bool),
    )
    if behaviour_logits is not None:
        behaviour = torch.from_numpy(behaviour_logits).log_softmax(1)
        picked = behaviour.gather(1, sampled[:, None]).squeeze(1)
        target = replace(target, behaviour_logprob=picked)
    if extra_id is None:
        return target
    extra = torch.tensor(extra_id).reshape(len(sampled), -1)
    place = extra.clamp(min=0)
    target = replace(target, extra_id=extra, extra_logprob=logprob.gather(1, place))
    if behaviour_logits is None:
        return target
    unknown = extra < 0
    picked = behaviour.gather(1, place).masked_fill(unknown, math.nan)
    return replace(target, extra_behaviour_logprob=picked)
