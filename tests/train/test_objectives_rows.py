"""Rows that the divergences must not read, or must not stumble over."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stillroom.cache.errors import CorruptError, ShapeError
from stillroom.train.objective import COMPARED
from stillroom.train.objectives import divergence, sampled_logprob, token_mean
from stillroom.train.target import TeacherTarget
from stillroom.train.testing import exact_target

Array = NDArray[np.float64]
INF, NAN = math.inf, math.nan
KINDS: list[tuple[str, float | None]] = [
    ("forward", None),
    ("reverse", None),
    ("jsd", 0.1),
    ("skew", 0.1),
    ("skew_reverse", 0.1),
    ("mixed", 0.3),
]
COMPARISONS = [(*kind, mode) for kind in KINDS for mode in ("tail", "renorm")]
CASES = [*COMPARISONS, *(("forward", None, mode) for mode in COMPARED)]
every_kind = pytest.mark.parametrize(("kind", "param"), KINDS)
every_case = pytest.mark.parametrize(("kind", "param", "mode"), CASES)


def rows(seed: int, num_rows: int, vocab_size: int, scale: float = 2.0) -> Array:
    return np.random.default_rng(seed).normal(0.0, scale, (num_rows, vocab_size))


def loss_and_gradient(logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = divergence(logits, *args, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


@every_case
def test_masked_rows_are_never_read(kind: str, param: float | None, mode: str) -> None:
    target = exact_target(rows(10, 5, 9), 3, [0, 1, 2, 3, 4], [[5, -1]] * 5)
    student = torch.from_numpy(rows(11, 5, 9))
    alone = loss_and_gradient(student, target, kind, param, mode)
    target.mask[:] = torch.tensor([True, False, True, False, False])
    for tensor in (target.topk_logprob, target.tail_logprob, target.sampled_logprob):
        tensor[~target.mask] = NAN
    target.topk_id[1], target.sampled_id[3] = 2**40, -100
    assert target.extra_id is not None
    assert target.extra_logprob is not None
    target.extra_id[4], target.extra_logprob[3] = 2**40, NAN
    student[1], student[3], student[4] = NAN, INF, -INF
    loss, gradient = loss_and_gradient(student, target, kind, param, mode)
    assert loss[~target.mask].tolist() == [0.0] * 3
    assert gradient[~target.mask].abs().max().item() == 0.0
    assert torch.equal(loss[target.mask], alone[0][target.mask])
    assert torch.equal(gradient[target.mask], alone[1][target.mask])


@every_case
@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_scored_is_a_connected_zero(
    kind: str, param: float | None, mode: str, num_rows: int
) -> None:
    target = exact_target(rows(12, 3, 7), 2, [0, 1, 2], [[3], [-1], [4]]).slice(0, num_rows)
    target.mask[:] = False
    student = torch.full((num_rows, 7), NAN, requires_grad=True)
    loss = token_mean(divergence(student, target, kind, param, mode), target.mask, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(num_rows, 7))


@every_case
def test_padded_columns_take_no_part(kind: str, param: float | None, mode: str) -> None:
    target = exact_target(rows(13, 3, 9), 3, [0, 8, 2])
    student = torch.from_numpy(rows(14, 3, 9))
    padded = torch.cat([student, torch.full((3, 4), 60.0)], dim=1)
    loss, gradient = loss_and_gradient(student, target, kind, param, mode)
    padded_loss, padded_gradient = loss_and_gradient(
        padded, target, kind, param, mode, vocab_size=9
    )
    assert torch.equal(loss, padded_loss)
    assert torch.equal(padded_gradient, torch.cat([gradient, torch.zeros(3, 4)], dim=1))
    full = exact_target(rows(13, 3, 9), 9, [0, 8, 2])
    assert torch.isfinite(divergence(padded, full, kind, param, mode, vocab_size=9)).all()


@every_kind
def test_impossible_student_tokens_give_no_nan_gradient(kind: str, param: float | None) -> None:
    target = exact_target(rows(15, 2, 8), 3, [0, 1])
    student = torch.from_numpy(rows(16, 2, 8))
    support = torch.cat([target.topk_id, target.sampled_id[:, None]], dim=1)
    student = torch.full_like(student, -INF).scatter(1, support, student.gather(1, support))
    loss, gradient = loss_and_gradient(student, target, kind, param)
    assert gradient.isfinite().all()
    unbounded = kind in ("forward", "mixed")
    assert loss.tolist() == [INF, INF] if unbounded else loss.isfinite().all()
    target.tail_logprob[:] = -INF
    loss, gradient = loss_and_gradient(student, target, kind, param)
    floored = kind == "mixed"  # its forward part asks for mass in the floored tail
    assert floored or loss.isfinite().all()
    assert gradient.isfinite().all()


@every_case
def test_row_without_teacher_entries_is_zero(kind: str, param: float | None, mode: str) -> None:
    target = exact_target(rows(17, 2, 8), 3, [0, 1])
    target.topk_logprob[:], target.sampled_logprob[:] = -INF, -INF
    student = torch.from_numpy(rows(18, 2, 8))
    loss, gradient = loss_and_gradient(student, target, kind, param, mode)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_kind
def test_repeated_and_unused_entries_change_nothing(kind: str, param: float | None) -> None:
    target = exact_target(rows(19, 3, 10), 3, [0, 1, 2])
    student = torch.from_numpy(rows(20, 3, 10))
    longer = TeacherTarget(
        topk_id=torch.cat(
            [target.topk_id, target.topk_id[:, :1], torch.full((3, 2), 2**32 - 1)], 1
        ),
        topk_logprob=torch.cat(
            [target.topk_logprob, target.topk_logprob[:, :1] + 0.01, torch.full((3, 2), -INF)], 1
        ),
        tail_logprob=target.tail_logprob,
        sampled_id=target.sampled_id,
        sampled_logprob=target.sampled_logprob,
        behaviour_logprob=None,
        mask=target.mask,
    )
    for got, wanted in zip(
        loss_and_gradient(student, longer, kind, param),
        loss_and_gradient(student, target, kind, param),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    target = exact_target(rows(21, 3, 30), 5, [0, 1, 2]).to(dtype=torch.float32)
    student = torch.from_numpy(rows(22, 3, 30)).to(dtype)
    loss, gradient = loss_and_gradient(student, target)
    wide_loss, wide_gradient = loss_and_gradient(student.float(), target)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(loss, wide_loss)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 30.0, 1e3, 1e6]),
    st.sampled_from([1e-3, 1.0, 30.0, 300.0]),
    st.integers(1, 7),
    st.sampled_from(COMPARISONS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_extreme_rows_stay_finite_and_not_negative(
    seed: int,
    student_scale: float,
    teacher_scale: float,
    num_kept: int,
    comparison: tuple[str, float | None, str],
    dtype: torch.dtype,
) -> None:
    target = exact_target(rows(seed, 4, 7, teacher_scale), num_kept, [0, 1, 2, 3])
    student = torch.from_numpy(rows(seed + 1, 4, 7, student_scale)).to(dtype)
    loss, gradient = loss_and_gradient(student, target, *comparison)
    assert loss.isfinite().all()
    assert (loss >= -10 * torch.finfo(dtype).eps).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "vocab_size"), [((2, 4), None), ((1, 1, 4), None), ((4,), None), ((1, 4), 5)]
)
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...], vocab_size: int) -> None:
    target = exact_target(rows(23, 1, 4), 2, [0])
    with pytest.raises(ShapeError, match="student_logits"):
        divergence(torch.zeros(shape), target, vocab_size=vocab_size)
    with pytest.raises(ShapeError, match="student_logits"):
        sampled_logprob(torch.zeros(shape), target.sampled_id, vocab_size=vocab_size)


def test_corrupt_scores_do_not_reach_the_loss() -> None:
    target = exact_target(rows(24, 2, 6), 6, [0, 1])
    target.topk_logprob[1] += 0.02
    with pytest.raises(CorruptError, match="row 1"):
        divergence(torch.zeros(2, 6), target)
