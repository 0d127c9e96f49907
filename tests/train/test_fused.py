"""The fused loss against the plain references: values, all gradients, chunks, precision."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.cache.errors import ConfigError, NumericsError, ShapeError
from stillroom.train.estimators import objective_loss
from stillroom.train.fused import FusedLoss, fused_loss
from stillroom.train.objective import Objective
from stillroom.train.objectives import cross_entropy, sampled_logprob
from stillroom.train.output_head import OutputHead
from stillroom.train.student_buckets import masses
from stillroom.train.target import TeacherTarget, teacher_buckets
from stillroom.train.teacher_side import side_bytes
from stillroom.train.testing import exact_target
from tests.train.fused_cases import OBJECTIVES, assert_near, name_of, target_for

NUM_ROWS, VOCAB, PADDED, WIDTH = 11, 17, 20, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transformed": {"scale": 0.7, "soft_cap": 3.0},
}


class Model:
    """Hidden states and a padded head, with gradients."""

    def __init__(self, dtype: torch.dtype, *, biased: bool = True, **head: Any) -> None:
        generator = torch.Generator().manual_seed(1)

        def made(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        self.hidden, self.weight = made(NUM_ROWS, WIDTH), made(PADDED, WIDTH)
        self.bias = made(PADDED) if biased else None
        self.head = OutputHead(self.weight, self.bias, **head)

    def double(self) -> "Model":
        """The same numbers in float64."""
        twin = Model(
            torch.float64,
            biased=self.bias is not None,
            scale=self.head.scale,
            soft_cap=self.head.soft_cap,
        )
        with torch.no_grad():
            for ours, theirs in zip(twin.leaves(), self.leaves(), strict=True):
                ours.copy_(theirs)
        return twin

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])


def weights(seed: int) -> Tensor:
    return torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(seed))


def masked(objective: Objective) -> TeacherTarget:
    target = target_for(objective, NUM_ROWS, VOCAB)
    return replace(target, mask=torch.arange(NUM_ROWS) % 4 != 2)


def bytes_for(num_rows: int, target: TeacherTarget, each: int = 2 * 8 * VOCAB) -> int:
    """Memory for chunks of so many positions, with buffers of `each` bytes a position."""
    return math.ceil(num_rows * (each + side_bytes(target)) * 8 / 7)


def run(
    model: Model, target: TeacherTarget, objective: Objective, **options: Any
) -> tuple[FusedLoss, list[Tensor]]:
    """The loss, and the gradients of three times its total."""
    options = {"vocab_size": VOCAB, "weight": weights(2), **options}
    options.setdefault("cross_entropy_weight", weights(3))
    found = fused_loss(model.hidden, model.head, target, objective, **options)
    return found, list(torch.autograd.grad(3.0 * found.total, model.leaves()))


def wanted(
    model: Model, target: TeacherTarget, objective: Objective, temperature: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, cross-entropies, gradients: by the references, in float64."""
    model = model.double()
    logits = model.head.logits(model.hidden)
    loss = objective_loss(logits, target, objective, temperature, vocab_size=VOCAB)
    ce = cross_entropy(logits, target, temperature, vocab_size=VOCAB)
    total = (weights(2) * loss).sum() + (weights(3) * ce).sum()
    gradients = torch.autograd.grad(3.0 * total, model.leaves())
    return loss.detach(), ce.detach(), list(gradients)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize("head", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_values_and_gradients_equal_the_references(
    objective: Objective, head: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, target = Model(dtype, **SETTINGS[head]), masked(objective)
    found, gradients = run(
        model, target, objective, temperature=1.2, max_bytes=bytes_for(3, target)
    )
    loss, ce, expected = wanted(model, target, objective, 1.2)
    assert found.value.dtype == found.total.dtype == dtype
    assert_near(found.value, loss, tolerance)
    assert_near(found.cross_entropy, ce, tolerance)
    total = (weights(2) * loss).sum() + (weights(3) * ce).sum()
    assert_near(found.total, total, 10 * tolerance)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        size = 1.0 + other.abs().max()  # entries are sums in which larger ones cancel
        assert_near(gradient / size, other / size, tolerance)


@pytest.mark.parametrize("rows", [1, 2, 5, NUM_ROWS])
@pytest.mark.parametrize("head", SETTINGS)
def test_chunks_of_any_size_give_the_same(rows: int, head: str) -> None:
    model, objective = Model(torch.float64, **SETTINGS[head]), Objective(kind="jsd", beta=0.2)
    target = masked(objective)
    whole, chunked = (
        run(model, target, objective, max_bytes=size) for size in (1 << 20, bytes_for(rows, target))
    )
    for one, other in zip((*whole[0], *whole[1]), (*chunked[0], *chunked[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)


def test_what_is_measured_on_the_way() -> None:
    objective = Objective()
    model, target = Model(torch.float64, soft_cap=4.0), masked(objective)
    found, _ = run(model, target, objective, temperature=1.2)
    logits = model.head.logits(model.hidden).detach()
    assert target.sampling_temperature is not None
    temperature = target.sampling_temperature.nan_to_num(1.2)[:, None]
    sampled = sampled_logprob(logits / temperature, target.sampled_id, vocab_size=VOCAB)
    both = masses(logits[:, :VOCAB], teacher_buckets(target, VOCAB), 1.2)
    mask = target.mask
    assert_near(found.sampled_logprob[mask], sampled[mask], 1e-12)
    assert_near(found.tail_logprob[mask], both.student[:, -1], 1e-12)
    assert bool(found.sampled_logprob[~mask].isnan().all())
    assert bool(found.tail_logprob[~mask].isnan().all())
    assert not any(part.requires_grad for part in found[1:])


def test_a_sampler_without_randomness_gives_no_logprob_to_compare() -> None:
    target = masked(Objective())
    greedy = torch.full((NUM_ROWS,), 0.0)
    found, _ = run(Model(torch.float64), replace(target, sampling_temperature=greedy), Objective())
    assert bool(found.sampled_logprob.isnan().all())
    assert bool(found.value.isfinite().all())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_masked_rows_are_never_read(objective: Objective) -> None:
    model, target = Model(torch.float64), masked(objective)
    clean, clean_gradients = run(model, target, objective)
    out = ~target.mask
    for tensor in (target.topk_logprob, target.tail_logprob, target.sampled_logprob):
        tensor[out] = math.nan
    target.topk_id[out], target.sampled_id[out] = 2**40, -100
    assert target.extra_id is not None
    target.extra_id[out] = 2**40
    with torch.no_grad():
        model.hidden[out] = math.nan
    bad = torch.where(out, math.nan, weights(2)), torch.where(out, math.nan, weights(3))
    found, gradients = run(model, target, objective, weight=bad[0], cross_entropy_weight=bad[1])
    assert torch.equal(found.total, clean.total)
    assert torch.equal(found.value, clean.value)
    assert bool((gradients[0][out] == 0.0).all())
    for one, other in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(one, other)


def test_padded_rows_of_the_head_take_no_part() -> None:
    model, target = Model(torch.float64), masked(Objective())
    _, clean = run(model, target, Objective())
    with torch.no_grad():
        model.weight[VOCAB:] = math.nan
    found, gradients = run(model, target, Objective())
    assert bool(found.total.isfinite())
    for one, other in zip(gradients, clean, strict=True):
        assert torch.equal(one, other)
    assert float(gradients[1][VOCAB:].abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["reverse", "jsd", "skew_reverse"])
def test_a_tail_that_the_student_rules_out(kind: str) -> None:
    """A head whose bias masks every token that the teacher did not keep."""
    param = {"jsd": {"beta": 0.5}, "skew_reverse": {"alpha": 0.1}}.get(kind, {})
    objective = Objective(kind=kind, **param)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.tensor([0.0, 0.0, -math.inf, -math.inf], dtype=torch.float64)
    target = TeacherTarget(
        topk_id=torch.tensor([[0, 1]] * 2),
        topk_logprob=torch.tensor([[0.5, 0.3]] * 2, dtype=torch.float64).log(),
        tail_logprob=torch.tensor([0.2] * 2, dtype=torch.float64).log(),
        sampled_id=torch.zeros(2, dtype=torch.int64),
        sampled_logprob=torch.tensor([0.5] * 2, dtype=torch.float64).log(),
        behaviour_logprob=None,
        mask=torch.ones(2, dtype=torch.bool),
    )
    found = fused_loss(hidden, OutputHead(weight=weight, bias=bias), target, objective)
    gradients = torch.autograd.grad(found.total, [hidden, weight])
    expected = objective_loss(hidden @ weight.T + bias, target, objective)
    assert_near(found.value, expected.detach(), 1e-10)
    assert found.tail_logprob.tolist() == [-math.inf] * 2
    finite = torch.where(bias > -math.inf, hidden @ weight.T, -1e4)
    wanted_gradients = torch.autograd.grad(
        objective_loss(finite, target, objective).sum(), [hidden, weight]
    )
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        assert_near(gradient, other, 1e-10)


def test_a_weight_of_zero_leaves_an_infinite_loss_out() -> None:
    objective = Objective(kind="forward")
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    hidden = torch.zeros(2, 4, dtype=torch.float64)
    hidden[0, 1] = -1e6
    hidden.requires_grad_()
    bias = torch.tensor([0.0, -math.inf, 0.0, 0.0], dtype=torch.float64)
    target = exact_target(torch.zeros(2, 4).numpy(), 4, [0, 0])
    head, none = OutputHead(weight=weight, bias=bias), torch.zeros(2, dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    found = fused_loss(hidden, head, target, objective, weight=none, cross_entropy_weight=one)
    assert bool(found.value.isinf().all())
    assert_near(found.total, found.cross_entropy.sum(), 1e-12)
    for gradient in torch.autograd.grad(found.total, [hidden, weight]):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_scored_is_a_zero_in_the_graph(num_rows: int) -> None:
    target = target_for(Objective(), 3, VOCAB).slice(0, num_rows)
    target = replace(target, mask=torch.zeros(num_rows, dtype=torch.bool))
    model = Model(torch.float64)
    hidden = model.hidden[:num_rows]
    found = fused_loss(hidden, model.head, target, Objective(), vocab_size=VOCAB)
    assert found.total.item() == 0.0
    for gradient in torch.autograd.grad(found.total, model.leaves()):
        assert float(gradient.abs().max()) == 0.0


def test_a_weight_that_embeds_too_gets_both_gradients() -> None:
    weight = Model(torch.float64).weight
    ids, target = torch.arange(NUM_ROWS), masked(Objective())
    found = fused_loss(weight[ids].tanh(), OutputHead(weight), target, Objective())
    logits = weight[ids].tanh() @ weight.T
    plain = objective_loss(logits, target, Objective()).sum()
    ours, theirs = (torch.autograd.grad(total, weight)[0] for total in (found.total, plain))
    assert_near(ours, theirs, 1e-10)


def test_gradients_reach_what_a_weight_is_made_of() -> None:
    """As a LoRA on a frozen head: W + B A * scaling."""
    base, target = Model(torch.float64), masked(Objective())
    factors = [torch.full((PADDED, 2), 0.1).double(), torch.full((2, WIDTH), 0.3).double()]
    up, down = (factor.requires_grad_() for factor in factors)
    head = OutputHead(base.weight.detach() + up @ down * 1.5)
    hidden = base.hidden.detach()
    found = fused_loss(hidden, head, target, Objective(), vocab_size=VOCAB)
    plain = objective_loss(head.logits(hidden), target, Objective(), vocab_size=VOCAB).sum()
    ours = torch.autograd.grad(found.total, [up, down], retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(plain, [up, down]), strict=True):
        assert_near(one, other, 1e-10)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    model, target = Model(torch.float64), masked(Objective())
    expected = dict(
        zip(("hidden", "weight", "bias"), run(model, target, Objective())[1], strict=True)
    )
    for name in expected:
        getattr(model, name).requires_grad_(name == trained)
    found = fused_loss(
        model.hidden,
        model.head,
        target,
        Objective(),
        weights(2),
        cross_entropy_weight=weights(3),
        vocab_size=VOCAB,
    )
    torch.autograd.backward(3.0 * found.total)
    gradient = getattr(model, trained).grad
    torch.testing.assert_close(gradient, expected[trained])


def test_nothing_is_differentiated_under_no_grad() -> None:
    model, target = Model(torch.float64), masked(Objective())
    with torch.no_grad():
        found = fused_loss(model.hidden, model.head, target, Objective(), vocab_size=VOCAB)
    assert not found.total.requires_grad
    other = fused_loss(model.hidden, model.head, target, Objective(), vocab_size=VOCAB)
    assert torch.equal(found.value, other.value)


def test_a_second_backward_pass_is_refused() -> None:
    model, target = Model(torch.float64), masked(Objective())
    found = fused_loss(model.hidden, model.head, target, Objective(), vocab_size=VOCAB)
    torch.autograd.backward(found.total, retain_graph=True)
    with pytest.raises(ConfigError, match="one backward pass"):
        torch.autograd.backward(found.total)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_products(autocast: bool, biased: bool) -> None:
    """Weights in float32 under autocast, or in bfloat16 themselves; all but the factors of the
    products is in float32."""
    torch.manual_seed(0)
    model = Model(torch.float32 if autocast else torch.bfloat16, biased=biased, scale=0.5)
    target = replace(masked(Objective()), sampling_temperature=None)
    loss, _, expected = wanted(model, target, Objective())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.head.logits(model.hidden)
        plain = objective_loss(logits, target, Objective(), vocab_size=VOCAB)
        limit = bytes_for(5, target, 6 * VOCAB)
        found, gradients = run(model, target, Objective(), max_bytes=limit)
    assert found.value.dtype == torch.float32
    assert_near(found.value, plain.detach(), 1e-5)
    assert_near(found.value, loss, 5e-2 if autocast else 1e-5)
    for gradient, other, leaf in zip(gradients, expected, model.leaves(), strict=True):
        assert gradient.dtype == leaf.dtype
        assert float((gradient.double() - other).norm() / other.norm()) < 2e-2


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_bfloat16_student_that_is_its_teacher_has_no_loss(kind: str) -> None:
    """Logits near 40 would be off by 0.1 in bfloat16, and the loss by 1e-3."""
    model = Model(torch.bfloat16, biased=False)
    with torch.no_grad():
        model.hidden[:, 0], model.weight[:, 0] = 4.0, 10.0
    logits = (model.hidden.double() @ model.weight.double().T)[:, :VOCAB].detach()
    target = exact_target(logits.numpy(), 5, [3] * NUM_ROWS)
    objective = Objective(kind=kind)
    found = fused_loss(model.hidden, model.head, target, objective, vocab_size=VOCAB)
    assert float(found.value.abs().max()) < 1e-5


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("topk", [5, VOCAB])
def test_what_is_common_to_all_logits_costs_no_digits(offset: float, topk: int) -> None:
    logits = Model(torch.float32).hidden.detach() @ Model(torch.float32).weight.detach()[:VOCAB].T
    logits = (logits + offset).double()
    target = exact_target(logits.numpy() / 1.1, topk, [3] * NUM_ROWS)
    loss = objective_loss(logits, target, Objective()).detach()
    hidden = torch.eye(NUM_ROWS)
    found = fused_loss(hidden, OutputHead(logits.float().T.contiguous()), target, Objective())
    assert_near(found.value, loss, 1e-6)
    wanted = sampled_logprob(logits, target.sampled_id, vocab_size=VOCAB)
    assert_near(found.sampled_logprob, wanted, 1e-6)


def test_gradients_of_half_precision_heads_add_up_in_float32() -> None:
    """300 equal chunks of one position: a sum in bfloat16 would stop at 256 of them."""
    num_rows = 300
    target = target_for(Objective(), 1, VOCAB)
    names = ("topk_id", "topk_logprob", "tail_logprob", "sampled_id", "sampled_logprob", "mask")
    repeated = {
        name: getattr(target, name).expand(num_rows, *getattr(target, name).shape[1:])
        for name in names
    }
    target = TeacherTarget(behaviour_logprob=None, **repeated)
    model = Model(torch.bfloat16, biased=False)
    hidden = model.hidden.detach()[:1].expand(num_rows, -1)
    found = fused_loss(hidden, model.head, target, Objective(), vocab_size=VOCAB, max_bytes=1)
    (gradient,) = torch.autograd.grad(found.total, model.weight)
    one = fused_loss(hidden[:1], model.head, target.slice(0, 1), Objective(), vocab_size=VOCAB)
    (single,) = torch.autograd.grad(one.total, model.weight)
    assert float((gradient - num_rows * single).norm() / gradient.norm()) < 1e-2


def test_a_refusal_names_the_position_among_all() -> None:
    """Where it is neither the first of its chunk nor the first that is scored."""
    model, target = Model(torch.float64), masked(Objective())
    target.sampled_logprob[9] = math.nan
    with pytest.raises(NumericsError, match=r"TeacherTarget row 9: .* numbers; got nan"):
        run(model, target, Objective(), max_bytes=bytes_for(3, target))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_out_of_range_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        run(Model(torch.float64), masked(Objective()), Objective(), temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": PADDED + 1}, "at least 21 rows"),
        ({"vocab_size": 0}, "rows"),
        ({"weight": torch.ones(3)}, "fused_loss weight"),
        ({"cross_entropy_weight": torch.ones(NUM_ROWS, 1)}, "cross_entropy_weight"),
    ],
)
def test_shapes_that_disagree_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        run(Model(torch.float64), masked(Objective()), Objective(), **options)


def test_hidden_states_of_another_length_are_refused() -> None:
    model = Model(torch.float64)
    with pytest.raises(ShapeError, match="hidden"):
        fused_loss(model.hidden[1:], model.head, masked(Objective()), Objective())


def test_float16_is_refused_where_it_would_lose_gradients() -> None:
    model = Model(torch.float16)
    target = masked(Objective())
    with pytest.raises(ConfigError, match="bfloat16"):
        run(model, target, Objective())
    with torch.no_grad():
        found = fused_loss(model.hidden, model.head, target, Objective(), vocab_size=VOCAB)
    assert bool(found.value.isfinite().all())
