"""Which architectures pack: what a model does beyond the rows that are tried is found in its small
copy, and what fails is no reason to crash."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV4Config,
    DogeConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    StableLmConfig,
)

from stillroom.train import packed_forward
from stillroom.train.packed_forward import why_not_packed
from tests.train.test_packed_architectures import CONFIGS, HEAD, SIZES, VOCAB, make_model

FAR: dict[str, Any] = {**SIZES, "max_position_embeddings": 4096}
"""Sizes of a model whose windows are far beyond the rows that it is tried with."""
LINEAR: dict[str, Any] = {
    **{f"linear_{part}": 2 for part in ("num_key_heads", "num_value_heads")},
    **{f"linear_{part}_head_dim": 8 for part in ("key", "value")},
    "layer_types": ["linear_attention", "full_attention"],
}
DEEPSEEK: dict[str, Any] = {
    **FAR,
    **{"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 512},
    **{"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    **{"q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 16},
    "layer_types": ["heavily_compressed_attention"] * 4,
}


def phimoe(window: int | None) -> PreTrainedConfig:
    """An architecture whose window is in its mask alone."""
    return PhimoeConfig(**FAR, num_local_experts=2, num_experts_per_tok=1, sliding_window=window)


def scaled_rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    """Rotary positions that are scaled beyond a length of 1,024."""
    own = {"rope_type": rope_type, "rope_theta": 1e4, **settings}
    return {"rope_parameters": own | {"original_max_position_embeddings": 1024}}


PACKING: dict[str, Callable[[], PreTrainedConfig]] = {
    **CONFIGS,
    "phimoe, no window": lambda: phimoe(None),
    "mistral, a far window": lambda: MistralConfig(**FAR, sliding_window=2048),
    "llama, yarn": lambda: LlamaConfig(**FAR, **scaled_rope("yarn", factor=4.0)),
}
UNLIKE: dict[str, Callable[[], PreTrainedConfig]] = {
    "phimoe, a far window": lambda: phimoe(2048),
    "deepseek_v4, compressed far back": lambda: DeepseekV4Config(**DEEPSEEK),
    "phi3, other factors for long rows": lambda: Phi3Config(
        **FAR,
        **scaled_rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 5.0]),
    ),
    "llama, factors of the longest row": lambda: LlamaConfig(
        **FAR, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}
    ),
}
FAILING: dict[str, Callable[[], PreTrainedConfig]] = {
    "stablelm": lambda: StableLmConfig(**SIZES),
    "nemotron": lambda: NemotronConfig(**SIZES),
    "doge": lambda: DogeConfig(**SIZES),
}


@pytest.mark.parametrize("architecture", PACKING)
def test_what_packs_and_shares(architecture: str) -> None:
    model = make_model(PACKING[architecture]())
    own = model.config._attn_implementation
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation(own := "eager")
    assert why_not_packed(model, VOCAB) == ("", "")
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("architecture", UNLIKE)
def test_what_only_long_rows_show_is_found(architecture: str) -> None:
    model = make_model(UNLIKE[architecture]())
    own = packed_forward._Probe(model, VOCAB, packed_forward.SHORT).reasons()[0]
    assert own == "", "its own windows are too far away"
    why, unshared = why_not_packed(model, VOCAB)
    name = type(model).__name__
    assert why.startswith(f"packed rows of {name} differ by")
    assert unshared == why


@pytest.mark.parametrize("architecture", FAILING)
def test_an_architecture_that_fails_takes_one_row(architecture: str) -> None:
    model = make_model(FAILING[architecture]())
    own = model.config._attn_implementation
    why, unshared = why_not_packed(model, VOCAB)
    assert why.startswith(f"{type(model).__name__} cannot read packed rows: ")
    assert unshared == why
    assert model.config._attn_implementation == own


def test_a_model_of_which_no_small_one_can_be_made_takes_one_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Any) -> Any:
        raise KeyError("num_hidden_layers")

    monkeypatch.setattr(packed_forward, "small_copy", fail)
    why, unshared = why_not_packed(make_model(CONFIGS["llama"]()), VOCAB)
    assert why == unshared
    assert why.startswith("no small LlamaForCausalLM can be made to try it")
    assert "num_hidden_layers" in why


def test_a_state_behind_weights_of_zero_is_found() -> None:
    """A fresh layer that adds nothing yet will, once it is trained."""
    model = make_model(Qwen3_5TextConfig(**HEAD, **LINEAR))
    with torch.no_grad():
        model.get_submodule("model.layers.0.linear_attn.out_proj").weight.zero_()  # type: ignore[operator]
    assert packed_forward._Probe(model, VOCAB, packed_forward.SHORT).reasons() == ("", "")
    assert why_not_packed(model, VOCAB)[0] == "packed rows of Qwen3_5ForCausalLM see one another"


def test_hidden_states_that_are_not_finite_take_one_row() -> None:
    model = make_model(CONFIGS["llama"]())
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")  # type: ignore[operator]
    why, unshared = why_not_packed(model, VOCAB)
    assert why == unshared == "hidden states of LlamaForCausalLM are not finite"


def test_float32_is_held_to_more_than_half_precision() -> None:
    """A deviation of half a percent is other maths in float32, and rounding in bfloat16."""
    for dtype, packs in ((torch.float32, False), (torch.bfloat16, True)):
        model = make_model(CONFIGS["llama"](), dtype)
        probe = packed_forward._Probe(model, VOCAB, packed_forward.SHORT)
        assert probe.reasons()[0] == ""
        probe._alone = [hidden * 1.005 for hidden in probe._alone]
        found = [hidden / 1.005 for hidden in probe._alone]
        assert (probe._unlike("packed rows", found) == "") == packs
