"""The closed forms, through the gradient by the logits, against autograd's of the references."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stillroom.train.bucket_softmax import make_gradient, take_scores, tokens_of
from stillroom.train.coefficients import coefficients
from stillroom.train.estimators import objective_loss
from stillroom.train.objective import Objective
from stillroom.train.target import TeacherTarget
from stillroom.train.teacher_side import TeacherSide
from stillroom.train.testing import exact_target
from tests.train.fused_cases import (
    DIVERGENCE_CASES,
    OBJECTIVES,
    assert_near,
    name_of,
    rows,
    target_for,
)

every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
every_divergence = pytest.mark.parametrize("objective", DIVERGENCE_CASES, ids=name_of)
every_precision = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)


def closed_form(
    logits: Tensor, target: TeacherTarget, objective: Objective, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Values (T,) and their gradients (T, V) by the logits."""
    buffer = logits / temperature
    teacher = TeacherSide.of(objective, target, logits.shape[1])
    token_id = tokens_of(teacher, target.sampled_id)
    scores = take_scores(buffer, teacher, token_id)
    made = coefficients(objective, teacher, scores.student)
    make_gradient(buffer, scores, made, None, None, 1.0 / temperature)
    return made.value, buffer


def reference(
    logits: Tensor, target: TeacherTarget, objective: Objective, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    logits = logits.double().requires_grad_()
    loss = objective_loss(logits, target, objective, temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def assert_equal(
    logits: Tensor,
    target: TeacherTarget,
    objective: Objective,
    tolerance: float,
    temperature: float = 1.0,
) -> None:
    value, gradient = closed_form(logits, target, objective, temperature)
    wanted = reference(logits, target, objective, temperature)
    assert value.dtype == gradient.dtype == logits.dtype
    assert_near(value, wanted[0], tolerance)
    assert_near(gradient, wanted[1], tolerance)
    assert float(gradient.sum(1).abs().max()) <= 10 * tolerance


@every_objective
@every_precision
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_value_and_gradient_equal_the_reference(
    objective: Objective, dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    student = torch.from_numpy(rows(7, 9, 19)).to(dtype)
    assert_equal(student, target_for(objective, 9, 19), objective, tolerance, temperature)


@every_divergence
@every_precision
@pytest.mark.parametrize("log_tail", [math.log(0.9), -14.0, -50.0, -200.0, -1000.0])
def test_student_tail_of_any_size(
    objective: Objective, dtype: torch.dtype, tolerance: float, log_tail: float
) -> None:
    target = exact_target(rows(2, 3, 16), 4, [1, 2, 3])
    dense = torch.from_numpy(rows(3, 3, 16))
    support = torch.cat([target.topk_id, target.sampled_id[:, None]], dim=1)
    inside = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, support, True)
    log_odds = log_tail - math.log1p(-math.exp(log_tail))
    shift = dense.masked_fill(~inside, -math.inf).logsumexp(1) + log_odds
    shift = shift - dense.masked_fill(inside, -math.inf).logsumexp(1)
    student = torch.where(inside, dense, dense + shift[:, None]).to(dtype)
    assert_equal(student, target, objective, tolerance)


@every_divergence
@every_precision
@pytest.mark.parametrize("num_kept", [1, 11, 12])
def test_from_one_kept_entry_to_the_whole_vocabulary(
    objective: Objective, dtype: torch.dtype, tolerance: float, num_kept: int
) -> None:
    target = exact_target(rows(4, 5, 12), num_kept, [0, 3, 3, 5, 11])
    student = torch.from_numpy(rows(5, 5, 12)).to(dtype)
    assert_equal(student, target, objective, tolerance)


@every_divergence
def test_repeated_and_unused_entries_and_masses_above_one(objective: Objective) -> None:
    target = exact_target(rows(6, 4, 12), 5, [0, 3, 5, 11], [[1, 1, -1]] * 4)
    target.topk_id[0, 3], target.topk_logprob[1, 4] = -1, -math.inf
    target.topk_id[2, 4], target.topk_logprob[2, 4] = (
        target.topk_id[2, 0],
        target.topk_logprob[2, 0],
    )
    target = replace(target, topk_logprob=target.topk_logprob + 2e-3)
    assert_equal(torch.from_numpy(rows(8, 4, 12)), target, objective, 1e-10)


@every_divergence
def test_a_row_without_teacher_scores_is_exactly_zero(objective: Objective) -> None:
    target = exact_target(rows(9, 3, 12), 4, [0, 1, 2])
    target.topk_logprob[1], target.sampled_logprob[1] = -math.inf, -math.inf
    value, gradient = closed_form(torch.from_numpy(rows(10, 3, 12)), target, objective)
    assert float(value[1].abs()) == float(gradient[1].abs().max()) == 0.0
    assert float(value[0].abs()) > 0.0
    assert float(gradient[2].abs().max()) > 0.0


def test_a_residual_only_where_the_sampled_token_is_in_the_tail() -> None:
    objective = Objective(kind="reverse_kl_rb", importance="none")
    target = exact_target(rows(11, 2, 12), 3, [0, 0])
    kept = int(target.topk_id[0, 1])
    outside = next(v for v in range(12) if v not in target.topk_id[1].tolist())
    target = exact_target(rows(11, 2, 12), 3, [kept, outside])
    teacher = TeacherSide.of(objective, target, 12)
    student = torch.from_numpy(rows(12, 2, 12))
    scores = take_scores(student, teacher, tokens_of(teacher, target.sampled_id))
    draw = coefficients(objective, teacher, scores.student).draw
    assert draw[0].tolist() == [0.0]
    assert float(draw[1].abs()) > 0.0
