"""Hidden states, output heads and teacher scores to measure a loss on: made up, but with a
vocabulary whose frequencies fall off as those of text do."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.tools.bench_train_loss import Shape
from stillroom.train.target import TeacherTarget

CHUNK_BYTES = 64 << 20
ZIPF = 1.1
"""Probability falls with the rank to this power."""
CONTEXT_NATS = 6.0
"""What the context adds to a logit: standard deviation. So the teacher's entropy is 1.7 nats, and
1 % lies outside its 64 likeliest tokens of 49,152; medians."""
STUDENT_OFF = 0.1
"""How far the student's hidden states and head are from the teacher's, as a part of their size."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a loss is computed from; all float32."""

    hidden: Tensor
    """(T, H), needs a gradient."""
    weight: Tensor
    """(V, H), needs a gradient."""
    teacher_hidden: Tensor
    """(T, H)."""
    teacher_weight: Tensor
    """(V, H)."""
    target: TeacherTarget
    """What a cache holds of the teacher."""


@torch.no_grad()
def made_up_problem(shape: Shape, seed: int = 0) -> Problem:
    """A teacher whose logits are a Zipf law by token and noise by context, and a student that is
    somewhat off."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rank = torch.randperm(shape.vocab, generator=generator).float()
    teacher_weight = noise(shape.vocab, shape.width) * (CONTEXT_NATS / math.sqrt(shape.width))
    teacher_weight[:, 0] = -ZIPF * rank.log1p()
    teacher_hidden = noise(shape.tokens, shape.width)
    teacher_hidden[:, 0] = 1
    hidden = teacher_hidden + STUDENT_OFF * noise(shape.tokens, shape.width)
    off = STUDENT_OFF * CONTEXT_NATS / math.sqrt(shape.width)
    weight = noise(shape.vocab, shape.width).mul_(off).add_(teacher_weight)
    rows = max(1, CHUNK_BYTES // (4 * shape.vocab))
    chunks = [
        _scores(chunk @ teacher_weight.T, shape.topk, generator)
        for chunk in torch.split(teacher_hidden, rows)
    ]
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    mask = torch.ones(shape.tokens, dtype=torch.bool)
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        target=TeacherTarget(**columns, mask=mask),
    )


def _scores(logits: Tensor, topk: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a cache keeps of (n, V) logits."""
    logprob = logits.log_softmax(1)
    sampled = torch.multinomial(logprob.exp(), 1, generator=generator)
    top, ids = logprob.topk(topk, dim=1)
    sampled_logprob = logprob.gather(1, sampled)[:, 0]
    tail = logprob.scatter_(1, ids, -math.inf).logsumexp(1)
    return {
        "topk_id": ids,
        "topk_logprob": top.half().float(),
        "tail_logprob": tail.half().float(),
        "sampled_id": sampled[:, 0],
        "sampled_logprob": sampled_logprob,
        "behaviour_logprob": sampled_logprob.clone(),
    }
