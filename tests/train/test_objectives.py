"""The plain divergences against a NumPy twin, closed-form gradients and their own guarantees."""

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stillroom.cache.errors import ConfigError, CorruptError, ShapeError
from stillroom.train.objectives import divergence, sampled_logprob, token_mean
from stillroom.train.target import TAIL_FLOOR_NATS, TeacherTarget

Array = NDArray[np.float64]
INF, NAN = math.inf, math.nan
KINDS = [("forward", None), ("reverse", None), ("jsd", 0.5), ("jsd", 0.1)]
every_kind = pytest.mark.parametrize(("kind", "param"), KINDS)


def rows(seed: int, num_rows: int, vocab_size: int, scale: float = 2.0) -> Array:
    return np.random.default_rng(seed).normal(0.0, scale, (num_rows, vocab_size))


def cached(teacher_logits: Array, num_kept: int, sampled_id: list[int]) -> TeacherTarget:
    """Cache dense teacher rows exactly: top-k, its complement and the sampled token, float64."""
    logprob = torch.from_numpy(teacher_logits).log_softmax(1)
    kept = logprob.topk(num_kept, dim=1)
    tail = logprob.scatter(1, kept.indices, -INF).logsumexp(1)
    sampled = torch.tensor(sampled_id)
    return TeacherTarget(
        topk_id=kept.indices,
        topk_logprob=kept.values,
        tail_logprob=tail,
        sampled_id=sampled,
        sampled_logprob=logprob.gather(1, sampled[:, None]).squeeze(1),
        behaviour_logprob=None,
        mask=torch.ones(len(sampled_id), dtype=torch.bool),
    )


