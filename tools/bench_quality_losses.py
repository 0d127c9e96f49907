"""Losses that the product does not have, for the quality study's controls: the teacher's scores of
other positions, and reverse KL whose tail is left out."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from stillroom.replay.batch import MicroBatch, idle_micro_batch
from stillroom.train.fused import FusedLoss
from stillroom.train.objectives import cross_entropy, kl_terms, sampled_logprob
from stillroom.train.replay_loss import ReplayLoss, StepCount
from stillroom.train.student import to_target
from stillroom.train.student_buckets import masses
from stillroom.train.target import teacher_buckets


@dataclass(frozen=True, slots=True, eq=False)
class ShuffledLoss(ReplayLoss):
    """The loss against the teacher's scores of other positions of the same micro-batch."""

    def __call__(self, micro: MicroBatch | None, count: StepCount, scale: float = 1.0) -> FusedLoss:
        """As `ReplayLoss`."""
        return ReplayLoss.__call__(self, micro and shuffled(micro), count, scale)


def shuffled(micro: MicroBatch) -> MicroBatch:
    """The micro-batch with the teacher's rows in another order, the same for equal sizes. A sampled
    token has the score of its new row, or, where it is not in it, far less than the row's tail."""
    at = np.random.default_rng(micro.num_positions).permutation(micro.num_positions)
    ids, logprob, tail = micro.topk_id[at], micro.topk_logprob[at], micro.tail_logprob[at]
    hit = ids == micro.sampled_id[:, None]
    inside = np.where(hit, logprob, 0).sum(1, dtype=np.float32)
    return replace(
        micro,
        topk_id=ids,
        topk_logprob=logprob,
        tail_logprob=tail,
        sampled_logprob=np.where(hit.any(1), inside, tail - np.float32(5)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedReverseLoss(ReplayLoss):
    """Reverse KL over the tokens that the teacher scored, as if they were all there are:

        sum_v s_v (log s_v - log t_v)

    It is least where the student has moved most of its probability off those tokens.
    """

    def __call__(self, micro: MicroBatch | None, count: StepCount, scale: float = 1.0) -> FusedLoss:
        """As `ReplayLoss`, from whole logits."""
        logits = self.student(idle_micro_batch() if micro is None else micro)
        if micro is None:
            nothing = logits.detach()[:0, 0]
            return FusedLoss(logits.sum() * 0, nothing, nothing, nothing, nothing)
        target, size = to_target(micro, logits.device), self.identity.vocab_size
        temperature = self.identity.temperature
        logits = logits[:, :size].float()
        both = masses(logits, teacher_buckets(target, size), temperature)
        value = both.spread(
            kl_terms(both.student[:, :-1], both.teacher[:, :-1]).sum(1), len(target)
        )
        tail = both.spread(both.student[:, -1], len(target))
        with torch.no_grad():
            crossed = cross_entropy(logits, target, temperature)
            sampled = sampled_logprob(logits, target.sampled_id, temperature)
        total = value.sum() / count.positions * scale
        return FusedLoss(total, value.detach(), crossed, sampled, tail.detach())
