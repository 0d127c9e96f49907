"""What an objective needs of the teacher: refused as the references refuse it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.cache.errors import MismatchError, NumericsError, StillroomError
from stillroom.train.estimators import objective_loss
from stillroom.train.objective import WEIGHTED, Objective
from stillroom.train.target import TeacherTarget
from stillroom.train.teacher_side import TeacherSide
from tests.train.fused_cases import OBJECTIVES, name_of, target_for

VOCAB = 9


def refusal(target: TeacherTarget, objective: Objective) -> StillroomError:
    """What is raised, which is what the reference raises too."""
    with pytest.raises(StillroomError) as plain:
        objective_loss(torch.zeros(len(target), VOCAB), target, objective)
    with pytest.raises(StillroomError) as fused:
        TeacherSide.of(objective, target, VOCAB)
    assert str(fused.value) == str(plain.value)
    assert type(fused.value) is type(plain.value)
    return fused.value


def changed(tensor: Tensor | None, value: Any, row: int = 4) -> Tensor:
    assert tensor is not None
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
def test_draws_without_randomness(kind: str, temperature: float) -> None:
    objective = Objective(kind=kind)
    target = target_for(objective, 6, VOCAB, num_kept=1)
    wrong = torch.full((6,), temperature)
    error = refusal(replace(target, sampling_temperature=wrong), objective)
    assert isinstance(error, MismatchError)
    TeacherSide.of(Objective(kind=kind, importance="none"), target, VOCAB)


@pytest.mark.parametrize("kind", WEIGHTED)
def test_behaviour_logprobs_that_are_missing(kind: str) -> None:
    objective = Objective(kind=kind, importance="tis")
    target = target_for(objective, 6, VOCAB, num_kept=1)
    missing = replace(target, behaviour_logprob=None, extra_behaviour_logprob=None)
    assert isinstance(refusal(missing, objective), MismatchError)
    unknown = torch.full_like(target.sampled_logprob, math.nan)
    extra = changed(target.extra_behaviour_logprob, math.nan)
    wrong = replace(target, behaviour_logprob=unknown, extra_behaviour_logprob=extra)
    assert isinstance(refusal(wrong, objective), NumericsError)


@pytest.mark.parametrize("kind", ["policy_gradient", "multi_sample_policy_gradient"])
def test_draws_that_the_teacher_finds_impossible(kind: str) -> None:
    objective = Objective(kind=kind, importance="none")
    target = target_for(objective, 6, VOCAB, num_kept=1)
    sampled = changed(target.sampled_logprob, -math.inf)
    extra = changed(target.extra_logprob, -math.inf)
    kept = changed(target.topk_logprob, -math.inf)
    wrong = replace(target, sampled_logprob=sampled, extra_logprob=extra, topk_logprob=kept)
    assert isinstance(refusal(wrong, objective), NumericsError)


@pytest.mark.parametrize("kind", ["multi_sample_policy_gradient", "forward_kl_tail_samples"])
def test_extra_ids_that_are_missing(kind: str) -> None:
    objective = Objective(kind=kind)
    target = target_for(objective, 6, VOCAB)
    target = replace(target, extra_id=None, extra_logprob=None, extra_behaviour_logprob=None)
    assert isinstance(refusal(target, objective), MismatchError)


def test_draws_that_are_not_the_tail_s() -> None:
    objective = Objective(kind="forward_kl_tail_samples")
    target = target_for(objective, 6, VOCAB)
    assert target.extra_id is not None
    target.extra_id[4, 1] = target.topk_id[4, 0]
    assert target.extra_logprob is not None
    target.extra_logprob[4, 1] = target.topk_logprob[4, 0]
    assert "kept token" in str(refusal(target, objective))
    target.extra_id[4] = -1
    assert "none" in str(refusal(target, objective))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_positions_are_chosen_with_all_that_goes_with_them(objective: Objective) -> None:
    target = target_for(objective, 6, VOCAB)
    row = torch.tensor([4, 0, 5])
    chosen = TeacherSide.of(objective, target, VOCAB).select(row)
    alone = TeacherSide.of(objective, target._map(lambda _, tensor: tensor[row]), VOCAB)
    assert torch.equal(chosen.buckets.logprob, alone.buckets.logprob)
    assert torch.equal(chosen.buckets.token_id, alone.buckets.token_id)
    assert torch.equal(chosen.draws.token_id, alone.draws.token_id)
    assert torch.equal(chosen.draws.used, alone.draws.used)
