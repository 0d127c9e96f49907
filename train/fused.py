"""Losses from hidden states and an output head, with their gradients, a chunk of positions at a
time: no tensor of all positions by the whole vocabulary is ever held.

Gradients are in closed form and made together with the loss, so that the logits of a chunk are
computed once and forgotten.
"""

# Shapes: T positions, H hidden, V vocabulary.

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.cache.errors import ConfigError, ShapeError
from stillroom.train.fused_chunks import FusedLoss, Gradients, Work, walk
from stillroom.train.importance import without_randomness
from stillroom.train.logit_chunks import LogitChunks
from stillroom.train.objective import Objective
from stillroom.train.output_head import OutputHead
from stillroom.train.target import TeacherTarget
from stillroom.train.teacher_side import side_bytes

__all__ = ["FusedLoss", "fused_loss"]

TEACHER_SHARE = 8
"""One part in so many of `max_bytes` is the teacher's side of several chunks, made at once."""


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    target: TeacherTarget,
    objective: Objective,
    weight: Tensor | None = None,
    *,
    cross_entropy_weight: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    max_bytes: int = 1 << 28,
) -> FusedLoss:
    """Loss of an objective, and its gradient by hidden states, head weight and bias.

    The gradients that are wanted are made here, that of the weight in one (V, H) buffer of float32
    (float64 for products in float64); the backward pass scales them in place and hands them on in
    the dtypes of hidden states, weight and bias. So there can be one backward pass only.

    Args:
        hidden: (T, H) float, the trunk's last hidden states.
        head: the model's. Hidden states and weight are multiplied in autocast's dtype where it is
            on, else in what both promote to; sums, and all that follows, are in float32 (or
            float64).
        target: teacher values at `temperature`, with what the objective needs.
        objective: which loss; its `cross_entropy` is not read, the weights say it.
        weight: (T,) float, multiplies each position's loss; None is 1. Not read where masked.
        cross_entropy_weight: (T,) float, multiplies each position's cross-entropy; None is 0.
        temperature: divides the logits, > 0.
        vocab_size: V without padding of the head; its rows from there on take no part and get
            gradient 0. None: all rows.
        max_bytes: for all of a chunk of n positions, by V or by K, whatever T is; one position is
            held at least.

    Returns:
        The total, and what was measured on the way. Masked positions are never read: their loss and
        gradients are exactly 0, also where hidden states or target hold NaN. Where the teacher
        scored no token the loss and its gradient are 0, and only cross-entropy is left.

    Raises:
        ConfigError: the temperature is out of range, or gradients are wanted of products in
            float16, where they would underflow.
        ShapeError: shapes disagree.
        StillroomError: the target is unusable for the objective, see `TeacherSide.of`.
    """
    vocab_size = head.weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, head, len(target), temperature, vocab_size)
    row = target.mask.nonzero().squeeze(1)
    ratio = _sampling_ratio(target, temperature)
    weight = _at_positions("weight", weight, len(target))
    crossed = _at_positions("cross_entropy_weight", cross_entropy_weight, len(target))
    side, ahead = side_bytes(target), max_bytes // TEACHER_SHARE
    work = Work(row, target, vocab_size, objective, weight, crossed, ratio, ahead // side)
    made = Gradients.wanted(hidden, head)
    num_spare = int(ratio is not None or (made.any and head.soft_cap is not None))
    few = hidden.detach()[: len(row)]
    chunks = LogitChunks(head, few, vocab_size, temperature, max_bytes - ahead, num_spare, side)
    _check_underflow(made, chunks)
    apply: Any = _Fused.apply
    result = FusedLoss(*apply(hidden, head.weight, head.bias, work, chunks, made))
    return result if target.sampling_temperature is None else _without_greedy(result, target)


def _check_underflow(made: Gradients, chunks: LogitChunks) -> None:
    if made.any and chunks.dtype == torch.float16:
        do = "Use bfloat16, or torch.no_grad to measure."
        raise ConfigError("fused_loss", "products in bfloat16 or wider", "float16", do)


def _without_greedy(result: FusedLoss, target: TeacherTarget) -> FusedLoss:
    """Return NaN for the sampled logprob where the sampler had no randomness."""
    assert target.sampling_temperature is not None
    unknown = without_randomness(target.sampling_temperature)
    return result._replace(sampled_logprob=result.sampled_logprob.masked_fill(unknown, math.nan))


class _Fused(torch.autograd.Function):
    """The loss, with its gradients by hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        work: Work,
        chunks: LogitChunks,
        made: Gradients,
    ) -> tuple[Tensor, ...]:
        """Compute loss and gradients."""
        result = walk(hidden, work, chunks, made)
        ctx.made, ctx.dtypes = made, (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Scale the gradients and give them away, so that autograd need not copy them."""
        made, ctx.made = ctx.made, None
        if made is None:
            do = "Call fused_loss again."
            raise ConfigError("fused_loss", "one backward pass", "another", do)
        for gradient in (made.hidden, made.weight, made.bias):
            if gradient is not None:
                gradient.mul_(grad_total)
        weight, bias = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((made.weight, made.bias), ctx.dtypes, strict=True)
        )
        return made.hidden, weight, bias, None, None, None


def _sampling_ratio(target: TeacherTarget, temperature: float) -> Tensor | None:
    """The temperature over that of sampling, (T,), 1 where that is not known; None: all 1."""
    if target.sampling_temperature is None:
        return None
    given = target.sampling_temperature.double()
    given = torch.where(target.mask & ~without_randomness(given), given, math.nan)
    ratio = (temperature / given).nan_to_num(1.0)
    return ratio if bool((ratio != 1.0).any()) else None


def _at_positions(name: str, given: Tensor | None, size: int) -> Tensor | None:
    if given is None:
        return None
    if given.shape != (size,):
        expected, got, do = f"shape ({size},)", str(tuple(given.shape)), "Pass one a position."
        raise ShapeError(f"fused_loss {name}", expected, got, do)
    return given.detach()


def _check(
    hidden: Tensor, head: OutputHead, size: int, temperature: float, vocab_size: int
) -> None:
    if not 0.0 < temperature < math.inf:
        do = "Use the temperature of the cache."
        raise ConfigError("temperature", "a finite number above 0", repr(temperature), do)
    num_rows, width = head.weight.shape
    if hidden.shape != (size, width):
        do = "Flatten batch and time, and drop what predicts no scored token."
        expected, got = f"shape ({size}, {width})", str(tuple(hidden.shape))
        raise ShapeError("fused_loss hidden", expected, got, do)
    if not 0 < vocab_size <= num_rows:
        do = "Use the vocabulary size of the cache's identity."
        raise ShapeError("output head", f"at least {vocab_size} rows", str(num_rows), do)
