"""The fused loss's walk over chunks of positions: what a call computes, where its results and
gradients go, and one chunk of it."""

# Shapes: T positions, N of them that are not masked, n in a chunk, H hidden, V vocabulary.

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from stillroom.train.bucket_softmax import (
    logprob_at,
    make_gradient,
    take_scores,
    tokens_of,
    weighted,
)
from stillroom.train.coefficients import coefficients
from stillroom.train.logit_chunks import LogitChunks
from stillroom.train.objective import Objective
from stillroom.train.output_head import OutputHead, wide
from stillroom.train.target import TeacherTarget
from stillroom.train.teacher_side import TeacherSide


class FusedLoss(NamedTuple):
    """A loss over T positions. float32, or float64 where products are in float64."""

    total: Tensor
    """() with gradient: sum_t weight_t L_t + cross_entropy_weight_t CE_t."""
    value: Tensor
    """(T,) L_t, nats; 0 where masked."""
    cross_entropy: Tensor
    """(T,) -log s_y of the sampled token, nats; 0 where masked."""
    sampled_logprob: Tensor
    """(T,) the student's log s_y at the sampling temperature, or at the loss's where that is not
    known, nats; NaN where masked, and where that is not a finite number above 0."""
    tail_logprob: Tensor
    """(T,) log of the student's mass outside the objective's buckets, nats; -inf where they are
    the whole vocabulary, NaN where masked."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a call computes."""

    row: Tensor
    """(N,) int64, the positions that are not masked; nothing else is read."""
    target: TeacherTarget
    """Of T positions."""
    vocab_size: int
    objective: Objective
    weight: Tensor | None
    """(T,) of the losses; None: 1."""
    cross_entropy_weight: Tensor | None
    """(T,) of the cross-entropies; None: 0."""
    ratio: Tensor | None
    """(T,) temperature over that of sampling; None: 1 everywhere."""
    num_ahead: int
    """Positions whose teacher's side is made at once, if it is that of more than one chunk."""

    def parts(self, num_rows: int) -> Iterator[tuple[TeacherSide, Tensor]]:
        """Chunks of at most `num_rows` positions, and the teacher's side of each."""
        size = max(1, num_rows)
        for row in torch.split(self.row, size * max(1, self.num_ahead // size)):
            teacher = TeacherSide.at(row, self.objective, self.target, self.vocab_size)
            for start in range(0, len(row), size):
                part = slice(start, start + size)
                yield teacher.select(part), row[part]


@dataclass(slots=True, eq=False)
class Gradients:
    """Buffers of the gradients that are wanted; None of those that are not."""

    hidden: Tensor | None
    """(T, H), in the dtype of the hidden states."""
    weight: Tensor | None
    """(V, H) float32 or float64, the padded rows included."""
    bias: Tensor | None
    """(V,), likewise."""

    @classmethod
    def wanted(cls, hidden: Tensor, head: OutputHead) -> Self:
        """Zeros, those of the head in float32 at least."""
        dtype = wide(torch.promote_types(hidden.dtype, head.weight.dtype))

        def zeros(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
                return None
            return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)

        return cls(zeros(hidden, hidden.dtype), zeros(head.weight, dtype), zeros(head.bias, dtype))

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(x is not None for x in (self.hidden, self.weight, self.bias))


def walk(hidden: Tensor, work: Work, chunks: LogitChunks, made: Gradients) -> FusedLoss:
    """Compute the loss of all chunks, and add their gradients to `made`."""
    zeros = torch.zeros(len(hidden), dtype=wide(chunks.dtype), device=hidden.device)
    result = FusedLoss(
        zeros.new_zeros(()), zeros, zeros.clone(), *(zeros + math.nan for _ in range(2))
    )
    for teacher, row in work.parts(chunks.num_rows):
        _chunk(hidden[row], row, teacher, work, chunks, made, result)
    return result


def _chunk(
    hidden: Tensor,
    row: Tensor,
    teacher: TeacherSide,
    work: Work,
    chunks: LogitChunks,
    made: Gradients,
    result: FusedLoss,
) -> None:
    """Add the positions `row` (n,) to the result and the gradients."""
    dtype = result.value.dtype
    token_id = tokens_of(teacher, work.target.sampled_id[row])
    logits = chunks.logits(hidden)
    sampling = None
    if work.ratio is not None:
        ratio = work.ratio[row].to(dtype)
        sampling = logprob_at(logits, token_id[:, 0], ratio, chunks.spare(len(row)))
    square = chunks.square(logits) if chunks.soft_cap is not None and made.any else None
    scores = take_scores(logits, teacher, token_id)
    loss = coefficients(work.objective, teacher, scores.student)

    weights = [work.weight, work.cross_entropy_weight]
    weight, ce_weight = (None if w is None else w[row].to(dtype) for w in weights)
    result.total.add_(weighted(loss.value, weight).sum())
    if ce_weight is not None:
        result.total.sub_(weighted(scores.sampled, ce_weight).sum())
    result.value.index_copy_(0, row, loss.value)
    result.cross_entropy.index_copy_(0, row, -scores.sampled)
    sampling = scores.sampled if sampling is None else sampling
    result.sampled_logprob.index_copy_(0, row, sampling)
    result.tail_logprob.index_copy_(0, row, scores.student.bucket[:, -1])
    if made.any:
        make_gradient(logits, scores, loss, weight, ce_weight, chunks.slope)
        if square is not None:
            chunks.uncap(logits, square)
        _add_gradients(logits, hidden, row, chunks, made)


def _add_gradients(
    gradient: Tensor, hidden: Tensor, row: Tensor, chunks: LogitChunks, made: Gradients
) -> None:
    """Take the gradient (n, V) of the products at `row` back to what they were made of."""
    vocab_size = gradient.shape[1]
    if made.bias is not None:
        made.bias[:vocab_size].add_(gradient.sum(0))
    gradient = chunks.as_product(gradient)
    if made.weight is not None:
        chunks.add_to_weight(gradient, hidden, made.weight[:vocab_size])
    if made.hidden is not None:
        made.hidden.index_copy_(0, row, chunks.to_hidden(gradient).to(made.hidden.dtype))
