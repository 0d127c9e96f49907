"""From a part's columns to what a teacher reads, and from its answers to a shard's columns."""

import numpy as np

from stillroom.cache.schema import Arrays
from stillroom.cache.teacher import RowScores, ScoreRow


def score_rows(arrays: Arrays) -> list[ScoreRow]:
    """What the teacher reads for each sequence: its own prompt where it has one, then the
    completion."""
    edges = ("sequence_start", "position_start", "teacher_prompt_start")
    starts, positions, own_starts = (arrays[name].astype(int) for name in edges)
    extra_id = arrays.get("extra_id")
    rows = []
    for i, prompt_length in enumerate(arrays["prompt_length"].astype(int)):
        token = arrays["token"][starts[i] : starts[i + 1]]
        targets = np.flatnonzero(arrays["scored"][starts[i] : starts[i + 1]])
        own = arrays["teacher_prompt"][own_starts[i] : own_starts[i + 1]]
        if len(own):
            token = np.concatenate([own, token[prompt_length:]])
            targets = targets - prompt_length + len(own)
        extra = None if extra_id is None else extra_id[positions[i] : positions[i + 1]]
        rows.append(ScoreRow(token, targets, extra, int(arrays["rollout_id"][i])))
    return rows


def score_columns(scores: list[RowScores]) -> Arrays:
    """The teacher's columns of a shard; those of extra ids only where it gave them."""
    names = (
        "topk_id",
        "topk_logprob",
        "topk_count",
        "tail_logprob",
        "sampled_logprob",
        "extra_id",
        "extra_logprob",
        "extra_behaviour_logprob",
    )
    given = [name for name in names if getattr(scores[0], name) is not None]
    return {name: np.concatenate([getattr(s, name) for s in scores]) for name in given}
