"""Ways to compute a distillation loss with its gradients to hidden states and output head: ours,
and those that others use, on the same problem."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.tools.bench_train_data import Problem
from stillroom.train.fused import fused_loss
from stillroom.train.logit_chunks import LogitChunks
from stillroom.train.objective import Objective
from stillroom.train.objectives import divergence
from stillroom.train.output_head import OutputHead

JSD = 0.5
"""Beta, the teacher's weight."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """What the chunked losses of ours may hold."""

    max_bytes: int
    """Memory of the fused loss."""
    rows: int
    """Positions of one of its chunks, and of one of the yardstick's."""

    @staticmethod
    def of(problem: Problem, max_bytes: int) -> "Chunks":
        """The chunks that so much memory gives."""
        head = OutputHead(weight=problem.weight)
        made = LogitChunks(head, problem.hidden, len(problem.weight), 1.0, max_bytes)
        return Chunks(max_bytes, made.num_rows)


def _fused(kind: str, problem: Problem, chunks: Chunks) -> Tensor:
    head = OutputHead(weight=problem.weight)
    objective = Objective(kind=kind, beta=JSD if kind == "jsd" else None)
    limit = chunks.max_bytes
    found = fused_loss(problem.hidden, head, problem.target, objective, max_bytes=limit)
    return found.total / len(problem.hidden)


def _chunked_cross_entropy(problem: Problem, chunks: Chunks) -> Tensor:
    found: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        problem.hidden, problem.weight, problem.target.sampled_id, chunks.rows
    )
    return found


def _plain(problem: Problem, chunks: Chunks) -> Tensor:
    return divergence(problem.hidden @ problem.weight.T, problem.target).mean()


def _dense(problem: Problem, chunks: Chunks) -> Tensor:
    """Both sides' logits over the whole vocabulary at once, as a plain loop with a live teacher has
    them."""
    with torch.no_grad():
        teacher_logits = problem.teacher_hidden @ problem.teacher_weight.T
    student_logits = problem.hidden @ problem.weight.T
    teacher, student = teacher_logits.log_softmax(1), student_logits.log_softmax(1)
    losses = functional.kl_div(student, teacher, reduction="none", log_target=True)
    return losses.sum(1).mean()


def _cross_entropy(problem: Problem, chunks: Chunks) -> Tensor:
    return functional.cross_entropy(problem.hidden @ problem.weight.T, problem.target.sampled_id)


def _trl(beta: float, problem: Problem, chunks: Chunks) -> Tensor:
    trainer: Any = importlib.import_module("trl.trainer.distillation_trainer")
    loss: Tensor = trainer._chunked_divergence_loss(
        problem.hidden[None],
        problem.teacher_hidden[None],
        problem.weight,
        problem.teacher_weight,
        problem.target.mask[None],
        beta,
    )[0]
    return loss


def _liger(problem: Problem, chunks: Chunks) -> Tensor:
    """Its loss in plain PyTorch: the one in Triton needs a GPU."""
    module: Any = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    found: Tensor = module.LigerFusedLinearJSDLoss(0.0, 1.0, beta=JSD, compiled=False)(
        problem.hidden,
        problem.weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.target.sampled_id,
    )
    return found


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy with its gradients found in the forward pass, a chunk of positions at a time,
    in buffers that are used again: what a loss over the vocabulary costs at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, label: Tensor, rows: int) -> Tensor:
        """Walk over the chunks."""
        count, total = len(hidden), hidden.new_zeros(())
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(rows, count), len(weight))
        for start in range(0, count, rows):
            chunk, ids = hidden[start : start + rows], label[start : start + rows, None]
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
            logprob = torch.log_softmax(logits, 1, out=logits)
            total -= logprob.gather(1, ids).sum()
            gradient = logprob.exp_()
            gradient.scatter_add_(1, ids, gradient.new_full(ids.shape, -1.0))
            torch.mm(gradient, weight, out=hidden_grad[start : start + rows])
            weight_grad.addmm_(gradient.T, chunk, alpha=1 / count)
        hidden_grad.mul_(1 / count)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what was found."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad.mul_(grads[0]), weight_grad.mul_(grads[0]), None, None


COMPUTE: dict[str, Callable[[Problem, Chunks], Tensor]] = {
    "chunked cross-entropy": _chunked_cross_entropy,
    "fused, forward KL": partial(_fused, "forward"),
    "fused, reverse KL": partial(_fused, "reverse"),
    "fused, JSD": partial(_fused, "jsd"),
    "TRL chunked, forward KL": partial(_trl, 0.0),
    "TRL chunked, JSD": partial(_trl, JSD),
    "Liger chunked, JSD": _liger,
    "cross-entropy": _cross_entropy,
    "plain reference, forward KL": _plain,
    "dense teacher, forward KL": _dense,
}
"""The mean loss, nats a position, () float32 with gradient, by the name of the way."""
