"""Output heads as tensors: the model's own logits, with scale and soft-cap, and a LoRA on them."""

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from stillroom.cache.causal_lm import head_logits
from stillroom.cache.errors import ConfigError, InputError, StillroomError
from stillroom.train.output_head import OutputHead
from tests.train.fused_cases import assert_near

SMALL: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
}
GPTJ: dict[str, Any] = {"vocab_size": 19, "n_embd": 8, "n_layer": 1, "n_head": 2, "rotary_dim": 2}
MODELS: dict[str, Any] = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "divisor": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "soft-cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1.5)),
    "bias": lambda: GPTJForCausalLM(GPTJConfig(**GPTJ)),
}
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["lm_head"]}


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cast(PreTrainedModel, MODELS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def with_lora(**settings: Any) -> PreTrainedModel:
    model = made("plain")
    inject_adapter_in_model(LoraConfig(**LORA | settings), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def hidden_states() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_the_model_s(name: str, dtype: torch.dtype) -> None:
    model: Any = made(name)
    model, hidden = model.to(dtype), hidden_states().to(dtype)
    found = OutputHead.of(model).logits(hidden)
    assert found.dtype == dtype
    assert_near(found, head_logits(model, hidden), 1e-6 if dtype == torch.float32 else 1e-12)


def test_the_weight_is_the_parameter_itself() -> None:
    model = made("tied")
    head = OutputHead.of(model)
    assert head.weight is model.get_input_embeddings().weight
    assert head.bias is None


def test_bfloat16_factors_give_float32_logits() -> None:
    model, hidden = made("plain"), hidden_states()
    weight = model.get_output_embeddings().weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = OutputHead.of(model).logits(hidden)
    assert found.dtype == torch.float32
    assert_near(found.detach(), hidden.bfloat16().float() @ weight.bfloat16().float().T, 1e-6)
    assert torch.equal(found, OutputHead.of(model.bfloat16()).logits(hidden.bfloat16()))


@pytest.mark.parametrize("training", [False, True])
def test_lora_on_the_head(training: bool) -> None:
    model, hidden = with_lora().train(training), hidden_states()
    layer: Any = model.get_output_embeddings()
    adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found, wanted = OutputHead.of(model).logits(hidden), head_logits(model, hidden)
    assert_near(found.detach(), wanted.detach(), 1e-5)
    ours, theirs = (torch.autograd.grad(x.square().sum(), adapters) for x in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_adapters_are_added_in_float32_under_autocast_too() -> None:
    model = with_lora()
    wanted = OutputHead.of(model).weight
    with torch.autocast("cpu", torch.bfloat16):
        found = OutputHead.of(model).weight
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_lora_that_is_merged_or_disabled() -> None:
    model, hidden = with_lora(), hidden_states()
    layer: Any = model.get_output_embeddings()
    adapted = OutputHead.of(model).logits(hidden).detach()
    layer.enable_adapters(False)
    plain = OutputHead.of(model).logits(hidden).detach()
    assert_near(plain, made("plain").get_output_embeddings()(hidden).detach(), 1e-6)
    layer.enable_adapters(True)
    layer.merge()
    assert_near(OutputHead.of(model).logits(hidden).detach(), adapted, 1e-5)
    assert float((plain - adapted).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("settings", "got"), [({"lora_dropout": 0.1}, "dropout"), ({"use_dora": True}, "DoRA")]
)
def test_more_than_a_plain_lora_is_refused(settings: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError, match=got):
        OutputHead.of(with_lora(**settings).train())


def test_dropout_is_off_in_eval_mode() -> None:
    model, hidden = with_lora(lora_dropout=0.5).eval(), hidden_states()
    found, wanted = OutputHead.of(model).logits(hidden), head_logits(model, hidden)
    assert_near(found.detach(), wanted.detach(), 1e-5)


def test_several_adapters_are_refused() -> None:
    model = with_lora()
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(LoraConfig(**LORA), model, "second")
    layer: Any = model.get_output_embeddings()
    layer.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="2 active adapters"):
        OutputHead.of(model)


class Squared(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something else than a product."""
        return super().forward(x).square()


@pytest.mark.parametrize("head", [Squared(8, 19), torch.nn.Sequential(torch.nn.Linear(8, 19))])
def test_other_heads_are_refused(head: torch.nn.Module) -> None:
    model = made("plain")
    model.set_output_embeddings(head)
    with pytest.raises(InputError, match=type(head).__name__) as refused:
        OutputHead.of(model)
    assert isinstance(refused.value, StillroomError)
