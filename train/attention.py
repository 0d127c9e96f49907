"""Attention inside each row of a packed micro-batch: one causal scaled-dot-product call a row.

Registered with transformers under `NAME`; the row boundaries come as `cu_seq_lens_q`, the keyword
that variable-length kernels take. On a CPU this is three times as fast as one call with a
block-diagonal mask, and gives what the rows give one by one, to the bit.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from stillroom.cache.errors import InputError, ShapeError

NAME = "stillroom_rows"


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of every row with itself.

    Args:
        module: the attention layer.
        query: (1, heads, T, D).
        key: (1, key heads, T, D); key heads divide heads.
        value: as key.
        attention_mask: must be None; packing needs none.
        cu_seq_lens_q: (R + 1,) int32, first token of each row, then T.
        dropout: probability.
        scaling: factor of the scores; None for 1 / sqrt(D).
        sliding_window: tokens that a query sees, itself included; None for all before it.
        softcap: not supported.

    Returns:
        (1, T, heads, D), and no weights.

    Raises:
        ShapeError: not a packed batch.
        InputError: the architecture has a soft-cap on attention scores.
    """
    if softcap is not None:
        expected, do = "attention without a soft-cap", "Choose a student of another architecture."
        raise InputError(type(module).__name__, expected, f"a soft-cap of {softcap}", do)
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        got = f"batch {query.shape[0]}, mask {attention_mask is not None}"
        do = "Load the student with train.student.load_student and give it packed micro-batches."
        expected = "one packed batch with row boundaries and no mask"
        raise ShapeError(type(module).__name__, expected, got, do)
    bounds = cu_seq_lens_q.tolist()
    rows = []
    for start, stop in pairwise(bounds):
        mask = _window_mask(stop - start, sliding_window, query.device)
        rows.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, start:stop],
                value[:, :, start:stop],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, row_attention)
