"""A random copy of a model's architecture, small enough to try out in a moment what depends on
windows, chunks, compression, or weights that happen to be zero."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from stillroom.cache.errors import InputError

VOCAB = 64
HEADS = 4
HEAD_DIM = 8
MAX_WEIGHTS = 10_000_000
PER_LAYER = "per_layer_config"
SIZES: dict[str, float] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": HEADS * HEAD_DIM,
    "hidden_size_per_layer_input": 8,
    "word_embed_proj_dim": HEADS * HEAD_DIM,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "dense_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
    "rotary_dim": HEAD_DIM // 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
"""By the names of Hugging Face configurations."""
REACHES = {
    **{"window": 8, "chunk": 8, "local_attention": 8},
    **{"compress": 4, "block_size": 4, "index_topk": 2},
}
"""The most that settings with such names keep: fewer than the rows have that are tried. Rotary
positions have been trained for more than the shorter row's, and fewer than the longer one's."""


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the kinds of layers of a model and its settings, small, with random weights in
    float32; on its device, with its attention, in eval mode.

    Raises:
        InputError: it would not be small.
        Exception: whatever an architecture raises that cannot be had in these sizes.
    """
    attention = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]), _quietly():
        config = small_config(model.config.get_text_config())
        torch.manual_seed(0)
        with torch.device("meta"):
            shell: Any = AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in shell.parameters())
        if size > MAX_WEIGHTS:
            name, do = type(model).__name__, "Take one row a micro-batch."
            raise InputError(name, f"at most {MAX_WEIGHTS} weights when small", f"{size}", do)
        made: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
        with torch.no_grad():
            for parameter in made.parameters():
                noise = 0.3 * torch.randn_like(parameter)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    small: PreTrainedModel = made.to(model.device).eval()
    return small


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers says about odd sizes."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The first layers, two at least, as many as have all kinds, in the sizes above."""
    values, names = config.to_dict(), config.attribute_map
    layers = names.get("num_hidden_layers", "num_hidden_layers")
    count = values[layers]
    by_layer = [n for n, v in values.items() if isinstance(v, list) and len(v) == count > 1]
    kinds = [repr([values[n][i] for n in by_layer]) for i in range(count)]
    values[layers] = max(min(2, count), *(1 + kinds.index(kind) for kind in kinds))
    for name in by_layer:
        values[name] = values[name][: values[layers]]
    if others := values.get(PER_LAYER):
        values[PER_LAYER] = {i: own for i, own in others.items() if int(i) < values[layers]}
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    sizes = {**SIZES, "num_key_value_heads": max(1, HEADS * heads // config.num_attention_heads)}
    if values.get("rope_parameters"):
        sizes["max_position_embeddings"] = 24
    small = {names.get(name, name): size for name, size in sizes.items()}
    for name in ("dtype", "quantization_config"):
        values.pop(name, None)
    return type(config)(**_shrunk(values, small))


def _shrunk(values: dict[str, Any], small: dict[str, float], within: str = "") -> dict[str, Any]:
    """The same settings, also those inside others, in small sizes; unset ones stay so."""
    return {name: _shrink(f"{within}{name}", value, small) for name, value in values.items()}


def _shrink(name: str, value: Any, small: dict[str, float]) -> Any:
    if isinstance(value, dict):
        return _shrunk(value, small, f"{name}.")
    own = name.rpartition(".")[2]
    if own in ("short_factor", "long_factor"):
        return value[: HEAD_DIM // 2]
    if isinstance(value, list):
        return [_shrink(name, item, small) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if own == "partial_rotary_factor" and value == 1:
        return value
    size = small.get(own, value)
    return min([size, *(reach for part, reach in REACHES.items() if part in name)])
