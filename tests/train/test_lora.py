"""Adapters train in place of weights, and come out again as weights or as peft reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from stillroom.cache.errors import ConfigError
from stillroom.train.config import LoraSettings
from stillroom.train.lora import add_lora, has_lora, merged_state, save_adapter
from stillroom.train.output_head import OutputHead
from tests.conftest import save_llama

IDS = torch.arange(3, 11)[None]


def load(folder: Path, settings: LoraSettings, seed: int = 0) -> PreTrainedModel:
    """A model with adapters that change something."""
    torch.manual_seed(seed)
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder).eval())
    add_lora(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose output head is a matrix of its own."""
    return save_llama(tmp_path_factory.mktemp("models") / "untied", seed=5, tied=False)


def test_only_adapters_are_trained(student_dir: Path) -> None:
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(student_dir)
    before, count = plain(IDS).logits, len(list(plain.parameters()))
    assert not has_lora(plain)
    add_lora(plain, LoraSettings(r=2))
    assert has_lora(plain)
    assert torch.equal(plain(IDS).logits, before), "they begin with no effect"
    trained = [name for name, p in plain.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7, "two for each of seven matrices of two layers"
    assert len(list(plain.parameters())) == count + len(trained)


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj"), ("v_proj", "lm_head")])
def test_merged_weights_are_the_adapted_model(untied: Path, targets: tuple[str, ...]) -> None:
    model = load(untied, LoraSettings(r=3, alpha=5.0, target_modules=targets))
    whole = model.state_dict()
    merged = merged_state(model, whole)
    plain = AutoModelForCausalLM.from_pretrained(untied)
    assert merged.keys() == plain.state_dict().keys()
    before = plain(IDS).logits
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (plain(IDS).logits - before).abs().max() > 0.1
    assert whole.keys() == model.state_dict().keys(), "what was given stays"


def test_layers_with_transposed_weights_are_merged_too() -> None:
    """Those of GPT-2, with their biases."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": 20,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    plain = GPT2LMHeadModel(model.config).eval()
    add_lora(model, LoraSettings(r=2, target_modules=("c_attn",)))
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.lora_B["default"].weight)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_is_one_of_peft(student_dir: Path, tmp_path: Path) -> None:
    model = load(student_dir, LoraSettings(r=3, alpha=5.0, target_modules=("q_proj", "up_proj")))
    save_adapter(model, model.state_dict(), tmp_path, str(student_dir))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert has_lora(model)
    assert model.training is False


def test_the_output_head_has_its_adapter(untied: Path) -> None:
    """The loss sees the weight with it, and its gradient reaches it."""
    model = load(untied, LoraSettings(r=2, target_modules=("lm_head",)))
    hidden = torch.randn(4, 32)
    head = OutputHead.of(model)
    expected = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-5)
    head.logits(hidden).square().sum().backward()  # type: ignore[no-untyped-call]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 2
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (("q_projection",), "q_projection"),
        (("input_layernorm",), "linear layers; got .*input_layernorm, LlamaRMSNorm"),
        (("embed_tokens",), "linear layers; got .*embed_tokens, Embedding"),
        (("lm_head",), "whose weight is the input embedding's"),
    ],
)
def test_layers_that_can_have_none_are_named(
    student_dir: Path, targets: tuple[str, ...], match: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    with pytest.raises(ConfigError, match=match):
        add_lora(model, LoraSettings(target_modules=targets))
    assert not has_lora(model)


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head")])
def test_dropout_is_refused_on_the_output_head(untied: Path, targets: tuple[str, ...]) -> None:
    model = AutoModelForCausalLM.from_pretrained(untied)
    with pytest.raises(ConfigError, match=r"^train\.lora\.dropout: .*got 0\.1.*lm_head out of"):
        add_lora(model, LoraSettings(dropout=0.1, target_modules=targets))
    assert not has_lora(model)
    add_lora(model, LoraSettings(dropout=0.1, target_modules=("q_proj",)))


@pytest.mark.parametrize(
    "changes", [{"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"publish": "both"}], ids=str
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.lora\."):
        LoraSettings(**changes)