def loss_and_gradient(logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = divergence(logits, *args, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def expected_rows(
    twin: ModuleType,
    teacher_logits: Array,
    student_logits: Array,
    target: TeacherTarget,
    kind: str,
    param: float | None,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Loss (T,) and gradient (T, V) by enumeration of the buckets of dense rows."""
    vocab_size = teacher_logits.shape[1]
    losses, gradients = [], []
    for i, (zt, zs) in enumerate(zip(teacher_logits, student_logits, strict=True)):
        tokens = [*target.topk_id[i].tolist(), int(target.sampled_id[i])]
        buckets = twin.partition(tokens, vocab_size)
        t = twin.merge(twin.log_softmax(zt), buckets)
        s = twin.merge(twin.log_softmax(zs / temperature), buckets)
        if kind == "reverse" and len(buckets) > len(set(tokens)):
            t = twin.floored(t, TAIL_FLOOR_NATS)
        losses.append(twin.divergence(t, s, kind, param))
        gradients.append(twin.gradient(t, zs, buckets, kind, param, temperature))
    return np.array(losses), np.array(gradients)


def assert_near(got: Tensor, wanted: Array, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = np.abs(got.double().numpy() - wanted) / (1 + np.abs(wanted))
    assert error.max(initial=0.0) <= tolerance, error.max()


@every_kind
@pytest.mark.parametrize("num_kept", [1, 4, 11, 12])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_loss_and_gradient_equal_the_twin(
    brute_force: ModuleType,
    kind: str,
    param: float | None,
    num_kept: int,
    temperature: float,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    teacher = rows(0, 6, 12)
    student = torch.from_numpy(rows(1, 6, 12)).to(dtype)
    target = cached(teacher, num_kept, [0, 3, 5, 11, 7, 7])
    loss, gradient = loss_and_gradient(student, target, kind, param, temperature=temperature)
    wanted = expected_rows(
        brute_force, teacher, student.double().numpy(), target, kind, param, temperature
    )
    assert loss.dtype == gradient.dtype == dtype
    assert_near(loss, wanted[0], tolerance)
    assert_near(gradient, wanted[1], tolerance)
    assert gradient.sum(1).abs().max().item() < tolerance


@every_kind
@pytest.mark.parametrize("log_tail", [math.log(0.9), -2.0, -14.0, -50.0, -200.0, -1000.0])
@pytest.mark.parametrize("offset", [0.0, 3000.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_student_tail_of_any_size(
    brute_force: ModuleType,
    kind: str,
    param: float | None,
    log_tail: float,
    offset: float,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    teacher = rows(2, 3, 16)
    target = cached(teacher, 4, [1, 2, 3])
    dense = torch.from_numpy(rows(3, 3, 16))
    support = torch.cat([target.topk_id, target.sampled_id[:, None]], dim=1)
    in_support = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, support, True)
    log_odds = log_tail - math.log1p(-math.exp(log_tail))
    shift = dense.masked_fill(~in_support, -INF).logsumexp(1) + log_odds
    shift = shift - dense.masked_fill(in_support, -INF).logsumexp(1)
    student = torch.where(in_support, dense, dense + shift[:, None]) + offset
    student = student.to(dtype)
    loss, gradient = loss_and_gradient(student, target, kind, param)
    wanted = expected_rows(brute_force, teacher, student.double().numpy(), target, kind, param)
    assert_near(loss, wanted[0], tolerance)
    assert_near(gradient, wanted[1], tolerance)


@every_kind
def test_finite_differences(kind: str, param: float | None) -> None:
    target = cached(rows(4, 3, 9), 3, [0, 1, 2])
    target.mask[1] = False
    student = torch.from_numpy(rows(5, 3, 10)).requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return divergence(logits, target, kind, param, temperature=1.7, vocab_size=9)

    assert torch.autograd.gradcheck(loss, student)


@every_kind
def test_equals_the_full_divergence_where_all_is_kept(
    brute_force: ModuleType, kind: str, param: float | None
) -> None:
    teacher, student = rows(6, 4, 10, 4.0), rows(7, 4, 10, 4.0)
    loss = divergence(torch.from_numpy(student), cached(teacher, 10, [0, 1, 2, 3]), kind, param)
    dense = [
        brute_force.divergence(
            brute_force.log_softmax(zt), brute_force.log_softmax(zs), kind, param
        )
        for zt, zs in zip(teacher, student, strict=True)
    ]
    assert_near(loss, np.array(dense), 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 3.0), st.sampled_from(KINDS))
def test_more_kept_tokens_only_raise_it_up_to_the_full_divergence(
    brute_force: ModuleType, seed: int, scale: float, kind_param: tuple[str, float | None]
) -> None:
    teacher, student = rows(seed, 2, 12, scale), rows(seed + 1, 2, 12, scale)
    target = cached(teacher, 12, [0, 11])
    assert float(target.topk_logprob.min()) > TAIL_FLOOR_NATS
    logits = torch.from_numpy(student)
    values = torch.stack(
        [divergence(logits, cached(teacher, k, [0, 11]), *kind_param) for k in range(13)]
    )
    assert values[0].min().item() >= -1e-14
    assert (values.diff(dim=0) >= -1e-13).all()
    assert (divergence(torch.from_numpy(teacher), target, *kind_param).abs() < 1e-13).all()


def test_beta_is_the_weight_of_the_teacher() -> None:
    target = cached(np.log([[0.8, 0.2]]), 2, [0])
    student = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    mixed = [0.1 * 0.8 + 0.9 * 0.3, 0.1 * 0.2 + 0.9 * 0.7]
    to_teacher = 0.8 * math.log(0.8 / mixed[0]) + 0.2 * math.log(0.2 / mixed[1])
    to_student = 0.3 * math.log(0.3 / mixed[0]) + 0.7 * math.log(0.7 / mixed[1])
    value = divergence(student, target, "jsd", 0.1).item()
    assert value == pytest.approx(0.1 * to_teacher + 0.9 * to_student, abs=1e-14)
    assert value != pytest.approx(divergence(student, target, "jsd", 0.9).item(), abs=1e-3)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 1e-6), ("reverse", 1 - 1e-6)])
def test_scaled_jsd_tends_to_kl(kind: str, beta: float) -> None:
    target = cached(rows(8, 4, 10), 4, [0, 1, 2, 3])
    student = torch.from_numpy(rows(9, 4, 10))
    scaled = divergence(student, target, "jsd", beta) / min(beta, 1 - beta)
    torch.testing.assert_close(scaled, divergence(student, target, kind), rtol=1e-3, atol=1e-4)


@every_kind
def test_masked_rows_are_never_read(kind: str, param: float | None) -> None:
    target = cached(rows(10, 5, 9), 3, [0, 1, 2, 3, 4])
    student = torch.from_numpy(rows(11, 5, 9))
    alone = loss_and_gradient(student, target, kind, param)
    target.mask[:] = torch.tensor([True, False, True, False, False])
    for tensor in (target.topk_logprob, target.tail_logprob, target.sampled_logprob):
        tensor[~target.mask] = NAN
    target.topk_id[1], target.sampled_id[3] = 2**40, -100
    student[1], student[3], student[4] = NAN, INF, -INF
    loss, gradient = loss_and_gradient(student, target, kind, param)
    assert loss[~target.mask].tolist() == [0.0] * 3
    assert gradient[~target.mask].abs().max().item() == 0.0
    assert torch.equal(loss[target.mask], alone[0][target.mask])
    assert torch.equal(gradient[target.mask], alone[1][target.mask])


@every_kind
@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_scored_is_a_connected_zero(kind: str, param: float | None, num_rows: int) -> None:
    target = cached(rows(12, 3, 7), 2, [0, 1, 2]).slice(0, num_rows)
    target.mask[:] = False
    student = torch.full((num_rows, 7), NAN, requires_grad=True)
    loss = token_mean(divergence(student, target, kind, param), target.mask, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(num_rows, 7))


@every_kind
def test_padded_columns_take_no_part(kind: str, param: float | None) -> None:
    target = cached(rows(13, 3, 9), 3, [0, 8, 2])
    student = torch.from_numpy(rows(14, 3, 9))
    padded = torch.cat([student, torch.full((3, 4), 60.0)], dim=1)
    loss, gradient = loss_and_gradient(student, target, kind, param)
    padded_loss, padded_gradient = loss_and_gradient(padded, target, kind, param, vocab_size=9)
    assert torch.equal(loss, padded_loss)
    assert torch.equal(padded_gradient, torch.cat([gradient, torch.zeros(3, 4)], dim=1))
    full = cached(rows(13, 3, 9), 9, [0, 8, 2])
    assert torch.isfinite(divergence(padded, full, kind, param, vocab_size=9)).all()


@every_kind
def test_impossible_student_tokens_give_no_nan_gradient(kind: str, param: float | None) -> None:
    target = cached(rows(15, 2, 8), 3, [0, 1])
    student = torch.from_numpy(rows(16, 2, 8))
    support = torch.cat([target.topk_id, target.sampled_id[:, None]], dim=1)
    student = torch.full_like(student, -INF).scatter(1, support, student.gather(1, support))
    loss, gradient = loss_and_gradient(student, target, kind, param)
    assert gradient.isfinite().all()
    assert loss.tolist() == [INF, INF] if kind == "forward" else loss.isfinite().all()
    target.tail_logprob[:] = -INF
    loss, gradient = loss_and_gradient(student, target, kind, param)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@every_kind
def test_row_without_teacher_entries_is_zero(kind: str, param: float | None) -> None:
    target = cached(rows(17, 2, 8), 3, [0, 1])
    target.topk_logprob[:], target.sampled_logprob[:] = -INF, -INF
    loss, gradient = loss_and_gradient(torch.from_numpy(rows(18, 2, 8)), target, kind, param)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_kind
def test_repeated_and_unused_entries_change_nothing(kind: str, param: float | None) -> None:
    target = cached(rows(19, 3, 10), 3, [0, 1, 2])
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


def test_reverse_floors_the_teacher_tail_and_forward_does_not() -> None:
    teacher = np.array([[0.0, -1.0, -60.0, -60.0]])
    target = cached(teacher, 2, [0])
    student = torch.tensor([[0.0, -1.0, -5.0, -5.0]], dtype=torch.float64)
    tail = student.log_softmax(1)[0, 2:].logsumexp(0).item()
    support = math.log1p(-math.exp(tail))
    wanted = math.exp(tail) * (tail - TAIL_FLOOR_NATS) + math.exp(support) * support
    assert divergence(student, target, "reverse").item() == pytest.approx(wanted, abs=1e-7)
    assert divergence(student, target, "forward").item() == pytest.approx(-support, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    target = cached(rows(21, 3, 30), 5, [0, 1, 2]).to(dtype=torch.float32)
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
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_extreme_rows_stay_finite_and_not_negative(
    seed: int,
    student_scale: float,
    teacher_scale: float,
    num_kept: int,
    kind_param: tuple[str, float | None],
    dtype: torch.dtype,
) -> None:
    target = cached(rows(seed, 4, 7, teacher_scale), num_kept, [0, 1, 2, 3])
    student = torch.from_numpy(rows(seed + 1, 4, 7, student_scale)).to(dtype)
    loss, gradient = loss_and_gradient(student, target, *kind_param)
    assert loss.isfinite().all()
    assert (loss >= -10 * torch.finfo(dtype).eps).all()
    assert gradient.isfinite().all()


def test_one_kept_token_still_teaches() -> None:
    target = cached(np.log([[0.6, 0.3, 0.1]]), 1, [0])
    student = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64).log()
    loss, gradient = loss_and_gradient(student, target)
    assert loss.item() == pytest.approx(0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8))
    assert gradient[0].tolist() == pytest.approx([-0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "backward"}, "'forward' or 'reverse' or 'jsd'; got 'backward'"),
        ({"mode": "renorm"}, "'tail'; got 'renorm'"),
        ({"kind": "jsd"}, "teacher's weight.*got None"),
        ({"kind": "jsd", "param": 0.0}, "0 for any student"),
        ({"kind": "jsd", "param": 1.0}, "0 for any student"),
        ({"kind": "jsd", "param": NAN}, "got nan"),
        ({"kind": "forward", "param": 0.5}, "got 0.5"),
        ({"kind": "reverse", "param": 0.5}, "got 0.5"),
        ({"temperature": 0.0}, "above 0; got 0.0"),
        ({"temperature": INF}, "got inf"),
    ],
)
def test_unknown_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divergence(torch.zeros(1, 4), cached(rows(23, 1, 4), 2, [0]), **options)


@pytest.mark.parametrize(
    ("shape", "vocab_size"), [((2, 4), None), ((1, 1, 4), None), ((4,), None), ((1, 4), 5)]
)
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...], vocab_size: int) -> None:
    target = cached(rows(23, 1, 4), 2, [0])
    with pytest.raises(ShapeError, match="student_logits"):
        divergence(torch.zeros(shape), target, vocab_size=vocab_size)
    with pytest.raises(ShapeError, match="student_logits"):
        sampled_logprob(torch.zeros(shape), target.sampled_id, vocab_size=vocab_size)


def test_corrupt_scores_do_not_reach_the_loss() -> None:
    target = cached(rows(24, 2, 6), 6, [0, 1])
    target.topk_logprob[1] += 0.02
    with pytest.raises(CorruptError, match="row 1"):
        divergence(torch.zeros(2, 6), target)


def test_token_mean_does_not_depend_on_the_split() -> None:
    target = cached(rows(25, 8, 9), 3, [0, 1, 2, 3, 4, 5, 6, 7])
    target.mask[:] = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool()
    num_tokens = int(target.mask.sum())
    student = torch.from_numpy(rows(26, 8, 9))
    gradients = []
    for size in (8, 4, 1):
        logits = student.clone().requires_grad_()
        for start in range(0, 8, size):
            part = target.slice(start, start + size)
            loss = divergence(logits[start : start + size], part)
            token_mean(loss, part.mask, num_tokens).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        gradients.append(logits.grad)
    whole = loss_and_gradient(student, target)[1] / num_tokens
    for gradient in gradients:
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-15)


def test_token_mean_reads_only_scored_losses() -> None:
    loss = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    mean = token_mean(loss, mask, 8)
    assert mean.item() == 0.5
    assert torch.autograd.grad(mean, loss)[0].tolist() == [0.125, 0.0, 0.125]
    with pytest.raises(ConfigError, match="num_tokens"):
        token_mean(loss, mask, 0)
    with pytest.raises(ShapeError, match="mask"):
        token_mean(loss, mask[:2], 8)


def test_sampled_logprob_is_the_log_softmax_entry(brute_force: ModuleType) -> None:
    student = rows(27, 4, 9)
    ids = torch.tensor([0, 8, 2**32 - 1, -1])
    logits = torch.from_numpy(np.concatenate([student, np.full((4, 3), 50.0)], axis=1))
    got = sampled_logprob(logits.requires_grad_(), ids, 0.7, vocab_size=9)
    wanted = [brute_force.log_softmax(student[i] / 0.7)[[0, 8][i]] for i in range(2)]
    assert got[:2].tolist() == pytest.approx(wanted, abs=1e-12)
    assert got[2:].isnan().all()
    assert not got.requires_grad
    assert sampled_logprob(logits.bfloat16(), ids).dtype == torch.float32
