"""Scores and gradients in the buffer that held the logits."""

import math

import torch

from stillroom.train.bucket_softmax import logprob_at, make_gradient, take_scores, tokens_of
from stillroom.train.coefficients import coefficients
from stillroom.train.objective import Objective
from stillroom.train.student_buckets import student_bucket_logprob
from stillroom.train.target import teacher_buckets
from stillroom.train.teacher_side import TeacherSide
from stillroom.train.testing import exact_target
from tests.train.fused_cases import assert_near, rows, target_for


def test_scores_are_the_student_s_and_the_tail_s_softmax_stays() -> None:
    target = exact_target(rows(0, 4, 11), 3, [0, 5, 9, 10])
    logits = torch.from_numpy(rows(1, 4, 11))
    buckets = teacher_buckets(target, 11)
    wanted = student_bucket_logprob(logits, buckets)
    inside = torch.zeros(4, 12, dtype=torch.bool).scatter_(1, buckets.token_id, True)[:, :11]
    softmax = logits.masked_fill(inside, -math.inf).softmax(1)
    log_softmax = logits.log_softmax(1)

    teacher = TeacherSide.of(Objective(), target, 11)
    scores = take_scores(logits, teacher, tokens_of(teacher, target.sampled_id))
    assert_near(scores.student.bucket.exp(), wanted.exp(), 1e-12)
    assert_near(logits, softmax, 1e-12)
    assert bool((logits[inside] == 0.0).all())
    assert_near(scores.sampled, log_softmax.gather(1, target.sampled_id[:, None])[:, 0], 1e-12)


def test_rows_whose_buckets_are_the_vocabulary_have_no_tail() -> None:
    target = exact_target(rows(2, 3, 6), 6, [0, 1, 2])
    logits = torch.from_numpy(rows(3, 3, 6)).float()
    teacher = TeacherSide.of(Objective(), target, 6)
    scores = take_scores(logits, teacher, tokens_of(teacher, target.sampled_id))
    assert bool((scores.student.bucket[:, -1] == -math.inf).all())
    assert bool(logits.isfinite().all())


def test_unused_draws_stand_for_the_sampled_token_and_add_nothing() -> None:
    objective = Objective(kind="multi_sample_policy_gradient", importance="none")
    target = target_for(objective, 6, 11)
    assert target.extra_id is not None
    teacher = TeacherSide.of(objective, target, 11)
    token_id = tokens_of(teacher, target.sampled_id)
    unused = target.extra_id < 0
    assert bool(unused.any())
    assert torch.equal(token_id[:, 1:][unused], target.sampled_id[:, None].expand(-1, 4)[unused])
    scores = take_scores(torch.from_numpy(rows(4, 6, 11)), teacher, token_id)
    assert bool((coefficients(objective, teacher, scores.student).draw[unused] == 0.0).all())


def test_logprobs_at_other_temperatures() -> None:
    logits, ratio = torch.from_numpy(rows(5, 3, 7)), torch.tensor([1.0, 0.25, 3.0]).double()
    token_id = torch.tensor([0, 2, 6])
    found = logprob_at(logits, token_id, ratio, torch.empty_like(logits))
    wanted = (logits * ratio[:, None]).log_softmax(1).gather(1, token_id[:, None])
    assert_near(found, wanted.squeeze(1), 1e-12)


def test_cross_entropy_alone_is_softmax_minus_one_hot() -> None:
    target = exact_target(rows(6, 3, 9), 2, [0, 4, 8])
    logits = torch.from_numpy(rows(7, 3, 9))
    wanted = logits.softmax(1)
    wanted[range(3), [0, 4, 8]] -= 1.0
    weight, share = torch.zeros(3).double(), torch.tensor([1.0, 0.0, 2.5]).double()
    teacher = TeacherSide.of(Objective(), target, 9)
    scores = take_scores(logits, teacher, tokens_of(teacher, target.sampled_id))
    made = coefficients(Objective(), teacher, scores.student)
    make_gradient(logits, scores, made, weight, share)
    assert_near(logits, wanted * share[:, None], 1e-12)
