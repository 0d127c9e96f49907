"""The loss of a packed micro-batch, already divided by the scored tokens of its whole step.

Shapes: P scored positions of the micro-batch.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from stillroom.cache.errors import MismatchError
from stillroom.cache.identity import Identity
from stillroom.cache.schema import SOURCES
from stillroom.replay.batch import MicroBatch, idle_micro_batch
from stillroom.train.fused import FusedLoss, fused_loss
from stillroom.train.objective import DIVERGENCES, Objective
from stillroom.train.output_head import OutputHead
from stillroom.train.student import Student, to_target

NEEDS_EXTRA = {"multi_sample_policy_gradient": "student", "forward_kl_tail_samples": "tail"}
"""Whose extra ids the cache must hold for a kind of objective."""
DRAWN = "multi_sample_policy_gradient"
"""The kind whose extra ids must be draws of the sampling policy."""


@dataclass(frozen=True, slots=True)
class StepCount:
    """What the losses of a step are divided by."""

    positions: int
    """N, its scored tokens on all ranks; 0 gives a loss of 0."""
    cross_entropy: int = 0
    """Those of them that cross-entropy is taken on."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplayLoss:
    """A student's loss on micro-batches of one cache; call it inside `Parallel.run`.

    Raises:
        MismatchError: the objective needs extra ids that the cache does not hold.
    """

    student: Student
    identity: Identity
    objective: Objective
    max_bytes: int = 1 << 28
    """Memory beyond hidden states, head and their gradients."""
    bf16: bool = False
    """Whether products are in bfloat16."""

    def __post_init__(self) -> None:
        """Refuse a cache without the extra ids that the objective is made of."""
        kind, held = self.objective.kind, self.identity.extra_kind
        needed = NEEDS_EXTRA.get(kind, held)
        if held != needed:
            do = "Make a cache with --extra and --extra-kind, or choose another objective."
            expected = f"extra ids of kind {needed!r}, which {kind} is made of"
            raise MismatchError("cache", expected, repr(held), do)

    @property
    def takes_extras(self) -> bool:
        """Whether extra ids come into the loss: as buckets, or as what the kind is made of."""
        kind, held = self.objective.kind, self.identity.extra_kind
        return kind in NEEDS_EXTRA or (kind in DIVERGENCES and held == "student")

    def crossed(self, micro: MicroBatch) -> np.ndarray:
        """(P,) bool: the positions that cross-entropy is taken on."""
        if not self.objective.cross_entropy:
            return np.zeros(micro.num_positions, bool)
        codes = [SOURCES.index(name) for name in self.objective.cross_entropy_sources]
        return np.isin(micro.source, codes)

    def __call__(self, micro: MicroBatch | None, count: StepCount, scale: float = 1.0) -> FusedLoss:
        """The micro-batch's part of the step's mean loss, and what goes with it.

        Args:
            micro: None is an idle one, whose loss is 0 with a gradient of zeros, so that this rank
                meets the others.
            count: of the whole step.
            scale: a factor of `total`, such as the number of ranks where gradients are averaged.

        Returns:
            `total` () with a gradient, nats; the rest (P,) without, at each position.

        Raises:
            MismatchError: the objective is made of draws, and extra ids are likeliest tokens.
            StillroomError: as `fused_loss`.
        """
        batch = idle_micro_batch() if micro is None else micro
        self._refuse_likeliest(batch)
        device, objective = self.student.model.device, self.objective
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.student.hidden(batch)
            target = to_target(batch, device, extras=self.takes_extras)
            if micro is None:
                target = replace(target, mask=torch.zeros_like(target.mask))
            weight, crossed = self._weights(batch, count, hidden)
            loss = fused_loss(
                hidden,
                OutputHead.of(self.student.model),
                target,
                objective,
                weight,
                cross_entropy_weight=crossed,
                temperature=self.identity.temperature,
                vocab_size=self.identity.vocab_size,
                max_bytes=self.max_bytes,
            )
        return loss._replace(total=loss.total * scale)

    def _refuse_likeliest(self, micro: MicroBatch) -> None:
        if self.objective.kind == DRAWN and micro.extra_likeliest.any():
            row = int(micro.row[np.argmax(micro.extra_likeliest)])
            do = "Sample with sampler.extra_drawn, or choose a divergence, which takes any ids."
            expected = f"draws of the sampler as extra ids, which {DRAWN} is an expectation over"
            raise MismatchError(f"row {row}, extra_id", expected, "its likeliest tokens", do)

    def _weights(
        self, micro: MicroBatch, count: StepCount, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What each position's loss and cross-entropy are multiplied by, (P,) each."""
        share = self.objective.cross_entropy
        dtype = torch.promote_types(like.dtype, torch.float32)
        own = torch.from_numpy(micro.weight).to(like.device, dtype)
        weight = own * ((1 - share) / max(1, count.positions))
        if not share:
            return weight, None
        crossed = torch.from_numpy(self.crossed(micro)).to(like.device, dtype)
        return weight, own * crossed * (share / max(1, count.cross_entropy))
