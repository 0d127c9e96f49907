"""The bound on the forward KL that a tail hides, against full distributions."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from stillroom.train.hidden_kl import hidden_kl_bound
from stillroom.train.target import TeacherTarget, teacher_buckets
from stillroom.train.testing import exact_target

V = 40


def cut_target(logit_TV: torch.Tensor, sampled_id: torch.Tensor, mass: float) -> TeacherTarget:
    """Entries that cover a mass, of dense float64 rows."""
    logprob = logit_TV.log_softmax(1)
    top, ids = logprob.sort(dim=1, descending=True)
    before = top.exp().cumsum(1) - top.exp()
    kept = before < mass
    rest = logprob.scatter(1, ids, top.masked_fill(kept, -math.inf))
    return TeacherTarget(
        topk_id=ids.masked_fill(~kept, 2**32 - 1),
        topk_logprob=top.masked_fill(~kept, -math.inf),
        tail_logprob=rest.logsumexp(1),
        sampled_id=sampled_id,
        sampled_logprob=logprob.gather(1, sampled_id[:, None]).squeeze(1),
        behaviour_logprob=None,
        mask=torch.ones(len(sampled_id), dtype=torch.bool),
    )


def hidden(brute_force: ModuleType, t: np.ndarray, s: np.ndarray, inside: list[int]) -> float:
    """Full KL less that over buckets, of one position."""
    t, s = brute_force.log_softmax(t), brute_force.log_softmax(s)
    parts = brute_force.partition(inside, V)
    merged = brute_force.kl(brute_force.merge(t, parts), brute_force.merge(s, parts))
    return float(brute_force.kl(t, s) - merged)


@pytest.mark.parametrize("mass", [0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("student", ["near", "far", "uniform", "reversed", "zero"])
def test_nothing_hides_more_than_the_bound(
    brute_force: ModuleType, mass: float, student: str
) -> None:
    rng = np.random.default_rng(0)
    teacher_TV = rng.normal(0, 1, (50, V)) * rng.uniform(0.1, 5, (50, 1))
    student_TV = {
        "near": teacher_TV + rng.normal(0, 0.3, (50, V)),
        "far": rng.normal(0, 4, (50, V)),
        "uniform": np.zeros((50, V)),
        "reversed": -teacher_TV,
        "zero": np.where(teacher_TV < 0, -200.0, teacher_TV),
    }[student]
    sampled_id = torch.from_numpy(rng.integers(0, V, 50))
    target = cut_target(torch.from_numpy(teacher_TV), sampled_id, mass)
    bound = hidden_kl_bound(torch.from_numpy(student_TV), teacher_buckets(target, V))
    ids = torch.cat([target.topk_id, sampled_id[:, None]], 1).tolist()
    exact = [
        hidden(brute_force, teacher_TV[i], student_TV[i], [v for v in ids[i] if v < V])
        for i in range(50)
    ]
    assert all(value + 1e-9 >= 0 for value in exact)
    assert (bound.numpy() >= np.array(exact) - 1e-9).all()
    if mass == 1:
        assert (bound == 0).all()


def test_extra_ids_are_no_entries(brute_force: ModuleType) -> None:
    """The least likely token as an extra id says nothing about what the tail's tokens can be."""
    rng = np.random.default_rng(1)
    teacher_TV, student_TV = rng.normal(0, 1, (20, V)), rng.normal(0, 0.1, (20, V))
    sampled = teacher_TV.argmax(1).tolist()
    extra = teacher_TV.argmin(1)[:, None].tolist()
    buckets = teacher_buckets(exact_target(teacher_TV, 4, sampled, extra), V)
    bound = hidden_kl_bound(torch.from_numpy(student_TV), buckets)
    for i in range(20):
        inside = [token for token in buckets.token_id[i].tolist() if token < V]
        exact = hidden(brute_force, teacher_TV[i], student_TV[i], inside)
        assert exact > 0
        assert bound[i].item() >= exact - 1e-9


def test_the_bound_is_reached() -> None:
    """The teacher has all of its tail on the token that the student thinks least of."""
    teacher = torch.tensor([[0.3, 0.3, 0.3, 0.1, 0.0, 0.0]]).double().log()
    target = TeacherTarget(
        topk_id=torch.tensor([[0, 1, 2]]),
        topk_logprob=teacher[:, :3],
        tail_logprob=teacher[:, 3],
        sampled_id=torch.tensor([0]),
        sampled_logprob=teacher[:, 0],
        behaviour_logprob=None,
        mask=torch.tensor([True]),
    )
    student = torch.tensor([[1.0, 2.0, 0.0, -9.0, 1.0, 0.5]]).double()
    within = student[0, 3:].log_softmax(0)
    bound = hidden_kl_bound(student, teacher_buckets(target, 6))
    assert bound.tolist() == pytest.approx([-0.1 * within[0].item()])


def test_positions_without_scores_hide_nothing() -> None:
    rows = torch.zeros(2, V).double()
    target = cut_target(rows, torch.tensor([0, 0]), 0.5)
    masked = TeacherTarget(
        **{n: getattr(target, n) for n in target.__slots__ if n != "mask"},
        mask=torch.tensor([False, True]),
    )
    bound = hidden_kl_bound(rows, teacher_buckets(masked, V))
    assert bound[0] == 0
    assert bound[1] == pytest.approx(0, abs=1e-3), "uniform on uniform hides nothing"
