"""From hidden states and an output head to scores, over the full vocabulary and a bounded number
of positions at a time.

Shapes: P positions, H hidden, V logit width, M extra ids.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from stillroom.cache.rounded import rounded
from stillroom.cache.summarise import summarise
from stillroom.cache.tail_draws import uniforms
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec


@torch.inference_mode()
def score_hidden(
    hidden_PH: torch.Tensor,
    rows: Mapping[int, ScoreRow],
    spec: ScoreSpec,
    logits: Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor | None]],
    head_rows: int,
) -> list[RowScores]:
    """Scores of rows, in their order.

    Args:
        hidden_PH: (P, H) the state that predicts each target of the rows, end to end, on the head's
            device.
        rows: by the numbers that messages name them by.
        spec: what is kept.
        logits: from (p, H) and the temperature to what `summarise` takes of it: (p, V) logits, and
            (p, 1) the logsumexp of those that have no column, or None.
        head_rows: positions whose logits are held at once.

    Raises:
        NumericsError: a position holds NaN or +inf, or nothing finite; names its row.
    """
    given, device = list(rows.values()), hidden_PH.device
    sampled = np.concatenate([row.token[row.targets] for row in given]).astype(np.int64)
    row_P = np.repeat(list(rows), [len(row.targets) for row in given])
    sampled_P = torch.from_numpy(sampled).to(device)
    extra = {n: torch.from_numpy(a).to(device) for n, a in _extra_inputs(given, spec).items()}
    chunks = []
    for start in range(0, len(sampled_P), head_rows):
        span = slice(start, start + head_rows)
        logit_PV, rest_P1 = logits(hidden_PH[span], spec.temperature)
        own = {name: tensor[span] for name, tensor in extra.items()} | {"rest_P1": rest_P1}
        chunks.append(summarise(logit_PV, sampled_P[span], spec, row_P[span], **own))
    joined = {n: torch.cat([c[n] for c in chunks]).cpu().numpy() for n in chunks[0]}
    edges = np.cumsum([0, *(len(row.targets) for row in given)])
    return [
        rounded({name: column[edges[i] : edges[i + 1]] for name, column in joined.items()})
        for i in range(len(given))
    ]


def _extra_inputs(rows: Sequence[ScoreRow], spec: ScoreSpec) -> dict[str, np.ndarray]:
    """What `summarise` needs for the extra ids of these rows, (P, M)."""
    if spec.extra_kind == "tail":
        drawn = [uniforms(row.seed, len(row.targets), spec.extra) for row in rows]
        return {"uniform_PM": np.concatenate(drawn)}
    if spec.extra_kind == "student":
        given = [row.extra_id for row in rows if row.extra_id is not None]
        return {"extra_id_PM": np.concatenate(given).astype(np.int64)}
    return {}
