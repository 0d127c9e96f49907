"""What the teacher said about T positions, and its masses as the losses use them.

A *target* holds the cached values of T positions as they were stored. Its *buckets* are disjoint
sets of tokens with one teacher mass each: every kept token, the sampled token, every extra token,
and one *tail* for the rest of the vocabulary. Nothing here knows the student; no gradient flows to
the teacher.

Row t of a target scores the token that row t of the student's logits predicts.
"""

# Shapes: T positions, K kept teacher entries, M extra ids, V vocabulary without padding of the
# output head; B = K + 1 + M single-token buckets.

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
    extra_id: Tensor | None = None
    """(T, M) int64, further ids that the teacher scored; negative where unused. May repeat."""
    extra_logprob: Tensor | None = None
    """(T, M) float, nats: the teacher's logprobs of `extra_id`; there if that is."""
    extra_behaviour_logprob: Tensor | None = None
    """(T, M) float, nats: logprobs of `extra_id` where they were drawn; NaN where unknown."""
    sampling_temperature: Tensor | None = None
    """(T,) float: what the sampling policy divided its logits by; NaN where unknown."""

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        tensors = self._tensors()
        extra = {name for name in tensors if name.startswith("extra")}
        if extra and not {"extra_id", "extra_logprob"} <= extra:
            got, do = f"only {', '.join(sorted(extra))}", "Give both, or no extra ids at all."
            raise ShapeError("TeacherTarget", "extra_id and extra_logprob together", got, do)
        for name, tensor in tensors.items():
            _check_shape(name, tensor, tensors)
            _check_dtype(name, tensor)

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

    def select(self, row: Tensor) -> Self:
        """Return the positions that `row` lists, (N,) int64."""
        return self._map(lambda _, tensor: tensor[row])

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        return replace(self, **{n: change(n, tensor) for n, tensor in self._tensors().items()})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherBuckets:
    """Disjoint buckets of each position, with teacher masses that sum to 1.

    Column j < K is kept entry j, column K the sampled token, the next M are the extra ids, and the
    last, column B, is the tail. A token has one bucket, in the first column where it comes. A
    masked row has only the tail, with mass 1.
    """

    token_id: Tensor
    """(T, B) int64, the token of each single-token bucket; V where there is none."""
    logprob: Tensor
    """(T, B + 1) float64, nats; -inf where a bucket has no mass or does not exist."""
    exists: Tensor
    """(T, B + 1) bool; the tail's is false where the other buckets cover the whole vocabulary."""
    sampled_column: Tensor
    """(T,) int64, the bucket that holds the sampled token: B if it is the tail; 0 if masked."""
    extra_column: Tensor
    """(T, M) int64, the bucket that holds each extra id: B if it is the tail; -1 where unused."""

    @property
    def num_kept(self) -> int:
        """K, columns of kept entries."""
        return self.token_id.shape[1] - 1 - self.extra_column.shape[1]

    def select(self, index: Tensor | slice) -> Self:
        """Return the positions that `index` lists, (N,) int64, or a range of them as views."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})


@torch.no_grad()
def teacher_buckets(
    target: TeacherTarget,
    vocab_size: int,
    *,
    floor_tail: bool = False,
    normalise: bool = True,
    kept_only: bool = False,
) -> TeacherBuckets:
    """Turn stored scores into bucket masses that sum to 1 (float64, in log space).

    Unused entries are dropped, logprobs clipped to 0, and a token's first score counts. A sampled
    token and extra ids that were not kept get buckets out of the tail; with t_own their sum:

        log t_tail <- log t_tail + log(1 - t_own / t_tail), or -inf if nothing is left

    Args:
        target: T positions; masked ones are never read.
        vocab_size: V, the true vocabulary, without padding of the output head.
        floor_tail: raise the tail's mass to 1e-8, for losses that divide by it (reverse KL).
        normalise: scale the masses to sum to 1; else they are as stored.
        kept_only: leave the sampled token and extra ids in the tail where they were not kept, for
            estimators whose buckets must not depend on what was drawn.

    Returns:
        B + 1 buckets for each of the T positions.

    Raises:
        NumericsError: if a logprob of a scored position is NaN.
        MismatchError: if a token id of a scored position is not below V.
        CorruptError: if a row's scores, or its kept entries and its tail, sum to more than 1.01, or
            two scores of a token disagree.
    """
    num_kept = target.topk_id.shape[1]
    token_id, stored, used = _entries(target, vocab_size)
    first = _first_column(token_id, used)
    repeated = used & (first != torch.arange(first.shape[1], device=first.device))
    _refuse_disagreement(stored, first, repeated)
    used = used & ~repeated
    everything = kept = stored.masked_fill(~used, -math.inf)
    if kept_only:
        used[:, num_kept:] = False
        kept = stored.masked_fill(~used, -math.inf)
    has_tail = used.sum(1) < vocab_size
    stored_tail = torch.where(target.mask & has_tail, target.tail_logprob.double(), -math.inf)
    _refuse_masses(target, everything, stored_tail)
    tail = _tail_of(stored_tail, kept[:, num_kept:]).masked_fill(~used.any(1), 0.0)
    if floor_tail:
        tail = torch.where(has_tail, tail.clamp(min=TAIL_FLOOR_NATS), tail)
    logprob = torch.cat([kept.clamp(max=0.0), tail[:, None]], dim=1)
    if normalise:
        logprob = logprob - logprob.logsumexp(1, keepdim=True)
    column = torch.where(used.gather(1, first), first, used.shape[1])
    return TeacherBuckets(
        token_id=token_id.masked_fill(~used, vocab_size),
        logprob=logprob,
        exists=torch.cat([used, has_tail[:, None]], dim=1),
        sampled_column=column[:, num_kept].masked_fill(~target.mask, 0),
        extra_column=column[:, num_kept + 1 :].masked_fill(~used_extra(target), -1),
    )


def used_extra(target: TeacherTarget) -> Tensor:
    """Return which extra ids of scored positions are there, (T, M) bool; M is 0 without any."""
    if target.extra_id is None:
        return target.mask.new_zeros(len(target), 0)
    return target.mask[:, None] & (target.extra_id >= 0)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, accurate at both ends; -inf for x >= 0.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    near_zero = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x))
    return torch.where(x > -math.log(2.0), near_zero, far).masked_fill(x >= 0, -math.inf)


def _entries(target: TeacherTarget, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (V where out of the vocabulary or masked), logprobs as stored, and which are used,
    each (T, B), duplicates included."""
    ids, logprobs = [target.topk_id, target.sampled_id[:, None]], [target.topk_logprob]
    logprobs.append(target.sampled_logprob[:, None])
    if target.extra_id is not None and target.extra_logprob is not None:
        ids.append(target.extra_id)
        logprobs.append(target.extra_logprob)
    token_id, stored = torch.cat(ids, dim=1), torch.cat([x.double() for x in logprobs], dim=1)
    mask, num_kept = target.mask[:, None], target.topk_id.shape[1]
    known = (token_id >= 0) & (token_id < vocab_size)
    used = mask & (token_id >= 0) & (stored != -math.inf)
    outside = used & ~known
    outside[:, num_kept] = target.mask & ~known[:, num_kept]
    outside[:, num_kept + 1 :] = used_extra(target) & ~known[:, num_kept + 1 :]
    _refuse(outside, MismatchError, f"token ids in 0 to {vocab_size - 1}", token_id)
    _refuse(used & stored.isnan(), NumericsError, "teacher logprobs that are numbers", stored)
    return token_id.masked_fill(~(mask & known), vocab_size), stored, used


