"""On CUDA in half precision: one variable-length kernel gives what one call a segment gives."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@pytest.mark.parametrize(
    ("dtype", "prefix"),
    [
        (torch.float32, None),
        (torch.float32, [-1, 0, -1, 2, -1]),
        (torch.bfloat16, [-1, 0, -1, 2, -1]),
    ],
)
def test_grouped_heads_never_need_the_plain_kernel(
    dtype: torch.dtype, prefix: list[int] | None
) -> None:
    """That one holds all scores of a segment."""
    query, key, value = (
        torch.randn(1, n, sum(LENGTHS), 64, device="cuda", dtype=dtype) for n in (6, 2, 2)
    )
    segments = segments_of(LENGTHS, prefix, torch.device("cuda"))
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):
        out, _ = row_attention(torch.nn.Identity(), query, key, value, None, segments=segments)
    with sdpa_kernel([SDPBackend.MATH]):
        plain, _ = row_attention(torch.nn.Identity(), query, key, value, None, segments=segments)
    assert float((out - plain).float().norm() / plain.float().norm()) < 0.01
