"""Small copies: the same layers and settings, other sizes."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from stillroom.cache.errors import InputError
from stillroom.train import small_copy as module
from stillroom.train.small_copy import VOCAB, small_config, small_copy
from tests.train.test_packed_architectures import CONFIGS, make_model


def test_layers_of_every_kind_are_kept() -> None:
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 3
    small: Any = small_config(Gemma3TextConfig(num_hidden_layers=18, layer_types=kinds))
    assert small.num_hidden_layers == 6
    assert small.layer_types == kinds[:6]
    assert small.sliding_window == 8


def test_equal_layers_make_two() -> None:
    small: Any = small_config(LlamaConfig(num_hidden_layers=80, num_attention_heads=64))
    assert (small.num_hidden_layers, small.vocab_size) == (2, VOCAB)


@pytest.mark.parametrize(("heads", "small_heads"), [(32, 4), (16, 2), (8, 1), (1, 1)])
def test_heads_stay_grouped(heads: int, small_heads: int) -> None:
    config = LlamaConfig(num_attention_heads=32, num_key_value_heads=heads)
    small: Any = small_config(config)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, small_heads)


def test_settings_are_kept_and_unset_ones_stay_unset() -> None:
    config = Qwen2Config(use_sliding_window=False, sliding_window=4096, rms_norm_eps=0.25)
    small: Any = small_config(config)
    assert small.sliding_window is None
    assert small.rms_norm_eps == 0.25
    assert small.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]  # type: ignore[index]


def test_settings_of_single_layers_are_kept() -> None:
    small: Any = small_config(Gemma4TextConfig())
    assert small.layer_types[-1] == "full_attention"
    assert len(small.layer_types) == small.num_hidden_layers == 6


def test_names_of_older_architectures_are_found() -> None:
    small: Any = small_config(GPT2Config())
    assert (small.n_embd, small.n_head, small.n_layer) == (32, 4, 2)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_copy_is_small_and_random(architecture: str) -> None:
    """No weight is zero, and the process's random numbers go on as they were."""
    model = make_model(CONFIGS[architecture]())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    small = small_copy(model)
    assert torch.equal(torch.rand(3), expected)
    assert type(small) is type(model)
    assert not small.training
    assert small.config._attn_implementation == model.config._attn_implementation
    assert sum(parameter.numel() for parameter in small.parameters()) < 100_000
    for name, parameter in small.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.any(), name
    again = small_copy(model)
    assert all(map(torch.equal, small.parameters(), again.parameters()))


def test_one_that_would_not_be_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WEIGHTS", 1000)
    with pytest.raises(InputError, match="LlamaForCausalLM: expected at most 1000 weights"):
        small_copy(make_model(CONFIGS["llama"]()))


def test_lists_of_factors_fit_the_small_heads() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    config: PreTrainedConfig = LlamaConfig(
        rope_parameters={**rope, "rope_theta": 1e4, "original_max_position_embeddings": 4096},
        max_position_embeddings=131072,
    )
    small: Any = small_config(config)
    assert [len(small.rope_parameters[name]) for name in ("short_factor", "long_factor")] == [4, 4]
    model = AutoModelForCausalLM.from_config(small)
    assert model(torch.arange(9)[None]).logits.shape == (1, 9, VOCAB)
