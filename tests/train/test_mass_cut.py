"""Losses on entries that were cut by mass, from a teacher's logits through a micro-batch."""

from types import ModuleType

import numpy as np
import pytest
import torch

from stillroom.cache.rounded import rounded
from stillroom.cache.schema import Arrays
from stillroom.cache.score_rows import score_columns
from stillroom.cache.summarise import summarise
from stillroom.cache.teacher import ScoreSpec
from stillroom.replay.batch import Row, collate
from stillroom.train.objectives import divergence
from stillroom.train.student import to_target
from stillroom.train.target import TeacherTarget

V, K, P, MASS = 30, 10, 40, 0.8
KINDS = [
    ("forward", None),
    ("reverse", None),
    ("jsd", 0.5),
    ("skew", 0.1),
    ("skew_reverse", 0.1),
    ("mixed", 0.5),
]


@pytest.fixture(scope="module")
def teacher_PV() -> np.ndarray:
    """Logits of the teacher, from nearly uniform to peaked."""
    rng = np.random.default_rng(0)
    return (rng.normal(0, 1, (P, V)) * rng.uniform(0.1, 6, (P, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def target(teacher_PV: np.ndarray) -> TeacherTarget:
    """As a cache stores the positions and a trainer gets them."""
    sampled = np.random.default_rng(1).integers(0, V, P)
    spec = ScoreSpec(topk=K, mass=MASS)
    found = summarise(
        torch.from_numpy(teacher_PV.copy()), torch.from_numpy(sampled), spec, np.zeros(P)
    )
    scores = rounded({name: column.numpy() for name, column in found.items()})
    arrays: Arrays = {
        "token": np.concatenate([[0], sampled]).astype(np.uint32),
        "scored": np.array([0] + [1] * P, np.uint16),
        "behaviour_logprob": np.full(P, np.nan, np.float32),
        "policy_version_min": np.zeros(1, np.int32),
        "source": np.zeros(1, np.uint16),
    }
    batch = collate([Row(0, arrays | score_columns([scores]), 1.0)])
    return to_target(batch, torch.device("cpu"))


@pytest.mark.parametrize(("kind", "param"), KINDS)
def test_unused_entries_are_as_if_they_were_not_there(
    target: TeacherTarget, kind: str, param: float | None
) -> None:
    """Each position again, with just the entries that it has."""
    logits = torch.randn(P, V, generator=torch.Generator().manual_seed(2)).requires_grad_()
    together = divergence(logits, target, kind, param)
    counts = (target.topk_id >= 0).sum(1)
    assert counts.min() == 1
    assert counts.max() == K
    alone = []
    for p in range(P):
        one = target.slice(p, p + 1)
        entries = {n: getattr(one, n)[:, : counts[p]] for n in ("topk_id", "topk_logprob")}
        rest = {n: getattr(one, n) for n in one.__slots__ if n not in entries}
        by_hand = TeacherTarget(**entries, **rest)
        alone.append(divergence(logits[p : p + 1], by_hand, kind, param))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-7)
    both = [torch.autograd.grad(x.sum(), logits)[0] for x in (together, torch.cat(alone))]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "param"), KINDS)
def test_the_loss_is_that_of_the_full_distributions_merged(
    brute_force: ModuleType,
    teacher_PV: np.ndarray,
    target: TeacherTarget,
    kind: str,
    param: float | None,
) -> None:
    """Buckets are the fewest tokens that cover the mass, the sampled one, and all others."""
    student_PV = np.random.default_rng(3).normal(0, 2, (P, V))
    loss = divergence(torch.from_numpy(student_PV), target, kind, param)
    for p in range(P):
        t, s = (brute_force.log_softmax(x[p].astype(np.float64)) for x in (teacher_PV, student_PV))
        order = np.argsort(-t, kind="stable")
        count = min(K, 1 + int((np.exp(t[order]).cumsum() < MASS).sum()))
        inside = [*order[:count].tolist(), int(target.sampled_id[p])]
        parts = brute_force.partition(inside, V)
        wanted = brute_force.divergence(
            brute_force.merge(t, parts), brute_force.merge(s, parts), kind, param
        )
        assert float(loss[p]) == pytest.approx(wanted, rel=0.01, abs=2e-3)
