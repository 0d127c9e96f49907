"""The fused loss against the plain references at the ends: no positions, or one; no kept entries,
one, or all of the vocabulary; logits far apart."""

import pytest
import torch

from stillroom.train.estimators import objective_loss
from stillroom.train.fused import fused_loss
from stillroom.train.objective import Objective
from stillroom.train.output_head import OutputHead
from tests.train.fused_cases import OBJECTIVES, assert_near, name_of, rows, target_for

VOCAB = 12
SIZES = ((0, 3), (1, 1), (5, 0), (5, 1), (5, VOCAB - 1), (5, VOCAB))
"""Positions, and kept entries of each."""


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_values_and_gradients_equal_the_references(objective: Objective) -> None:
    for num_rows, num_kept in SIZES:
        if objective.kind == "forward_kl_tail_samples" and num_kept >= VOCAB - 1:
            continue  # its draws are from a tail of several tokens
        target = target_for(objective, max(1, num_rows), VOCAB, num_kept).slice(0, num_rows)
        for scale in (1.0, 60.0, 400.0):
            logits = torch.from_numpy(rows(9, num_rows, VOCAB)) * scale
            hidden, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            head = OutputHead(torch.eye(VOCAB, dtype=torch.float64))
            found = fused_loss(hidden, head, target, objective)
            loss = objective_loss(plain, target, objective)
            assert_near(found.value, loss.detach(), 1e-12)
            (ours,) = torch.autograd.grad(found.total, hidden)
            (theirs,) = torch.autograd.grad(loss.sum(), plain)
            assert_near(ours, theirs, 1e-12)
