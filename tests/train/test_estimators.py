"""The estimators against a NumPy twin, and their expectations over every draw that could come."""

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.cache.errors import MismatchError, NumericsError, StillroomError
from stillroom.train.estimators import (
    forward_kl_tail_samples,
    multi_sample_policy_gradient,
    objective_loss,
    policy_gradient,
    reverse_kl_rb,
)
from stillroom.train.objective import ESTIMATORS, KINDS, PARAMETERS, WEIGHTED, Objective
from stillroom.train.objectives import divergence
from stillroom.train.target import TeacherTarget
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


def assert_expected(got: tuple[float, Array], wanted: tuple[float, Array]) -> None:
    assert got[0] == pytest.approx(wanted[0], abs=1e-12)
    np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", WEIGHTED)
def test_the_temperature_of_the_draws_is_in_their_logprobs_alone(kind: str) -> None:
    """Draws at 0.7 stand for draws at the loss's temperature through their behaviour logprobs."""
    teacher, student = rows(23, 3), rows(24, 3)
    target = exact_target(teacher, 2, [0, 3, 6], [[1, 5], [2, 2], [4, 0]], student / 0.7)
    given = torch.full((3,), 0.7, dtype=torch.float64)
    known = loss_and_gradient(
        student, replace(target, sampling_temperature=given), Objective(kind=kind)
    )
    unknown = loss_and_gradient(student, target, Objective(kind=kind))
    for got, wanted in zip(known, unknown, strict=True):
        assert torch.equal(got, wanted)


def test_unused_draws_are_left_out_of_the_mean() -> None:
    objective = Objective(kind="multi_sample_policy_gradient")
    student, teacher, behaviour = rows(1, 3), rows(2, 3), rows(3, 3)
    target = exact_target(teacher, 2, [0, 1, 2], [[4, 5, -1], [6, -1, -1], [-1] * 3], behaviour)
    loss, gradient = loss_and_gradient(student, target, objective)
    for row, draws in enumerate([[4, 5], [6]]):
        alone = [
            loss_and_gradient(
                student[row : row + 1],
                exact_target(
                    teacher[row : row + 1], 2, [draw], behaviour_logits=behaviour[row : row + 1]
                ),
                Objective(kind="policy_gradient"),
            )
            for draw in draws
        ]
        assert loss[row].item() == pytest.approx(np.mean([a[0].item() for a in alone]))
        torch.testing.assert_close(gradient[row], torch.cat([a[1] for a in alone]).mean(0))
    assert loss[2].item() == gradient[2].abs().max().item() == 0.0


WEIGHTS = [
    {"importance": "none"},
    {"importance": "full"},
    {"importance": "tis", "importance_cap": 1.5},
    {"importance": "icepop", "importance_range": (0.7, 1.6)},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: w["importance"])
