"""Row attention: packed rows are what they are one by one, in values, in gradients, and apart."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from stillroom.cache.causal_lm import head_logits, trunk
from stillroom.cache.errors import InputError, ShapeError
from stillroom.train.attention import NAME, row_attention

VOCAB = 40
LENGTHS = [9, 3, 1, 14]
WINDOW = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW),
}
architectures = pytest.mark.parametrize("architecture", CONFIGS)


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose attention is far from even."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
    return model


def make_rows() -> list[torch.Tensor]:
    """Token ids of rows of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def starts_of(lengths: list[int]) -> torch.Tensor:
    """First token of each row, then the end."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def packed_logits(model: PreTrainedModel, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each row, by one packed forward."""
    model.set_attn_implementation(NAME)
    lengths = [len(row) for row in rows]
    starts = starts_of(lengths)
    hidden = trunk(
        model,
        torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )
    return list(torch.split(head_logits(model, hidden)[0], lengths))


def single_logits(model: PreTrainedModel, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each row, by itself, with the model's own attention."""
    model.set_attn_implementation("sdpa")
    return [model(row[None], use_cache=False).logits[0] for row in rows]


@architectures
@torch.no_grad()
def test_packed_logits_equal_those_of_the_rows_one_by_one(architecture: str) -> None:
    """Not to the bit: matrix products of other shapes add in another order."""
    model, rows = make_model(CONFIGS[architecture]()), make_rows()
    for alone, packed in zip(single_logits(model, rows), packed_logits(model, rows), strict=True):
        tolerance = 3e-6 * float(alone.abs().max())
        torch.testing.assert_close(packed, alone, rtol=0, atol=tolerance)


@architectures
@torch.no_grad()
def test_a_row_is_the_same_to_the_bit_whatever_the_others_hold(architecture: str) -> None:
    model, rows = make_model(CONFIGS[architecture]()), make_rows()
    before = packed_logits(model, rows)
    for changed in range(len(rows)):
        other = [(row + 1) % VOCAB if i == changed else row for i, row in enumerate(rows)]
        after = packed_logits(model, other)
        for i in range(len(rows)):
            assert torch.equal(before[i], after[i]) == (i != changed)


@architectures
@torch.no_grad()
def test_a_token_does_not_see_what_comes_after_it(architecture: str) -> None:
    model, rows = make_model(CONFIGS[architecture]()), make_rows()
    before = packed_logits(model, rows)[0]
    later = rows[0].clone()
    later[5:] = (later[5:] + 1) % VOCAB
    after = packed_logits(model, [later, *rows[1:]])[0]
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


@architectures
def test_gradients_equal_those_of_the_rows_one_by_one(architecture: str) -> None:
    """Gemma's norms sum in float32 whatever the dtype is."""
    tolerance = 1e-6 if architecture.startswith("gemma") else 1e-12
    model, rows = make_model(CONFIGS[architecture](), torch.float64), make_rows()
    generator = torch.Generator().manual_seed(2)
    weights = [
        torch.randn(len(row), VOCAB, generator=generator, dtype=torch.float64) for row in rows
    ]

    def gradients(logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        terms = [(z * w).sum() for z, w in zip(logits, weights, strict=True)]
        torch.autograd.backward(torch.stack(terms).sum())
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone, packed = (f(model, rows) for f in (single_logits, packed_logits))
    expected, found = gradients(alone), gradients(packed)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        atol = tolerance * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_window_shorter_than_a_row_is_kept(architecture: str) -> None:
    windowed = make_model(CONFIGS[architecture]())
    wide = CONFIGS[architecture]()
    wide.sliding_window = 64
    rows = make_rows()
    near, far = packed_logits(windowed, rows), packed_logits(make_model(wide), rows)
    for i, length in enumerate(LENGTHS):
        assert torch.equal(near[i], far[i]) == (length <= WINDOW)
        assert torch.allclose(near[i][:WINDOW], far[i][:WINDOW], rtol=0, atol=1e-5)


def brute_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, window: int | None
) -> np.ndarray:
    """One row, (heads, T, D): a loop over heads and queries."""
    group = len(query) // len(key)
    out = np.empty_like(query)
    for head, t in np.ndindex(query.shape[:2]):
        first = 0 if window is None else max(0, t - window + 1)
        k, v = (x[head // group, first : t + 1] for x in (key, value))
        weight = np.exp(scale * (k @ query[head, t]))
        out[head, t] = weight / weight.sum() @ v
    return out


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 8),
    scaling=st.none() | st.floats(0.01, 2),
    seed=st.integers(0, 1000),
)
def test_row_attention_is_the_formula(
    lengths: list[int],
    heads: tuple[int, int],
    window: int | None,
    scaling: float | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    total, size = sum(lengths), 4
    query = rng.normal(size=(heads[0], total, size))
    key, value = rng.normal(size=(2, heads[1], total, size))
    q, k, v = (torch.from_numpy(x)[None] for x in (query, key, value))
    out, weights = row_attention(
        torch.nn.Identity(),
        q,
        k,
        v,
        None,
        cu_seq_lens_q=starts_of(lengths),
        scaling=scaling,
        sliding_window=window,
    )
    assert weights is None
    assert out.shape == (1, total, heads[0], size)
    scale = 1 / math.sqrt(size) if scaling is None else scaling
    ends = np.cumsum(lengths)
    for stop, length in zip(ends, lengths, strict=True):
        row = slice(stop - length, stop)
        expected = brute_attention(query[:, row], key[:, row], value[:, row], scale, window)
        np.testing.assert_allclose(out[0, row].transpose(0, 1), expected, rtol=1e-10, atol=1e-12)


def test_the_attention_of_a_row_equals_the_row_alone_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8, generator=generator)
    key, value = torch.randn(2, 1, 2, sum(LENGTHS), 8, generator=generator)
    starts = starts_of(LENGTHS)
    packed, _ = row_attention(torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=starts)
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v = (x[:, :, start:stop].contiguous() for x in (query, key, value))
        ends = torch.tensor([0, stop - start])
        alone, _ = row_attention(torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=ends)
        assert torch.equal(packed[:, start:stop], alone)


def call(**changes: Any) -> None:
    """Row attention of one row of three tokens, with something changed."""
    tensor = torch.zeros(changes.pop("batch", 1), 2, 3, 4)
    arguments = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 3])} | changes
    mask = arguments.pop("attention_mask")
    row_attention(torch.nn.Identity(), tensor, tensor, tensor, mask, **arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cu_seq_lens_q": None},
        {"attention_mask": torch.ones(1, 1, 3, 3)},
        {"batch": 2},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_not_packed_is_refused(wrong: dict[str, Any]) -> None:
    call()
    with pytest.raises(ShapeError, match="Identity: expected one packed batch"):
        call(**wrong)


@torch.no_grad()
def test_a_model_with_a_soft_cap_on_its_scores_is_refused() -> None:
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=50.0)
    with pytest.raises(InputError, match=r"Gemma2Attention.*soft-cap of 50\.0"):
        packed_logits(make_model(config), make_rows())


@torch.no_grad()
def test_a_model_that_is_not_told_the_boundaries_is_refused() -> None:
    model = make_model(CONFIGS["llama"]())
    model.set_attn_implementation(NAME)
    with pytest.raises(ShapeError, match="row boundaries"):
        model(torch.cat(make_rows())[None], use_cache=False)
