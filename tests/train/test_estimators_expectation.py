"""The estimators' expectations, over every draw that could come: what is unbiased, and what is
not."""

import itertools
import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.train.estimators import (
    objective_loss,
)
from stillroom.train.objective import Objective
from stillroom.train.target import TAIL_FLOOR_NATS, TeacherTarget
from stillroom.train.testing import exact_target

Array = NDArray[np.float64]
INF, NAN = math.inf, math.nan
V = 7


def rows(seed: int, num_rows: int, vocab_size: int = V, scale: float = 1.5) -> Array:
    return np.random.default_rng(seed).normal(0.0, scale, (num_rows, vocab_size))


def log_softmax(logits: Array) -> Array:
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def loss_and_gradient(
    student: Array | Tensor, target: TeacherTarget, objective: Objective, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    logits = torch.as_tensor(student).clone().requires_grad_()
    loss = objective_loss(logits, target, objective, *args, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def expectation(
    student: Array, target: TeacherTarget, objective: Objective, probability: Array
) -> tuple[float, Array]:
    """Mean value and gradient at one student row, over draws that are the rows of a target."""
    logits = np.repeat(student[None], len(target), axis=0)
    value, gradient = loss_and_gradient(logits, target, objective)
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    return float(probability @ value.numpy()), probability @ gradient.numpy()


def every_token(behaviour: Array | None, teacher: Array, num_kept: int) -> TeacherTarget:
    """Row v: token v was sampled."""
    many = np.repeat(teacher[None], V, axis=0)
    same = None if behaviour is None else np.repeat(behaviour[None], V, axis=0)
    return exact_target(many, num_kept, list(range(V)), behaviour_logits=same)


def dense(twin: ModuleType, teacher: Array, student: Array, kind: str) -> tuple[float, Array]:
    """Divergence of the full distributions and its gradient."""
    t, s = twin.log_softmax(teacher), twin.log_softmax(student)
    singles = [[v] for v in range(V)]
    return twin.divergence(t, s, kind), twin.gradient(t, student, singles, kind)


def assert_expected(got: tuple[float, Array], wanted: tuple[float, Array]) -> None:
    assert got[0] == pytest.approx(wanted[0], abs=1e-12)
    np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-12)


TEACHER, STUDENT, BEHAVIOUR = rows(0, 3)
REVERSE = [
    Objective(kind="policy_gradient"),
    Objective(kind="policy_gradient", baseline=True),
    Objective(kind="reverse_kl_rb"),
]


@pytest.mark.parametrize("objective", REVERSE, ids=["plain", "baseline", "rb"])
@pytest.mark.parametrize("num_kept", [0, 1, 3, V])
def test_one_draw_with_full_weights_is_unbiased_for_reverse_kl(
    brute_force: ModuleType, objective: Objective, num_kept: int
) -> None:
    target = every_token(BEHAVIOUR, TEACHER, num_kept)
    got = expectation(STUDENT, target, objective, np.exp(log_softmax(BEHAVIOUR)))
    assert_expected(got, dense(brute_force, TEACHER, STUDENT, "reverse"))


@pytest.mark.parametrize("objective", REVERSE, ids=["plain", "baseline", "rb"])
def test_on_policy_no_weights_are_needed(brute_force: ModuleType, objective: Objective) -> None:
    unweighted = replace(objective, importance="none")
    target = every_token(None, TEACHER, 2)
    got = expectation(STUDENT, target, unweighted, np.exp(log_softmax(STUDENT)))
    assert_expected(got, dense(brute_force, TEACHER, STUDENT, "reverse"))


@pytest.mark.parametrize("kind", ["policy_gradient", "reverse_kl_rb"])
def test_off_policy_no_weights_are_biased(brute_force: ModuleType, kind: str) -> None:
    target = every_token(BEHAVIOUR, TEACHER, 2)
    unweighted = Objective(kind=kind, importance="none")
    got = expectation(STUDENT, target, unweighted, np.exp(log_softmax(BEHAVIOUR)))
    wanted = dense(brute_force, TEACHER, STUDENT, "reverse")
    assert abs(got[0] - wanted[0]) > 0.02
    assert np.abs(got[1] - wanted[1]).max() > 0.02


def test_draws_at_another_temperature_are_weighted_too(brute_force: ModuleType) -> None:
    """The student's own text at 0.7, and the loss at 1."""
    target = every_token(STUDENT / 0.7, TEACHER, 2)
    given = torch.full((V,), 0.7, dtype=torch.float64)
    target = replace(target, sampling_temperature=given)
    got = expectation(
        STUDENT, target, Objective(kind="reverse_kl_rb"), np.exp(log_softmax(STUDENT / 0.7))
    )
    assert_expected(got, dense(brute_force, TEACHER, STUDENT, "reverse"))


def test_truncated_weights_with_a_baseline_are_biased_by_it(brute_force: ModuleType) -> None:
    """The reason to leave the baseline out there."""
    target = every_token(BEHAVIOUR, TEACHER, 2)
    probability = np.exp(log_softmax(BEHAVIOUR))
    means = [
        expectation(
            STUDENT,
            target,
            Objective(kind="policy_gradient", importance="tis", importance_cap=1.1, baseline=b),
            probability,
        )
        for b in (False, True)
    ]
    assert means[0][0] == means[1][0]
    assert np.abs(means[0][1] - means[1][1]).max() > 0.01


def test_the_stored_tail_does_not_matter_to_rao_blackwell(brute_force: ModuleType) -> None:
    exact = every_token(BEHAVIOUR, TEACHER, 2)
    wanted = dense(brute_force, TEACHER, STUDENT, "reverse")
    for wrong in (-0.5, 0.02, -30.0, -INF):
        target = replace(exact, tail_logprob=(exact.tail_logprob + wrong).clamp(max=0.0))
        got = expectation(
            STUDENT, target, Objective(kind="reverse_kl_rb"), np.exp(log_softmax(BEHAVIOUR))
        )
        assert_expected(got, wanted)


def test_rao_blackwell_has_less_variance() -> None:
    probability = np.exp(log_softmax(BEHAVIOUR))
    spreads = []
    for objective in REVERSE:
        logits = np.repeat(STUDENT[None], V, axis=0)
        target = every_token(BEHAVIOUR, TEACHER, 4)
        _, gradient = loss_and_gradient(logits, target, objective)
        mean = probability @ gradient.numpy()
        spreads.append(float(probability @ ((gradient.numpy() - mean) ** 2).sum(1)))
    assert spreads[2] < 0.5 * spreads[0]


def test_a_frozen_advantage_would_be_biased(brute_force: ModuleType) -> None:
    """With log t - log b in place of log t - log s the gradient is off by that of KL(s || b)."""
    t, s, b = (log_softmax(x) for x in (TEACHER, STUDENT, BEHAVIOUR))
    frozen = np.zeros(V)
    for v in range(V):
        frozen -= np.exp(s[v]) * (t[v] - b[v]) * brute_force.score(STUDENT, v)
    to_teacher = dense(brute_force, TEACHER, STUDENT, "reverse")[1]
    to_behaviour = dense(brute_force, BEHAVIOUR, STUDENT, "reverse")[1]
    np.testing.assert_allclose(frozen, to_teacher - to_behaviour, rtol=0, atol=1e-12)
    assert np.abs(to_behaviour).max() > 0.05


@pytest.mark.parametrize(
    ("through", "wanted"), [("k1", None), ("k2", "reverse"), ("k3", "forward")]
)
def test_backpropagating_through_kl_estimates(
    brute_force: ModuleType, through: str, wanted: str | None
) -> None:
    """Why the surrogate differs from the value: on-policy k1 teaches nothing, and k3 gives another
    divergence's gradient."""
    logits = torch.from_numpy(STUDENT).requires_grad_()
    log_ratio = logits.log_softmax(0) - torch.from_numpy(log_softmax(TEACHER))
    estimates = {
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": (-log_ratio).exp() - 1 + log_ratio,
    }
    probability = logits.detach().softmax(0)
    (gradient,) = torch.autograd.grad((probability * estimates[through]).sum(), logits)
    right = np.zeros(V) if wanted is None else dense(brute_force, TEACHER, STUDENT, wanted)[1]
    np.testing.assert_allclose(gradient.numpy(), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_mean_over_draws_is_unbiased_and_counts_repeats(
    brute_force: ModuleType, baseline: bool
) -> None:
    pairs = list(itertools.product(range(V), repeat=2))
    many = [np.repeat(x[None], len(pairs), axis=0) for x in (TEACHER, BEHAVIOUR)]
    target = exact_target(many[0], 2, [0] * len(pairs), [list(pair) for pair in pairs], many[1])
    b = np.exp(log_softmax(BEHAVIOUR))
    probability = np.array([b[i] * b[j] for i, j in pairs])
    objective = Objective(kind="multi_sample_policy_gradient", baseline=baseline)
    got = expectation(STUDENT, target, objective, probability)
    assert_expected(got, dense(brute_force, TEACHER, STUDENT, "reverse"))


@pytest.mark.parametrize("num_kept", [0, 1, 4])
def test_draws_from_the_teachers_tail_are_unbiased_for_forward_kl(
    brute_force: ModuleType, num_kept: int
) -> None:
    t = log_softmax(TEACHER)
    tail = np.argsort(-t)[num_kept:].tolist()
    within = np.exp(t[tail]) / np.exp(t[tail]).sum()
    pairs = list(itertools.product(range(len(tail)), repeat=2))
    probability = np.array([within[i] * within[j] for i, j in pairs])
    for sampled in (tail[0], int(t.argmax())):
        target = exact_target(
            np.repeat(TEACHER[None], len(pairs), axis=0),
            num_kept,
            [sampled] * len(pairs),
            [[tail[i], tail[j]] for i, j in pairs],
        )
        objective = Objective(kind="forward_kl_tail_samples")
        got = expectation(STUDENT, target, objective, probability)
        assert_expected(got, dense(brute_force, TEACHER, STUDENT, "forward"))


def test_without_a_tail_no_draws_are_needed(brute_force: ModuleType) -> None:
    target = exact_target(TEACHER[None], V, [0], [[-1, -1]])
    value, gradient = loss_and_gradient(
        STUDENT[None], target, Objective(kind="forward_kl_tail_samples")
    )
    got = value.item(), gradient[0].numpy()
    assert_expected(got, dense(brute_force, TEACHER, STUDENT, "forward"))


def test_rao_blackwell_floors_the_teachers_tail() -> None:
    """A stored tail of nothing leaves a finite loss."""
    unlikely = int(TEACHER.argmin())
    target = every_token(BEHAVIOUR, TEACHER, 2).slice(unlikely, unlikely + 1)
    target.tail_logprob[:] = -INF
    value, _ = loss_and_gradient(STUDENT[None], target, Objective(kind="reverse_kl_rb"))
    floored = replace(target, tail_logprob=torch.tensor([TAIL_FLOOR_NATS], dtype=torch.float64))
    again, _ = loss_and_gradient(STUDENT[None], floored, Objective(kind="reverse_kl_rb"))
    assert math.isfinite(value.item())
    assert value.item() == pytest.approx(again.item(), abs=1e-12)
