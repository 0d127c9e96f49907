"""An output head without its trunk gives what the whole model gives, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.cache.causal_lm import trunk
from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.vllm_head import OutputHead
from tests.conftest import VOCAB, save_llama, save_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 3.0, "tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "initializer_range": 1.0},
    "cohere": {"logit_scale": 5.0},
    "phi": {},
}


@torch.no_grad()
def whole_and_head(folder: Path, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model, and those that its head alone makes of its hidden states."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = OutputHead(inspect_model(str(folder)), "float32", CPU)
    logits, rest = head.logits(trunk(model, IDS)[0], temperature)
    assert rest is None
    return model(IDS).logits[0] / temperature, logits


@pytest.mark.parametrize("kind", KINDS)
def test_scales_caps_and_biases_are_kept(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    whole, ours = whole_and_head(tmp_path, temperature=0.5)
    torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_are_no_token_are_masked(tmp_path: Path, tied: bool) -> None:
    folder = save_llama(tmp_path, 3, width=VOCAB + 5, tied=tied)
    whole, ours = whole_and_head(folder)
    torch.testing.assert_close(ours[:, :VOCAB], whole[:, :VOCAB])
    assert (ours[:, VOCAB:] == -torch.inf).all()


def test_a_head_that_does_more_is_refused(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "stillroom.cache.vllm_head.head_logits",
        lambda model, hidden: 7.0 * model.get_output_embeddings()(hidden),
    )
    with pytest.raises(InputError, match="LlamaForCausalLM, whose logits differ"):
        OutputHead(inspect_model(str(teacher_dir)), "float32", CPU)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("gone", r"no tensor lm_head\.weight"),
        ("packed", "int8"),
        ("fp8", "float8_e4m3fn"),
        ("scaled", r"lm_head\.weight with lm_head\.weight_scale_inv"),
        ("shape", "size mismatch"),
    ],
)
def test_weights_that_are_not_there_are_refused(tmp_path: Path, change: str, named: str) -> None:
    path = save_llama(tmp_path, 3, tied=False) / "model.safetensors"
    tensors = load_file(path)
    weight = tensors.pop("lm_head.weight")
    if change == "packed":
        tensors["lm_head.weight"] = weight.to(torch.int8)
    if change == "fp8":
        tensors["lm_head.weight"] = weight.to(torch.float8_e4m3fn)
    if change == "scaled":
        tensors |= {"lm_head.weight": weight, "lm_head.weight_scale_inv": torch.ones(1, 1)}
    if change == "shape":
        tensors["lm_head.weight"] = weight[1:].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=named):
        OutputHead(inspect_model(str(tmp_path)), "float32", CPU)
