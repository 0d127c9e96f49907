"""A random copy of a model's architecture, small enough to try out in a moment what may depend on
windows, chunks, compression or weights that happen to be zero."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 64
WEIGHT = 0.3
SIZES: dict[str, int] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "word_embed_proj_dim": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "compress_rate": 4,
    "compress_ratio": 4,
}
"""By the names of Hugging Face configurations; those of windows, chunks and rates are below the
lengths of the rows that are tried."""


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the kinds of layers and the settings of a model, small, with random weights in
    float32, on its device and with its attention; in eval mode.

    Raises:
        Exception: whatever an architecture raises that cannot be had in these sizes.
    """
    config = small_config(model.config.get_text_config())
    attention = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        made.float()
        with torch.no_grad():
            for parameter in made.parameters():
                noise = WEIGHT * torch.randn_like(parameter)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    small: PreTrainedModel = made.to(model.device).eval()
    return small


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Its first layers, as many as have all kinds, two at least, in the sizes above."""
    values, names = config.to_dict(), config.attribute_map
    layers = names.get("num_hidden_layers", "num_hidden_layers")
    count = values[layers]
    by_layer = [n for n, v in values.items() if isinstance(v, list) and len(v) == count > 1]
    kinds = [repr([values[n][i] for n in by_layer]) for i in range(count)]
    values[layers] = max(2, 1 + max(kinds.index(kind) for kind in kinds))
    for name in by_layer:
        values[name] = values[name][: values[layers]]
    heads = "num_key_value_heads"
    key_heads = min(4, max(1, 4 * getattr(config, heads, 4) // config.num_attention_heads))
    for name, size in {**SIZES, heads: key_heads}.items():
        own = names.get(name, name)
        values[own] = _resized(values[own], size) if own in values else size
    ...
