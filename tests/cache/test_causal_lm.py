"""A causal language model in two: trunk and head give what the whole gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stillroom.cache.causal_lm import (
    _check_causal,
    head_logits,
    load_causal_lm,
    pick_device,
    trunk,
)
from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.fingerprint import inspect_model
from tests.conftest import VOCAB, save_llama, save_tokenizer

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
CPU = torch.device("cpu")


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """Inspect and load."""
    return load_causal_lm(inspect_model(str(folder)), dtype, CPU)


HEADS: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "initializer_range": 1.0},
    "cohere": {"logit_scale": 5.0},
}


@pytest.mark.parametrize("kind", HEADS)
def test_scales_and_caps_of_the_head_are_kept(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **HEADS[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        ours = head_logits(model, trunk(model, ids))
        head = model.get_output_embeddings()
        assert head is not None
        bare = head(trunk(model, ids))
    torch.testing.assert_close(ours, whole)
    assert not torch.allclose(bare, whole, atol=1e-2)
    monkeypatch.setattr(
        "stillroom.cache.causal_lm.head_logits", lambda _, hidden: 7.0 * head(hidden)
    )
    with pytest.raises(InputError, match=rf"{tmp_path}: expected an output head that is one"):
        load(tmp_path)


@torch.no_grad()
def test_a_cap_on_attention_scores_is_kept(tmp_path: Path) -> None:
    """Fused attention, which transformers picks, leaves it out."""
    torch.manual_seed(0)
    settings = {"attn_logit_softcapping": 0.5, "head_dim": 8, "initializer_range": 1.0}
    config = AutoConfig.for_model("gemma2", **SIZES, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    written_out, fused = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(ids).logits
        for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(load(tmp_path)(ids).logits, written_out)
    assert not torch.allclose(fused, written_out, atol=1e-2)


def test_a_model_is_loaded_ready_to_read(teacher_dir: Path) -> None:
    model = load(teacher_dir, "bfloat16")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    path = save_llama(tmp_path, seed=0) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = save_llama(tmp_path, seed=0) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=str(tmp_path)):
        load(tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = save_llama(tmp_path, seed=0) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "nothing_like_it"}))
    with pytest.raises(InputError, match=r"a causal language model; got .*nothing_like_it"):
        load(tmp_path)


def test_devices_by_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("environ", "index"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_LOCALID": "2"}, 2),
        ({"SLURM_LOCALID": "5"}, 1),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1),
    ],
)
def test_each_process_of_a_node_has_a_gpu_of_its_own(
    environ: dict[str, str], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto") == torch.device("cuda", index)


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^device: .*; got '{name}'"):
        pick_device(name)


def test_an_architecture_without_a_trunk_is_refused() -> None:
    """Llama 4's base model is the whole one."""
    sizes = {**SIZES, "head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **sizes))
    with pytest.raises(InputError, match="Llama4ForCausalLM: expected a trunk that gives last"):
        trunk(model, torch.tensor([[3, 1, 4]]))


@pytest.mark.parametrize("outlier", [None, 1e4, float("nan")])
def test_a_model_that_reads_what_comes_later_is_refused(
    teacher_dir: Path, outlier: float | None
) -> None:
    """Also where one channel is far larger than the others, or is no number."""
    model, files = load(teacher_dir), inspect_model(str(teacher_dir))
    if outlier is not None:

        def change(_module: object, _inputs: object, output: Any) -> None:
            output.last_hidden_state[..., 0] = outlier

        model.base_model.register_forward_hook(change)
    _check_causal(model, files)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(InputError, match="hidden states that follow later tokens too"):
        _check_causal(model, files)
