"""Attention inside each segment of a packed micro-batch, and of a completion with the prompt that
it shares: one scaled-dot-product call a segment.

Registered with transformers under `NAME`; where segments lie comes as the keyword `segments`. On a
CPU this is three times as fast as one call with a block-diagonal mask, and gives what the rows give
one by one, to the bit. On a GPU in half precision, unless prompts are shared, one variable-length
flash attention serves all segments.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from stillroom.cache.errors import ShapeError
from stillroom.train.segments import Segments, Span

NAME = "stillroom_rows"
HALF = (torch.float16, torch.bfloat16)
HARMLESS = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("position_ids", "cache_position", "deterministic", "output_router_logits"),
)
"""Keywords that change nothing here: where segments lie is known, and positions are in the keys."""


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of every segment with its prefix and itself.

    Args:
        module: the attention layer.
        query: (1, heads, T, D).
        key: (1, key heads, T, D); key heads divide heads.
        value: as key; its D may differ.
        attention_mask: must be None; packing needs none.
        segments: where they lie.
        dropout: probability.
        scaling: factor of the scores; None for 1 / sqrt(D).
        sliding_window: tokens that a query sees, itself included; None for all before it.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: (heads,), the score of an attention sink of each head.
        is_causal: must not be False.
        others: may be HARMLESS ones, None or False: what an architecture passes besides, such as a
            choice of keys or a bias, would be lost.

    Returns:
        (1, T, heads, D), and no weights.

    Raises:
        ShapeError: not a packed batch, or more than this attention can do.
    """
    _check_others(module, is_causal, others)
    if segments is None or attention_mask is not None or query.shape[0] != 1:
        got = f"batch {query.shape[0]}, mask {attention_mask is not None}"
        do = "Load the student with train.student.load_student and give it packed micro-batches."
        expected = "one packed batch with its segments and no mask"
        raise ShapeError(type(module).__name__, expected, got, do)
    plain = softcap is None and s_aux is None
    if plain and not dropout and not segments.shares and _has_varlen(query, value):
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    out = []
    for span in segments.spans:
        seen = _seen(span, sliding_window)
        mask = segments.mask(seen.stop - seen.start, span.stop - span.start, sliding_window)
        part = query[:, :, span.start : span.stop]
        keys, values = (_gather(x, seen, span) for x in (key, value))
        if plain:
            out.append(_attend(part, keys, values, mask, dropout, scaling))
        else:
            out.append(_attend_plainly(part, keys, values, mask, dropout, scaling, softcap, s_aux))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _check_others(
    module: torch.nn.Module, is_causal: bool | None, others: Mapping[str, Any]
) -> None:
    lost = [n for n, v in others.items() if n not in HARMLESS and v is not None and v is not False]
    if is_causal is False:
        lost.append("is_causal = False")
    if lost:
        do = "Take one row a micro-batch, with the model's own attention."
        raise ShapeError(type(module).__name__, "causal attention, no more", ", ".join(lost), do)


def _seen(span: Span, window: int | None) -> slice:
    """The tokens of its prefix that a segment's first token sees; the others see no more."""
    start = span.prefix_start
    if window is not None:
        start = min(max(start, span.prefix_stop - window + 1), span.prefix_stop)
    return slice(start, span.prefix_stop)


def _gather(x: torch.Tensor, seen: slice, span: Span) -> torch.Tensor:
    own = x[:, :, span.start : span.stop]
    return torch.cat([x[:, :, seen], own], dim=2) if seen.start < seen.stop else own


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    if not _takes_groups(query, mask):
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """What no fused kernel does: scores written out, capped, and with a sink beside them."""
    length = query.shape[2]
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    score = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    score = score.masked_fill(~mask, -math.inf)
    if sink is not None:
        score = torch.cat([score, sink.view(1, -1, 1, 1).expand(1, -1, length, 1)], dim=-1)
    accurate = torch.promote_types(score.dtype, torch.float32)
    weight = score.softmax(-1, dtype=accurate).to(value.dtype)
    return drop(weight[..., : key.shape[2]], dropout) @ value


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _has_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether variable-length flash attention runs on such tensors."""
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    size = query.shape[-1]
    return _run_dtype(query) in HALF and size % 8 == 0 and size <= 256 and value.shape[-1] == size


def _takes_groups(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key heads than heads: on a GPU, flash attention alone."""
    return not query.is_cuda or (mask is None and _run_dtype(query) in HALF)


def _run_dtype(query: torch.Tensor) -> torch.dtype:
    """The dtype that attention runs in: autocast's where that is on."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    q, k, v = (x[0].transpose(0, 1).to(_run_dtype(query)) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        segments.edge,
        segments.edge,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


AttentionInterface.register(NAME, row_attention)
