"""What the teacher said about T positions, and its masses as the losses use them.

A *target* holds the cached values of T positions as they were stored. Its *buckets* are disjoint
sets of tokens with one teacher mass each: every kept token, the sampled token, and one *tail* for
the rest of the vocabulary. Nothing here knows the student; no gradient flows to the teacher.

Row t of a target scores the token that row t of the student's logits predicts.
"""

# Shapes: T positions, K kept teacher entries, V vocabulary without padding of the output head.

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from stillroom.cache.errors import (
    CorruptError,
    MismatchError,
    NumericsError,
    ShapeError,
    StillroomError,
)

MAX_MASS = 1.01
"""Half precision rounds a sum of probabilities by less than this; a larger sum is corruption."""
MAX_DUPLICATE_GAP_NATS = 0.05
"""Two scores of one token in one row may differ by this much..."""
FLOAT16_SPACING = 2.0**-10
"""...or by this much of their size, where float16 is the coarser of the two (below -51 nats)."""
TAIL_FLOOR_NATS = math.log(1e-8)
"""Least teacher tail for losses that divide by it."""

_FLOATS = (torch.float32, torch.float64)
_ADVICE: dict[type[StillroomError], str] = {
    NumericsError: "Score this part again.",
    MismatchError: "Use the cache's vocabulary size, and mask positions that have no token.",
    CorruptError: "Check that tokens and scores are of the same positions; run 'stillroom verify'.",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherTarget:
    """Cached teacher values of T positions. Rows where `mask` is false may hold anything."""

    topk_id: Tensor
    """(T, K) int64; an entry whose id is negative or whose logprob is -inf is unused."""
    topk_logprob: Tensor
    """(T, K) float32 or float64, nats over the full vocabulary, at the cache's temperature."""
    tail_logprob: Tensor
    """(T,) float, nats: all the mass outside the used entries of `topk_id`; -inf if none."""
    sampled_id: Tensor
    """(T,) int64, the token that followed in the rollout."""
    sampled_logprob: Tensor
    """(T,) float, nats: the teacher's logprob of `sampled_id`, also when it is not in `topk_id`."""
    behaviour_logprob: Tensor | None
    """(T,) float, nats: the sampling policy's logprob of `sampled_id`; NaN where unknown."""
    mask: Tensor
    """(T,) bool, true where the position is scored."""

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        for name, tensor in self._tensors().items():
            shape = self.topk_id.shape if name.startswith("topk") else self.topk_id.shape[:1]
            if self.topk_id.ndim != 2 or tensor.shape != shape:
                expected = "shape (T, K)" if name.startswith("topk") else "shape (T,)"
                got = f"{tuple(tensor.shape)} beside topk_id {tuple(self.topk_id.shape)}"
                do = "Flatten all tensors over the same T positions."
                raise ShapeError(f"TeacherTarget.{name}", expected, got, do)
            dtypes = _FLOATS if name.endswith("logprob") else (torch.int64,)
            dtypes = (torch.bool,) if name == "mask" else dtypes
            if tensor.dtype not in dtypes:
                expected = " or ".join(str(dtype) for dtype in dtypes)
                do = "Convert it first; widening half precision is exact."
                raise ShapeError(f"TeacherTarget.{name}", expected, str(tensor.dtype), do)

    def __len__(self) -> int:
        """Return T, masked positions included."""
        return self.topk_id.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the target on `device`, its logprobs (only) as `dtype`; None leaves either."""

        def move(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if name.endswith("logprob") else None)

        return self._map(move)

    def slice(self, start: int, stop: int) -> Self:
        """Return positions start (inclusive) to stop (exclusive), as views."""
        return self._map(lambda _, tensor: tensor[start:stop])

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        return replace(self, **{n: change(n, tensor) for n, tensor in self._tensors().items()})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherBuckets:
    """Disjoint buckets of each position, with teacher masses that sum to 1.

    Column j < K is kept entry j, column K the sampled token (unless it is among the kept entries),
    column K + 1 the tail. A masked row has only the tail, with mass 1.
    """

    token_id: Tensor
    """(T, K + 1) int64, the token of each single-token bucket; V where there is none."""
    logprob: Tensor
    """(T, K + 2) float64, nats; -inf where a bucket has no mass or does not exist."""
    exists: Tensor
    """(T, K + 2) bool; the tail's is false where the other buckets cover the whole vocabulary."""

    def select(self, index: Tensor) -> Self:
        """Return the positions that `index` lists, (N,) int64."""
        token_id, logprob, exists = (x[index] for x in (self.token_id, self.logprob, self.exists))
        return replace(self, token_id=token_id, logprob=logprob, exists=exists)


@torch.no_grad()
def teacher_buckets(
    target: TeacherTarget, vocab_size: int, *, floor_tail: bool = False
) -> TeacherBuckets:
    """Turn stored scores into bucket masses that sum to 1 (float64, in log space).

    Unused entries are dropped, logprobs clipped to <= 0, and of a token that comes twice the first
    score counts. A sampled token that was not kept gets its own bucket, out of the tail:

        log t_tail <- log t_tail + log(1 - t_sampled / t_tail), or -inf if nothing is left

    Args:
        target: T positions; masked ones are never read.
        vocab_size: V, the true vocabulary, without padding of the output head.
        floor_tail: raise the tail's mass to 1e-8, for losses that divide by it (reverse KL).

    Returns:
        K + 2 buckets for each of the T positions.

    Raises:
        NumericsError: if a logprob of a scored position is NaN.
        MismatchError: if a token id of a scored position is not below V.
        CorruptError: if a row's scores sum to more than 1.01, or two scores of a token disagree.
    """
    mask = target.mask
    token_id = torch.cat([target.topk_id, target.sampled_id[:, None]], dim=1)
    stored = torch.cat([target.topk_logprob, target.sampled_logprob[:, None]], dim=1).double()
    used = mask[:, None] & (token_id >= 0) & (stored != -math.inf)
    outside = used & (token_id >= vocab_size)
    outside[:, -1] = mask & ((token_id[:, -1] < 0) | (token_id[:, -1] >= vocab_size))
    _refuse(outside, MismatchError, f"token ids in 0 to {vocab_size - 1}", token_id)
    _refuse(used & stored.isnan(), NumericsError, "teacher logprobs that are numbers", stored)

    token_id = token_id.masked_fill(~used, vocab_size)
    first = _first_column(token_id)
    repeated = used & (first != torch.arange(first.shape[1], device=first.device))
    gap = (stored - stored.gather(1, first)).abs()
    allowed = (FLOAT16_SPACING * stored.abs()).clamp(min=MAX_DUPLICATE_GAP_NATS)
    expected = f"scores of one token at most {MAX_DUPLICATE_GAP_NATS} nats apart"
    _refuse(repeated & (gap > allowed), CorruptError, expected, gap)
    used = used & ~repeated
    stored = stored.masked_fill(~used, -math.inf)
    has_tail = used.sum(1) < vocab_size

    stored_tail = torch.where(mask & has_tail, target.tail_logprob.double(), -math.inf)
    _refuse(stored_tail.isnan(), NumericsError, "a tail logprob that is a number", stored_tail)
    mass = torch.maximum(stored.exp().sum(1), stored_tail.exp())
    _refuse(mass > MAX_MASS, CorruptError, f"probabilities that sum to <= {MAX_MASS}", mass)

    kept, tail = stored.clamp(max=0.0), stored_tail.clamp(max=0.0)
    tail = torch.where(used[:, -1], tail + log1mexp(kept[:, -1] - tail), tail)
    tail = tail.masked_fill(~used.any(1), 0.0)
    if floor_tail:
        tail = torch.where(has_tail, tail.clamp(min=TAIL_FLOOR_NATS), tail)
    logprob = torch.cat([kept, tail[:, None]], dim=1)
    return TeacherBuckets(
        token_id=token_id.masked_fill(~used, vocab_size),
        logprob=logprob - logprob.logsumexp(1, keepdim=True),
        exists=torch.cat([used, has_tail[:, None]], dim=1),
    )


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, accurate at both ends; -inf for x >= 0.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    near_zero = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x))
    return torch.where(x > -math.log(2.0), near_zero, far).masked_fill(x >= 0, -math.inf)


def _first_column(token_id: Tensor) -> Tensor:
    """Return for each entry (T, N) the column where its token first comes in the row, (T, N)."""
    order = token_id.argsort(dim=1, stable=True)
    ranked = token_id.gather(1, order)
    starts = torch.ones_like(ranked, dtype=torch.bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    run_start = torch.where(starts, rank, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, run_start))


def _refuse(bad: Tensor, error: type[StillroomError], expected: str, value: Tensor) -> None:
    """Raise `error` for the first row (dim 0) where `bad` is true, quoting its `value`."""
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        got = (
            f"{value[where].item():.6g}" if value.is_floating_point() else str(value[where].item())
        )
        raise error(f"TeacherTarget row {where[0]}", expected, got, _ADVICE[error])
