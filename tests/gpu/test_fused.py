"""On CUDA the fused loss is what it is on the CPU, and holds no more memory than it was allowed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stillroom.train.fused import FusedLoss, fused_loss
from stillroom.train.objective import Objective
from stillroom.train.output_head import OutputHead
from stillroom.train.target import TeacherTarget
from tests.train.fused_cases import OBJECTIVES, name_of, target_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
VOCAB, WIDTH = 301, 16


def run(
    device: str, dtype: torch.dtype, target: TeacherTarget, objective: Objective
) -> tuple[FusedLoss, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(target), WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    leaves = [
        (torch.randn(*shape, generator=generator) / 2).to(device, dtype).requires_grad_()
        for shape in shapes
    ]
    head = OutputHead(leaves[1], leaves[2], soft_cap=20.0)
    found = fused_loss(
        leaves[0], head, target.to(device), objective, max_bytes=16 * 8 * VOCAB, temperature=1.2
    )
    return found, list(torch.autograd.grad(found.total, leaves))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 5e-2)]
)
def test_cuda_gives_what_the_cpu_gives(
    objective: Objective, dtype: torch.dtype, tolerance: float
) -> None:
    """float32 with room for TF32; bfloat16 where the logits round differently."""
    target = target_for(objective, 40, VOCAB, num_kept=20)
    target = replace(target, mask=torch.arange(40) % 5 != 2)
    cpu, cuda = (run(device, dtype, target, objective) for device in ("cpu", "cuda"))
    pairs = [(cpu[0].value, cuda[0].value), *zip(cpu[1], cuda[1], strict=True)]
    for wanted, got in pairs:
        assert got.is_cuda
        difference = (got.cpu().double() - wanted.double()).norm()
        assert float(difference / (1e-3 + wanted.double().norm())) < tolerance


def test_peak_memory_is_the_bound_and_the_gradients() -> None:
    num_rows, vocab_size, limit = 4096, 32_000, 1 << 26
    target = target_for(Objective(), num_rows, vocab_size, num_kept=8).to("cuda")
    hidden = torch.randn(num_rows, 64, device="cuda", requires_grad=True)
    weight = torch.randn(vocab_size, 64, device="cuda", requires_grad=True)
    gradients = hidden.nbytes + weight.nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_loss(hidden, OutputHead(weight), target, Objective(), max_bytes=limit)
    held = torch.cuda.max_memory_allocated() - before
    assert held < limit + gradients + (1 << 26)
    assert num_rows * vocab_size * 4 > limit + gradients + (1 << 26)
