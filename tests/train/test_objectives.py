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

from stillroom.cache.errors import ConfigError, MismatchError, ShapeError
from stillroom.train.objective import COMPARED, DIVERGENCES, MODES, PARAMETERS
from stillroom.train.objectives import cross_entropy, divergence, sampled_logprob, token_mean
from stillroom.train.target import TAIL_FLOOR_NATS, TeacherTarget
from stillroom.train.testing import exact_target

Array = NDArray[np.float64]
INF, NAN = math.inf, math.nan
KINDS: list[tuple[str, float | None]] = [
    ("forward", None),
    ("reverse", None),
    ("jsd", 0.5),
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


def own_tokens(target: TeacherTarget, row: int) -> list[int]:
    ids = [*target.topk_id[row].tolist(), int(target.sampled_id[row])]
    if target.extra_id is not None:
        ids += [token for token in target.extra_id[row].tolist() if token >= 0]
    return list(dict.fromkeys(ids))


def expected_rows(
    twin: ModuleType,
    teacher_logits: Array,
    student_logits: Array,
    target: TeacherTarget,
    kind: str,
    param: float | None,
    mode: str = "tail",
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Loss (T,) and gradient (T, V) by enumeration of the buckets of dense rows."""
    vocab_size = teacher_logits.shape[1]
    losses, gradients = [], []
    for i, (zt, zs) in enumerate(zip(teacher_logits, student_logits, strict=True)):
        own = own_tokens(target, i)
        buckets = twin.partition(own, vocab_size)
        t = twin.merge(twin.log_softmax(zt), buckets)
        s = twin.merge(twin.log_softmax(zs / temperature), buckets)
        if kind in ("reverse", "mixed") and mode == "tail" and len(buckets) > len(own):
            t = twin.floored(t, TAIL_FLOOR_NATS)
        losses.append(twin.divergence(*twin.in_mode(t, s, mode, len(own)), kind, param))
        gradients.append(
            twin.gradient(t, zs, buckets, kind, param, temperature, mode, num_own=len(own))
        )
    return np.array(losses), np.array(gradients)


def assert_near(got: Tensor, wanted: Array, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = np.abs(got.double().numpy() - wanted) / (1 + np.abs(wanted))
    assert error.max(initial=0.0) <= tolerance, error.max()


@every_case
@pytest.mark.parametrize("num_kept", [0, 1, 4, 12])
@pytest.mark.parametrize(("temperature", "extra"), [(1.0, False), (0.6, True)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_loss_and_gradient_equal_the_twin(
    brute_force: ModuleType,
    kind: str,
    param: float | None,
    mode: str,
    num_kept: int,
    temperature: float,
    extra: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    teacher = rows(0, 4, 12)
    student = torch.from_numpy(rows(1, 4, 12)).to(dtype)
    extra_id = [[2, -1, 9], [3, 3, 1], [-1, -1, -1], [0, 1, 11]] if extra else None
    target = exact_target(teacher, num_kept, [0, 3, 5, 11], extra_id)
    loss, gradient = loss_and_gradient(student, target, kind, param, mode, temperature)
    wanted = expected_rows(
        brute_force, teacher, student.double().numpy(), target, kind, param, mode, temperature
    )
    assert loss.dtype == gradient.dtype == dtype
    assert_near(loss, wanted[0], tolerance)
    assert_near(gradient, wanted[1], tolerance)
    assert gradient.sum(1).abs().max().item() < tolerance


@every_case
@pytest.mark.parametrize(
    ("log_tail", "offset"),
    [(math.log(0.9), 0.0), (-14.0, 3000.0), (-200.0, 0.0), (-1000.0, 3000.0)],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_student_tail_of_any_size(
    brute_force: ModuleType,
    kind: str,
    param: float | None,
    mode: str,
    log_tail: float,
    offset: float,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    teacher = rows(2, 3, 16)
    target = exact_target(teacher, 4, [1, 2, 3])
    dense = torch.from_numpy(rows(3, 3, 16))
    support = torch.cat([target.topk_id, target.sampled_id[:, None]], dim=1)
    in_support = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, support, True)
    log_odds = log_tail - math.log1p(-math.exp(log_tail))
    shift = dense.masked_fill(~in_support, -INF).logsumexp(1) + log_odds
    shift = shift - dense.masked_fill(in_support, -INF).logsumexp(1)
    student = torch.where(in_support, dense, dense + shift[:, None]) + offset
    student = student.to(dtype)
    loss, gradient = loss_and_gradient(student, target, kind, param, mode)
    wanted = expected_rows(
        brute_force, teacher, student.double().numpy(), target, kind, param, mode
    )
    assert_near(loss, wanted[0], tolerance)
    assert_near(gradient, wanted[1], tolerance)


@every_case
def test_finite_differences(kind: str, param: float | None, mode: str) -> None:
    target = exact_target(rows(4, 3, 9), 3, [0, 1, 2], [[5, 5], [6, 7], [-1, 8]])
    target.mask[1] = False
    student = torch.from_numpy(rows(5, 3, 10)).requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return divergence(logits, target, kind, param, mode, 1.7, vocab_size=9)

    assert torch.autograd.gradcheck(loss, student)


@every_case
def test_equals_the_full_divergence_where_all_is_kept(
    brute_force: ModuleType, kind: str, param: float | None, mode: str
) -> None:
    teacher, student = rows(6, 4, 10, 4.0), rows(7, 4, 10, 4.0)
    target = exact_target(teacher, 10, [0, 1, 2, 3])
    loss = divergence(torch.from_numpy(student), target, kind, param, mode)
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
    target = exact_target(teacher, 12, [0, 11])
    assert float(target.topk_logprob.min()) > TAIL_FLOOR_NATS
    logits = torch.from_numpy(student)
    kept = (0, 1, 3, 7, 12)
    values = torch.stack(
        [divergence(logits, exact_target(teacher, k, [0, 11]), *kind_param) for k in kept]
    )
    assert values[0].min().item() >= -1e-14
    assert (values.diff(dim=0) >= -1e-13).all()
    finer = divergence(logits, exact_target(teacher, 3, [0, 11], [[5, 6], [7, 7]]), *kind_param)
    assert (finer >= values[2] - 1e-13).all()
    assert (finer <= values[4] + 1e-13).all()
    assert (divergence(torch.from_numpy(teacher), target, *kind_param).abs() < 1e-13).all()


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_tail_hides_exactly_the_divergence_within_it(
    brute_force: ModuleType, kind: str
) -> None:
    teacher, student = rows(31, 1, 12)[0], rows(32, 1, 12)[0]
    target = exact_target(teacher[None], 4, [0])
    tail = [v for v in range(12) if v not in own_tokens(target, 0)]
    t, s = brute_force.log_softmax(teacher), brute_force.log_softmax(student)
    bucketed = divergence(torch.from_numpy(student[None]), target, kind).item()
    first = t if kind == "forward" else s
    inside = brute_force.divergence(
        brute_force.log_softmax(teacher[tail]), brute_force.log_softmax(student[tail]), kind
    )
    hidden = np.exp(first[tail]).sum() * inside
    assert hidden > 0.01
    assert bucketed + hidden == pytest.approx(brute_force.divergence(t, s, kind), abs=1e-12)


def test_beta_is_the_weight_of_the_teacher() -> None:
    target = exact_target(np.log([[0.8, 0.2]]), 2, [0])
    student = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    mixed = [0.1 * 0.8 + 0.9 * 0.3, 0.1 * 0.2 + 0.9 * 0.7]
    to_teacher = 0.8 * math.log(0.8 / mixed[0]) + 0.2 * math.log(0.2 / mixed[1])
    to_student = 0.3 * math.log(0.3 / mixed[0]) + 0.7 * math.log(0.7 / mixed[1])
    value = divergence(student, target, "jsd", 0.1).item()
    assert value == pytest.approx(0.1 * to_teacher + 0.9 * to_student, abs=1e-14)
    assert value != pytest.approx(divergence(student, target, "jsd", 0.9).item(), abs=1e-3)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 1e-6), ("reverse", 1 - 1e-6)])
def test_scaled_jsd_tends_to_kl(kind: str, beta: float) -> None:
    target = exact_target(rows(8, 4, 10), 4, [0, 1, 2, 3])
    student = torch.from_numpy(rows(9, 4, 10))
    scaled = divergence(student, target, "jsd", beta) / min(beta, 1 - beta)
    torch.testing.assert_close(scaled, divergence(student, target, kind), rtol=1e-3, atol=1e-4)


def test_reverse_floors_the_teacher_tail_and_forward_does_not() -> None:
    teacher = np.array([[0.0, -1.0, -60.0, -60.0]])
    target = exact_target(teacher, 2, [0])
    student = torch.tensor([[0.0, -1.0, -5.0, -5.0]], dtype=torch.float64)
    tail = student.log_softmax(1)[0, 2:].logsumexp(0).item()
    support = math.log1p(-math.exp(tail))
    wanted = math.exp(tail) * (tail - TAIL_FLOOR_NATS) + math.exp(support) * support
    assert divergence(student, target, "reverse").item() == pytest.approx(wanted, abs=1e-7)
    assert divergence(student, target, "forward").item() == pytest.approx(-support, abs=1e-14)


def test_one_kept_token_still_teaches() -> None:
    target = exact_target(np.log([[0.6, 0.3, 0.1]]), 1, [0])
    student = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64).log()
    loss, gradient = loss_and_gradient(student, target)
    assert loss.item() == pytest.approx(0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8))
    assert gradient[0].tolist() == pytest.approx([-0.4, 0.2, 0.2])


@every_kind
def test_one_kept_token_renormalised_teaches_nothing(kind: str, param: float | None) -> None:
    target = exact_target(np.log([[0.6, 0.3, 0.1]]), 1, [0])
    student = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64).log()
    loss, gradient = loss_and_gradient(student, target, kind, param, "renorm")
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert gradient.abs().max().item() < 1e-15


def test_modes_without_a_teacher_tail_drain_the_student_s() -> None:
    target = exact_target(np.log([[0.5, 0.3, 0.15, 0.05]]), 2, [0])
    s = torch.tensor([[0.25, 0.25, 0.3, 0.2]], dtype=torch.float64)
    _, zero_tail = loss_and_gradient(s.log(), target, mode="zero_tail")
    assert zero_tail[0].tolist() == pytest.approx([0.25 - 0.625, 0.25 - 0.375, 0.3, 0.2])
    _, truncated = loss_and_gradient(s.log(), target, mode="truncated")
    assert truncated[0].tolist() == pytest.approx([0.8 * g for g in zero_tail[0].tolist()])
    drained = torch.tensor([[0.625, 0.375, 1e-12, 1e-12]], dtype=torch.float64).log()
    loss, gradient = loss_and_gradient(drained, target, mode="truncated")
    assert loss.item() == pytest.approx(0.8 * math.log(0.8))
    assert gradient.abs().max().item() < 1e-11


def test_truncated_reverse_kl_would_pay_for_leaving_the_support() -> None:
    """The reason to refuse it: sum_U s log(s / t) is least at S = T / e, where it is -T / e."""
    t = torch.tensor([0.5, 0.3], dtype=torch.float64)

    def truncated(total: float) -> float:
        s = t * total / t.sum()
        return float((s * (s / t).log()).sum())

    best = 0.8 / math.e
    assert truncated(best) == pytest.approx(-best)
    assert truncated(best) < min(truncated(0.8), truncated(best * 1.05), truncated(best * 0.95))
    for mode, reason in COMPARED.items():
        for kind, param in KINDS[1:]:
            with pytest.raises(ConfigError, match=reason):
                divergence(
                    torch.zeros(1, 4), exact_target(rows(0, 1, 4), 2, [0]), kind, param, mode
                )


def test_alpha_and_forward_weight_are_on_the_side_they_name() -> None:
    target = exact_target(np.log([[0.8, 0.2]]), 2, [0])
    student = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    t, s = [0.8, 0.2], [0.3, 0.7]
    near_student = [0.1 * a + 0.9 * b for a, b in zip(t, s, strict=True)]
    near_teacher = [0.9 * a + 0.1 * b for a, b in zip(t, s, strict=True)]
    value = {
        kind: divergence(student, target, kind, 0.1).item()
        for kind in ("skew", "skew_reverse", "mixed")
    }
    assert value["skew"] == pytest.approx(kl(t, near_student))
    assert value["skew_reverse"] == pytest.approx(kl(s, near_teacher))
    assert value["mixed"] == pytest.approx(0.1 * kl(t, s) + 0.9 * kl(s, t))


@pytest.mark.parametrize(("weight", "kind"), [(1.0, "forward"), (0.0, "reverse")])
def test_mixed_at_its_ends_is_one_divergence(weight: float, kind: str) -> None:
    """Also where the other would be infinite."""
    target = exact_target(np.array([[0.0, -1.0, -INF, -60.0]]), 2, [0])
    student = torch.tensor([[0.0, -1.0, -5.0, -5.0]], dtype=torch.float64)
    if kind == "reverse":
        student = torch.tensor([[0.0, -INF, -5.0, -5.0]], dtype=torch.float64)
    for got, wanted in zip(
        loss_and_gradient(student, target, "mixed", weight),
        loss_and_gradient(student, target, kind),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_cross_entropy_is_minus_the_sampled_logprob(brute_force: ModuleType) -> None:
    target = exact_target(rows(28, 3, 9), 2, [4, 8, 0])
    target.mask[2], target.sampled_id[2] = False, -100
    student = torch.from_numpy(np.concatenate([rows(29, 3, 9), np.full((3, 2), 50.0)], axis=1))
    student[2] = NAN
    student.requires_grad_()
    loss = cross_entropy(student, target, 0.7, vocab_size=9)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    zs = student.detach().numpy()[:2, :9]
    for row, token in enumerate([4, 8]):
        wanted = -brute_force.log_softmax(zs[row] / 0.7)[token]
        assert loss[row].item() == pytest.approx(wanted, abs=1e-12)
        assert_near(gradient[row, :9], -brute_force.score(zs[row], token, 0.7), 1e-12)
    assert loss[2].item() == 0.0
    assert gradient[2].abs().max().item() == gradient[:, 9:].abs().max().item() == 0.0
    target.sampled_id[1] = 9
    with pytest.raises(MismatchError, match=r"row 1.*0 to 8; got 9"):
        cross_entropy(student, target, 0.7, vocab_size=9)
    assert cross_entropy(student[:0], target.slice(0, 0)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "backward"}, "'forward'.*got 'backward'"),
        ({"kind": "policy_gradient"}, "estimators"),
        ({"mode": "head"}, f"{MODES[0]}.*got 'head'"),
        ({"kind": "jsd"}, r"beta.*excluded; got None"),
        ({"kind": "jsd", "param": 0.0}, "beta.*got 0.0"),
        ({"kind": "jsd", "param": 1.0}, "beta.*got 1.0"),
        ({"kind": "jsd", "param": NAN}, "got nan"),
        ({"kind": "skew", "param": 1.0}, "alpha.*got 1.0"),
        ({"kind": "mixed", "param": 1.1}, "forward_weight.*got 1.1"),
        ({"kind": "forward", "param": 0.5}, "got 0.5"),
        ({"kind": "reverse", "param": 0.5}, "got 0.5"),
        ({"temperature": 0.0}, "above 0; got 0.0"),
        ({"temperature": INF}, "got inf"),
    ],
)
def test_unknown_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divergence(torch.zeros(1, 4), exact_target(rows(23, 1, 4), 2, [0]), **options)


@every_case
def test_from_a_rounded_cache(
    brute_force: ModuleType, kind: str, param: float | None, mode: str
) -> None:
    """Half precision may sum to more than 1, here with a repeat, an unused entry and extra ids."""
    top = -0.2412109375
    entries = [(2, top), (2**32 - 1, -INF), (5, -2.0), (2, top), (3, -3.25), (4, -4.0)]
    target = TeacherTarget(
        topk_id=torch.tensor([[token for token, _ in entries[:4]]]),
        topk_logprob=torch.tensor([[logprob for _, logprob in entries[:4]]]),
        tail_logprob=torch.tensor([-2.5]),
        sampled_id=torch.tensor([3]),
        sampled_logprob=torch.tensor([-3.25]),
        behaviour_logprob=None,
        mask=torch.ones(1, dtype=torch.bool),
        extra_id=torch.tensor([[4, -1]]),
        extra_logprob=torch.tensor([[-4.0, NAN]]),
    )
    raw = brute_force.stored_masses(entries, -2.5, 8, num_drawn=2, normalise=False)
    assert math.fsum(map(math.exp, raw.values())) > 1.002
    mass = brute_force.stored_masses(entries, -2.5, 8, num_drawn=2)
    buckets = [[2], [5], [3], [4], [0, 1, 6, 7]]
    t = np.array([mass[bucket[0]] for bucket in buckets[:4]] + [mass[-1]])
    zs = rows(30, 1, 8)
    s = brute_force.merge(brute_force.log_softmax(zs[0]), buckets)
    loss, gradient = loss_and_gradient(torch.from_numpy(zs), target, kind, param, mode)
    wanted = brute_force.divergence(*brute_force.in_mode(t, s, mode, 4), kind, param)
    assert loss.item() == pytest.approx(wanted, abs=1e-12)
    wanted = brute_force.gradient(t, zs[0], buckets, kind, param, mode=mode, num_own=4)
    assert_near(gradient[0], wanted, 1e-12)


def test_every_divergence_is_tested() -> None:
    assert {kind for kind, _ in KINDS} == set(DIVERGENCES)
    assert {mode for _, _, mode in CASES} == set(MODES)
    assert {kind for kind, param in KINDS if param is not None} == set(PARAMETERS)


def test_token_mean_does_not_depend_on_the_split() -> None:
    target = exact_target(rows(25, 8, 9), 3, [0, 1, 2, 3, 4, 5, 6, 7])
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
