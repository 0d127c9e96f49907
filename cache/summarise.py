"""From full rows of a teacher's logits to what is stored of them: entries, tail, sampled token, and
extra ids. torch, on whatever device the logits are.

Shapes: P positions, V logit width, K entries, M extra ids.
"""

import numpy as np
import torch

from stillroom.cache.errors import NumericsError
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.tail_draws import draw_from
from stillroom.cache.teacher import ScoreSpec


def summarise(
    logit_PV: torch.Tensor,
    sampled_P: torch.Tensor,
    spec: ScoreSpec,
    row_P: np.ndarray,
    *,
    extra_id_PM: torch.Tensor | None = None,
    uniform_PM: torch.Tensor | None = None,
    rest_P1: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Scores of full rows of logits.

        logprob_v = z_v - logsumexp(z);  tail = logsumexp over all but the kept entries -
        logsumexp(z)

    Kept are the fewest of the K likeliest tokens whose probabilities sum to spec.mass or more, all
    K if they do not. Of equal ones the lower id comes first; which of those that tie for place K
    are among the K is the device's choice.

    Args:
        logit_PV: (P, V) float32, already divided by the temperature; overwritten.
        sampled_P: (P,) int64 token ids.
        spec: what is kept.
        row_P: (P,) which row each position is of, for messages.
        extra_id_PM: (P, M) int64, UNUSED_ID where there is none; for extra ids of the student.
        uniform_PM: (P, M) float64 in [0, 1), what draws from the tail are made from.
        rest_P1: (P, 1) float32, logsumexp of the logits of tokens that have no column: they count
            in every sum and in the tail, and are neither entries nor drawn.

    Returns:
        The columns of `teacher.RowScores` by name: ids int64 and logprobs float32 (nats), neither
        rounded nor in the order of the format yet.

    Raises:
        NumericsError: a position holds NaN or +inf, or nothing finite; names its row.
    """
    top_PK, id_PK = _by_id_where_equal(*logit_PV.topk(spec.topk, dim=-1))
    if rest_P1 is None:
        rest_P1 = torch.full_like(top_PK[:, :1], -torch.inf)
    largest_P1 = torch.maximum(top_PK[:, :1], rest_P1)
    shifted_PV, top_PK = logit_PV.sub_(largest_P1), top_PK - largest_P1
    rest_P1 = rest_P1 - largest_P1
    sum_P1 = shifted_PV.exp().sum(-1, keepdim=True) + rest_P1.exp()
    log_sum_P1 = sum_P1.log()
    _refuse_bad(log_sum_P1, row_P)
    kept_PK = _kept(top_PK.double().exp() / sum_P1.double(), spec.mass)
    found = {
        "topk_id": id_PK.masked_fill(~kept_PK, UNUSED_ID),
        "topk_logprob": (top_PK - log_sum_P1).masked_fill(~kept_PK, -torch.inf),
        "topk_count": kept_PK.sum(-1),
        "sampled_logprob": (shifted_PV.gather(1, sampled_P[:, None]) - log_sum_P1).squeeze(1),
    }
    if extra_id_PM is not None:
        found["extra_logprob"] = _at(shifted_PV, extra_id_PM) - log_sum_P1
    rest_PV = shifted_PV.scatter_(1, id_PK, top_PK.masked_fill(kept_PK, -torch.inf))
    tail_P1 = torch.logaddexp(rest_PV.logsumexp(-1, keepdim=True), rest_P1)
    found["tail_logprob"] = (tail_P1 - log_sum_P1).squeeze(1)
    if uniform_PM is not None:
        found |= _draws(rest_PV, tail_P1, log_sum_P1, uniform_PM)
    return found


def _draws(
    rest_PV: torch.Tensor, tail_P1: torch.Tensor, log_sum_P1: torch.Tensor, uniform_PM: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Draws from the tail, with their logprobs over everything and over the tail."""
    drawn_PM = draw_from(rest_PV, uniform_PM)
    drawn, unknown_PM = _at(rest_PV, drawn_PM), drawn_PM == UNUSED_ID
    return {
        "extra_id": drawn_PM,
        "extra_logprob": drawn - log_sum_P1,
        "extra_behaviour_logprob": (drawn - tail_P1).masked_fill(unknown_PM, torch.nan),
    }


def _by_id_where_equal(
    top_PK: torch.Tensor, id_PK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    by_id = id_PK.argsort(dim=-1)
    top_PK, id_PK = top_PK.gather(1, by_id), id_PK.gather(1, by_id)
    by_logit = top_PK.argsort(dim=-1, descending=True, stable=True)
    return top_PK.gather(1, by_logit), id_PK.gather(1, by_logit)


def _kept(probability_PK: torch.Tensor, mass: float) -> torch.Tensor:
    """(P, K) bool: entries before which less than the mass is covered; a mass of 1 keeps all,
    although rounding may cover it early."""
    if mass == 1:
        return torch.ones_like(probability_PK, dtype=torch.bool)
    covered_PK = probability_PK.cumsum(-1)
    before_PK = torch.cat([torch.zeros_like(covered_PK[:, :1]), covered_PK[:, :-1]], dim=-1)
    return before_PK < mass


def _at(value_PV: torch.Tensor, id_PM: torch.Tensor) -> torch.Tensor:
    """(P, M) values at ids; -inf where an id is UNUSED_ID."""
    unused_PM = id_PM == UNUSED_ID
    return value_PV.gather(1, id_PM.masked_fill(unused_PM, 0)).masked_fill(unused_PM, -torch.inf)


def _refuse_bad(log_sum_P1: torch.Tensor, row_P: np.ndarray) -> None:
    bad = (~torch.isfinite(log_sum_P1[:, 0])).nonzero()
    if len(bad):
        raise NumericsError(
            f"row {row_P[int(bad[0])]}",
            "finite teacher logits",
            "NaN, +inf, or nothing but -inf",
            "Run the teacher in float32 or bfloat16, or check its weights.",
        )
