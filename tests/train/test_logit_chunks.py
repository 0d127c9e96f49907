"""Chunks of logits: the head's, in the same memory, and no more of it than was allowed."""

import pytest
import torch

from stillroom.train import logit_chunks as chunks_module
from stillroom.train.logit_chunks import LogitChunks, logit_chunks
from stillroom.train.output_head import OutputHead
from tests.train.fused_cases import assert_near


def head_of(dtype: torch.dtype = torch.float64, *, biased: bool = True) -> OutputHead:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(11, generator=generator, dtype=torch.float64).to(dtype)
    return OutputHead(weight, bias if biased else None, 0.7, 2.0)


@pytest.mark.parametrize("max_bytes", [1, 8 * 9 * 3, 1 << 20])
@pytest.mark.parametrize("biased", [True, False])
def test_chunks_are_the_head_s_logits(max_bytes: int, biased: bool) -> None:
    head, hidden = head_of(biased=biased), torch.randn(7, 4, dtype=torch.float64)
    found: list[torch.Tensor] = []
    where: list[int] = []
    for rows, logits in logit_chunks(head, hidden, max_bytes, temperature=1.3, vocab_size=9):
        assert logits.nbytes <= max(max_bytes, 9 * 8)
        found.append(logits.clone())
        where += range(rows.start, rows.stop)
    assert where == list(range(7))
    assert_near(torch.cat(found), head.logits(hidden)[:, :9] / 1.3, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("block", [1, 4, 4096])
def test_half_precision_factors_give_float32_logits(
    dtype: torch.dtype, biased: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to bfloat16, logits of a hundred would be off by as much as a quarter."""
    monkeypatch.setattr(chunks_module, "WEIGHT_ROWS", block)
    made = head_of(dtype, biased=biased)
    head = OutputHead(made.weight, made.bias, 0.7)
    hidden = (40 * torch.randn(7, 4, generator=torch.Generator().manual_seed(1))).to(dtype)
    bias = 0.0 if head.bias is None else head.bias.double()
    wanted = 0.7 * (hidden.double() @ head.weight.double().T + bias)
    assert float((wanted - wanted.to(dtype)).abs().max()) > 1e-2
    ((_, logits),) = logit_chunks(head, hidden)
    assert logits.dtype == torch.float32
    assert_near(logits, wanted, 1e-5)


def test_chunks_share_their_memory_and_are_of_like_size() -> None:
    made = LogitChunks(head_of(), torch.zeros(10, 4), 11, 1.0, max_bytes=4 * 11 * 8)
    assert made.num_rows == 4
    made = LogitChunks(head_of(), torch.zeros(9, 4), 11, 1.0, max_bytes=8 * 11 * 8)
    assert made.num_rows == 5
    hidden = torch.ones(5, 4, dtype=torch.float64)
    assert made.logits(hidden).data_ptr() == made.logits(hidden[:4]).data_ptr()


@pytest.mark.parametrize(("num_spare", "bytes_each", "rows"), [(0, 6, 8), (1, 10, 5)])
def test_all_buffers_are_within_the_bound(num_spare: int, bytes_each: int, rows: int) -> None:
    """Products in bfloat16 have a buffer of their own beside the float32 one and the spare one."""
    hidden = torch.zeros(100, 4, dtype=torch.bfloat16)
    limit = rows * 11 * bytes_each
    made = LogitChunks(head_of(torch.bfloat16), hidden, 11, 1.0, limit, num_spare)
    assert made.num_rows == rows
    made = LogitChunks(head_of(torch.bfloat16), hidden, 11, 1.0, limit - 1, num_spare)
    assert made.num_rows < rows


def test_no_positions() -> None:
    assert list(logit_chunks(head_of(), torch.zeros(0, 4, dtype=torch.float64))) == []
    assert LogitChunks(head_of(), torch.zeros(0, 4), 11, 1.0, 1 << 20).num_rows == 0


def test_no_gradient() -> None:
    hidden = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    ((_, logits),) = logit_chunks(head_of(), hidden)
    assert not logits.requires_grad