def _tail_of(stored: Tensor, own: Tensor) -> Tensor:
    """Return the log mass that is left of a stored tail (T,) without log masses `own` (T, 1 + M);
    those above 0 are 0."""
    tail, own_lse = stored.clamp(max=0.0), own.clamp(max=0.0).logsumexp(1)
    rest = tail + log1mexp(own_lse - tail)
    return torch.where(own_lse > -math.inf, rest, tail)


def _first_column(token_id: Tensor, used: Tensor) -> Tensor:
    """Return for each entry (T, B) the first column where its token comes, used ones first."""
    order = (2 * token_id + (~used).long()).argsort(dim=1, stable=True)
    ranked = token_id.gather(1, order)
    starts = torch.ones_like(ranked, dtype=torch.bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    run_start = torch.where(starts, rank, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, run_start))


def _refuse_disagreement(stored: Tensor, first: Tensor, repeated: Tensor) -> None:
    """Raise if a repeated score (T, B) is not that of its first column."""
    gap = (stored - stored.gather(1, first)).abs()
    allowed = (FLOAT16_SPACING * stored.abs()).clamp(min=MAX_DUPLICATE_GAP_NATS)
    expected = f"scores of one token at most {MAX_DUPLICATE_GAP_NATS} nats apart"
    _refuse(repeated & (gap > allowed), CorruptError, expected, gap)


def _refuse_masses(target: TeacherTarget, own: Tensor, tail: Tensor) -> None:
    """Raise if log masses of tokens (T, B), -inf where unused, or of the tail (T,) cannot be
    probabilities; the tail's is that outside the kept entries, which come first."""
    _refuse(tail.isnan(), NumericsError, "a tail logprob that is a number", tail)
    kept = own[:, : target.topk_id.shape[1]].exp().sum(1)
    mass = torch.maximum(own.exp().sum(1), kept + tail.exp())
    _refuse(mass > MAX_MASS, CorruptError, f"probabilities that sum to <= {MAX_MASS}", mass)


def _check_shape(name: str, tensor: Tensor, tensors: dict[str, Tensor]) -> None:
    letter = {"topk": "K", "extra": "M"}.get(name.partition("_")[0], "")
    beside = "extra_id" if letter == "M" else "topk_id"
    first, num_rows = tensors[beside], tensors["topk_id"].shape[:1]
    shape = first.shape if letter else num_rows
    if first.ndim != 2 or tensor.shape != shape or tensor.shape[:1] != num_rows:
        expected = f"shape (T, {letter})" if letter else "shape (T,)"
        got = f"{tuple(tensor.shape)} beside {beside} {tuple(first.shape)}"
        do = "Flatten all tensors over the same T positions."
        raise ShapeError(f"TeacherTarget.{name}", expected, got, do)


def _check_dtype(name: str, tensor: Tensor) -> None:
    dtypes = (torch.int64,) if name.endswith("_id") else _FLOATS
    dtypes = (torch.bool,) if name == "mask" else dtypes
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        do = "Convert it first; widening half precision is exact."
        raise ShapeError(f"TeacherTarget.{name}", expected, str(tensor.dtype), do)


def _refuse(bad: Tensor, error: type[StillroomError], expected: str, value: Tensor) -> None:
    """Raise `error` for the first row (dim 0) where `bad` is true, quoting its `value`."""
    if bool(bad.any()):
        got = value[bad][0].item()
        said = f"{got:.6g}" if isinstance(got, float) else str(got)
        row = int(bad.nonzero()[0, 0])
        raise error(f"TeacherTarget row {row}", expected, said, _ADVICE[error])
