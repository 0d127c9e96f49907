"""On CUDA in half precision: one variable-length kernel gives what one call a segment gives."""

import pytest
import torch

from stillroom.train import attention
from stillroom.train.attention import row_attention
from tests.train.test_attention import segments_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
LENGTHS = [190, 3, 1, 64, 300]


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_the_variable_length_kernel_is_row_attention(
    heads: tuple[int, int], window: int | None
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, n, sum(LENGTHS), 64, generator=generator, device="cuda").requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    segments = segments_of(LENGTHS, device=torch.device("cuda"))
    found = []
    for dtype, has in ((torch.bfloat16, True), (torch.float32, False)):
        q, k, v = (x.to(dtype) for x in (query, key, value))
        assert attention._has_varlen(q, v) == has
        out, _ = row_attention(
            torch.nn.Identity(), q, k, v, None, segments=segments, sliding_window=window
        )
        gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
        found.append((out.float(), *gradients))
    for fused, plain in zip(*found, strict=True):
        assert float((fused - plain).norm() / plain.norm()) < 0.01