@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize(("clip", "baseline"), [(None, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize(("temperature", "sampling"), [(1.0, None), (0.7, 1.3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["f64", "f32"]
)
def test_values_and_gradients_equal_the_twin(
    brute_force: ModuleType,
    weights: dict[str, Any],
    kind: str,
    clip: float | None,
    baseline: bool,
    temperature: float,
    sampling: float | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    if kind == "reverse_kl_rb":
        clip, baseline = None, False
    if weights["importance"] == "none":
        clip = None
    objective = Objective(kind=kind, clip_range=clip, baseline=baseline, **weights)
    teacher, behaviour = rows(5, 5), rows(6, 5)
    student = torch.from_numpy(rows(7, 5)).to(dtype)
    extra = [[1, 1, 2], [3, -1, 4], [0, 5, 6], [6, 6, 6], [2, 3, -1]]
    target = exact_target(teacher, 2, [0, 1, 2, 3, 6], extra, behaviour)
    if sampling is not None:
        given = torch.tensor([sampling, NAN, sampling, sampling, NAN], dtype=torch.float64)
        target = replace(target, sampling_temperature=given)
    loss, gradient = loss_and_gradient(student, target, objective, temperature)
    assert loss.dtype == gradient.dtype == dtype
    for row in range(5):
        value, wanted = expected_row(
            brute_force, teacher, behaviour, student, target, objective, temperature, row
        )
        assert loss[row].item() == pytest.approx(value, abs=tolerance * (1 + abs(value)))
        np.testing.assert_allclose(gradient[row], wanted, rtol=tolerance, atol=tolerance)
        assert abs(gradient[row].sum().item()) < 10 * tolerance


def expected_row(
    twin: ModuleType,
    teacher: Array,
    behaviour: Array,
    student: Tensor,
    target: TeacherTarget,
    objective: Objective,
    temperature: float,
    row: int,
) -> tuple[float, Array]:
    t, b = twin.log_softmax(teacher[row]), twin.log_softmax(behaviour[row])
    zs = student[row].double().numpy()
    acted = twin.log_softmax(zs / temperature)
    tokens = [int(target.sampled_id[row])]
    if objective.kind == "multi_sample_policy_gradient":
        assert target.extra_id is not None
        tokens = [token for token in target.extra_id[row].tolist() if token >= 0]
    limits = objective.importance, objective.importance_cap, objective.importance_range
    draws = [(v, t[v], twin.weight(acted[v] - b[v], *limits)) for v in tokens]
    kept = target.topk_id[row].tolist()
    buckets = twin.partition(kept, V)
    masses = twin.merge(t, buckets)
    expected: tuple[float, Array]
    if objective.kind == "reverse_kl_rb":
        expected = twin.reverse_kl_rb(masses, zs, buckets, draws[0], temperature)
    else:
        merged = twin.merge(twin.log_softmax(zs / temperature), buckets)
        baseline = -twin.kl(merged, masses) if objective.baseline else 0.0
        clip = objective.clip_range
        expected = twin.policy_gradient(zs, draws, clip, baseline, temperature)
    return expected


def test_from_a_rounded_cache(brute_force: ModuleType) -> None:
    """Masses that sum to 1.003 are scaled for draws from the tail, and not for Rao-Blackwell."""
    zs = rows(8, 1)[0]
    entries, tail, sampled = [(2, -0.2412109375), (5, -2.0)], -2.5, (3, -3.25)
    target = TeacherTarget(
        topk_id=torch.tensor([[2, 2**32 - 1, 5, 2]]),
        topk_logprob=torch.tensor([[-0.2412109375, -INF, -2.0, -0.2412109375]]),
        tail_logprob=torch.tensor([tail]),
        sampled_id=torch.tensor([3]),
        sampled_logprob=torch.tensor([-3.25]),
        behaviour_logprob=torch.tensor([-1.0]),
        mask=torch.ones(1, dtype=torch.bool),
        extra_id=torch.tensor([[4, 0, 4]]),
        extra_logprob=torch.tensor([[-5.0, -4.0, -5.0]]),
    )
    buckets = [[2], [5], [0, 1, 3, 4, 6]]
    raw = brute_force.stored_masses(entries, tail, V, num_drawn=0, normalise=False)
    masses = np.array([raw[2], raw[5], raw[-1]])
    assert np.exp(masses).sum() > 1.002
    w = brute_force.weight(brute_force.log_softmax(zs)[3] + 1.0, "full")
    value, gradient = loss_and_gradient(zs[None], target, Objective(kind="reverse_kl_rb"))
    wanted = brute_force.reverse_kl_rb(masses, zs, buckets, (*sampled, w))
    assert_expected((value.item(), gradient[0].numpy()), wanted)
    scaled = masses - np.logaddexp.reduce(masses)
    value, gradient = loss_and_gradient(zs[None], target, Objective(kind="forward_kl_tail_samples"))
    draws = [(4, -5.0), (0, -4.0), (4, -5.0)]
    wanted = brute_force.forward_kl_tail_samples(scaled, zs, [2, 5], draws)
    assert_expected((value.item(), gradient[0].numpy()), wanted)


def objectives() -> list[Objective]:
    values: list[dict[str, Any]] = [{PARAMETERS[k]: 0.3} if k in PARAMETERS else {} for k in KINDS]
    return [Objective(kind=k, **v) for k, v in zip(KINDS, values, strict=True)]


every_objective = pytest.mark.parametrize("objective", objectives(), ids=lambda o: o.kind)


def tail_or_student(objective: Objective, seed: int, num_rows: int) -> TeacherTarget:
    """A target with what the objective needs; extra ids are the least likely tokens."""
    teacher, behaviour = rows(seed, num_rows), rows(seed + 1, num_rows)
    extra = np.argsort(teacher, axis=1)[:, :2].tolist()
    return exact_target(teacher, 3, [i % V for i in range(num_rows)], extra, behaviour)


@every_objective
def test_masked_rows_are_never_read(objective: Objective) -> None:
    target, student = tail_or_student(objective, 10, 5), torch.from_numpy(rows(12, 5))
    target = replace(target, sampling_temperature=torch.full((5,), 1.5))
    alone = loss_and_gradient(student, target, objective)
    target.mask[:] = torch.tensor([True, False, True, False, False])
    for name in ("topk_logprob", "tail_logprob", "sampled_logprob", "behaviour_logprob"):
        getattr(target, name)[~target.mask] = NAN
    for name in ("extra_logprob", "extra_behaviour_logprob", "sampling_temperature"):
        getattr(target, name)[~target.mask] = -INF
    assert target.extra_id is not None
    target.extra_id[1], target.topk_id[1], target.sampled_id[3] = 2**40, 2**40, -100
    student[1], student[3], student[4] = NAN, INF, -INF
    loss, gradient = loss_and_gradient(student, target, objective)
    assert loss[~target.mask].tolist() == [0.0] * 3
    assert gradient[~target.mask].abs().max().item() == 0.0
    assert torch.equal(loss[target.mask], alone[0][target.mask])
    assert torch.equal(gradient[target.mask], alone[1][target.mask])


@every_objective
@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("extra", [True, False])
def test_nothing_scored_is_a_connected_zero(
    objective: Objective, num_rows: int, extra: bool
) -> None:
    target = tail_or_student(objective, 13, 3).slice(0, num_rows)
    if not extra:
        target = replace(target, extra_id=None, extra_logprob=None, extra_behaviour_logprob=None)
    target.mask[:] = False
    student = torch.full((num_rows, V), NAN, requires_grad=True)
    loss = objective_loss(student, target, objective)
    assert loss.tolist() == [0.0] * num_rows
    assert torch.equal(torch.autograd.grad(loss.sum(), student)[0], torch.zeros(num_rows, V))


@every_objective
def test_padded_columns_take_no_part(objective: Objective) -> None:
    target, student = tail_or_student(objective, 14, 4), torch.from_numpy(rows(16, 4))
    padded = torch.cat([student, torch.full((4, 3), 60.0)], dim=1)
    loss, gradient = loss_and_gradient(student, target, objective, 0.8)
    wide, wide_gradient = loss_and_gradient(padded, target, objective, 0.8, vocab_size=V)
    assert torch.equal(loss, wide)
    assert torch.equal(wide_gradient, torch.cat([gradient, torch.zeros(4, 3)], dim=1))


@every_objective
@pytest.mark.parametrize("log_tail", [-0.1, -14.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_student_tail_of_any_size(
    objective: Objective, log_tail: float, dtype: torch.dtype
) -> None:
    target = tail_or_student(objective, 17, 3)
    student = torch.from_numpy(rows(19, 3))
    kept = torch.zeros(3, V, dtype=torch.bool).scatter_(1, target.topk_id, True)
    student = torch.where(kept, student, student + log_tail).to(dtype)
    loss, gradient = loss_and_gradient(student, target, objective)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.sum(1).abs().max().item() < 1e3 * torch.finfo(dtype).eps * (
        1 + loss.abs().max().item()
    )


def test_dispatch_is_by_kind() -> None:
    target, student = tail_or_student(Objective(), 20, 4), torch.from_numpy(rows(22, 4))
    functions = {
        "policy_gradient": policy_gradient,
        "multi_sample_policy_gradient": multi_sample_policy_gradient,
        "reverse_kl_rb": reverse_kl_rb,
        "forward_kl_tail_samples": forward_kl_tail_samples,
    }
    assert set(functions) == set(ESTIMATORS)
    for kind, function in functions.items():
        objective = Objective(kind=kind)
        wanted = function(student, target, objective, 0.9)
        assert torch.equal(objective_loss(student, target, objective, 0.9), wanted)
    renormalised = objective_loss(student, target, Objective(kind="jsd", beta=0.1, mode="renorm"))
    assert torch.equal(renormalised, divergence(student, target, "jsd", 0.1, "renorm"))


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("policy_gradient", {"behaviour_logprob": None}, MismatchError, "importance='none'"),
        ("reverse_kl_rb", {"behaviour_logprob": None}, MismatchError, "importance='none'"),
        (
            "multi_sample_policy_gradient",
            {"extra_behaviour_logprob": None},
            MismatchError,
            "importance='none'",
        ),
        ("policy_gradient", {"behaviour_logprob": [-1, -1, NAN]}, NumericsError, "row 2.*'none'"),
        ("policy_gradient", {"sampled_logprob": [-2, -INF, -2]}, NumericsError, "row 1.*-inf"),
        ("policy_gradient", {"sampling_temperature": [1, 0, 1]}, MismatchError, "row 1.*above 0"),
        ("policy_gradient", {"sampled_id": [0, 1, V]}, MismatchError, "row 2.*got 7"),
        ("multi_sample_policy_gradient", {"extra_id": None}, MismatchError, "extra_kind student"),
        ("forward_kl_tail_samples", {"extra_id": None}, MismatchError, "extra_kind tail"),
        ("forward_kl_tail_samples", {"extra_id": [[6], [-1], [6]]}, MismatchError, "row 1.*none"),
        (
            "forward_kl_tail_samples",
            {"extra_id": [[6], [6], [1]], "extra_logprob": [[-2], [-2], [math.log(0.2)]]},
            MismatchError,
            "row 2.*kept",
        ),
        (
            "forward_kl_tail_samples",
            {"extra_logprob": [[-2], [-INF], [-2]]},
            NumericsError,
            "row 1.*-inf",
        ),
        ("multi_sample_policy_gradient", {"extra_id": [[6], [V], [6]]}, MismatchError, "got 7"),
    ],
)
def test_what_an_estimator_needs_is_asked_for(
    kind: str, changes: dict[str, Any], error: type[StillroomError], message: str
) -> None:
    target = TeacherTarget(
        topk_id=torch.tensor([[0, 1]] * 3),
        topk_logprob=torch.tensor([[0.5, 0.2]] * 3).log(),
        tail_logprob=torch.tensor([0.3] * 3).log(),
        sampled_id=torch.tensor([2, 3, 4]),
        sampled_logprob=torch.tensor([-2.0] * 3),
        behaviour_logprob=torch.tensor([-1.0] * 3),
        mask=torch.ones(3, dtype=torch.bool),
        extra_id=torch.tensor([[6]] * 3),
        extra_logprob=torch.tensor([[-2.0]] * 3),
        extra_behaviour_logprob=torch.tensor([[-1.0]] * 3),
    )
    objective, student = Objective(kind=kind), torch.zeros(3, V)
    assert objective_loss(student, target, objective).isfinite().all()
    if changes.get("extra_id", True) is None:
        changes = changes | {"extra_logprob": None, "extra_behaviour_logprob": None}
    dtypes = {name: torch.int64 if name.endswith("id") else torch.float32 for name in changes}
    tensors: dict[str, Any] = {
        name: None if value is None else torch.tensor(value, dtype=dtypes[name])
        for name, value in changes.items()
    }
    with pytest.raises(error, match=message):
        objective_loss(student, replace(target, **tensors), objective)
