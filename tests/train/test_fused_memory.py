"""What the fused loss holds in memory: chunks within their limit, however many positions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillroom.train.estimators import objective_loss
from stillroom.train.fused import fused_loss
from stillroom.train.objective import Objective
from stillroom.train.output_head import OutputHead
from tests.train.fused_cases import OBJECTIVES, assert_near, name_of, target_for

VOCAB, WIDTH = 2000, 4


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the bytes of every storage that is made, and is not an argument's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and look at what comes out."""
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _is(x)}
        new = [x.untyped_storage() for x in tree_leaves(result) if _is(x)]
        self.nbytes += [storage.size() for storage in new if storage.data_ptr() not in given]
        return result


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def made(num_rows: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, WIDTH, generator=generator).requires_grad_()
    return hidden, torch.randn(VOCAB, WIDTH, generator=generator)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_no_tensor_of_positions_by_vocabulary_is_ever_made(objective: Objective) -> None:
    """What is made stays below max_bytes, where (T, V) would be 15 times that; and (n, V) is made
    twice, for logits and their like at other temperatures, however many chunks there are."""
    num_rows, limit = 300, 8 * VOCAB * 10
    target = target_for(objective, num_rows, VOCAB)
    hidden, weight = made(num_rows)
    with Made() as seen:
        found = fused_loss(hidden, OutputHead(weight), target, objective, max_bytes=limit)
        torch.autograd.backward(found.total)
    assert sum(seen.nbytes) > limit
    large = [nbytes for nbytes in seen.nbytes if nbytes >= limit / 4]
    assert len(large) == 2
    assert sum(large) <= limit
    with Made() as seen:
        plain = objective_loss(hidden @ weight.T, target, objective)
        torch.autograd.backward(plain.sum())
    assert_near(found.value, plain.detach(), 1e-5)
    assert max(seen.nbytes) >= num_rows * VOCAB * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(mode="renorm"),
        Objective(kind="jsd", beta=0.2),
        Objective(kind="policy_gradient", clip_range=0.2, baseline=True),
        Objective(kind="forward_kl_tail_samples"),
    ],
    ids=name_of,
)
def test_all_that_is_held_at_once_stays_below_the_limit(
    objective: Objective, dtype: torch.dtype
) -> None:
    """With 64 kept entries; but for the hidden states' gradient and a few numbers a position. Each
    tensor of all positions by entries in half precision would be 128 bytes a position."""
    num_rows, limit = 400, 1 << 20
    target = target_for(objective, num_rows, VOCAB, num_kept=64).to(dtype=dtype)
    hidden, weight = made(num_rows)
    fused_loss(hidden, OutputHead(weight), target, objective, max_bytes=limit)  # warms up
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = fused_loss(hidden, OutputHead(weight), target, objective, max_bytes=limit)
        torch.autograd.backward(found.total)
    live = most = 0
    assert profiler.profiler is not None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    assert limit / 2 < most < limit + num_rows * (4 * WIDTH + 64)


def test_gradients_are_handed_over_without_a_copy() -> None:
    target = target_for(Objective(), 4, VOCAB)
    hidden, weight = torch.ones(4, 8, requires_grad=True), torch.ones(VOCAB, 8, requires_grad=True)
    total = fused_loss(hidden, OutputHead(weight), target, Objective()).total
    with Made() as seen:
        torch.autograd.backward(total)
    assert weight.grad is not None
    assert all(nbytes < hidden.nbytes for nbytes in seen.nbytes)
