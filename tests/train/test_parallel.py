"""A model's forward that runs functions; on several ranks see tests/integration/test_ranks.py."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stillroom.cache.errors import InputError
from stillroom.train.parallel import Parallel, decoder_layers, same_on_all_ranks

IDS = torch.arange(8)[None]


@pytest.fixture
def model(student_dir: Path) -> PreTrainedModel:
    """The tiny student."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(student_dir)
    return loaded


@pytest.mark.parametrize("how", ["auto", "ddp", "fsdp"])
def test_one_process_runs_functions_inside_the_forward(model: PreTrainedModel, how: str) -> None:
    """Hooks of the model are called around them, and names stay Hugging Face's."""
    expected, names = model(IDS).logits, [name for name, _ in model.named_parameters()]
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    parallel = Parallel(model, how)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        calls.append("inside")
        hidden = model.base_model(ids).last_hidden_state
        found: torch.Tensor = model.get_output_embeddings()(hidden)
        return found

    assert torch.equal(parallel.run(logits, IDS), expected)
    assert calls == ["before", "inside", "after"]
    assert (parallel.kind, parallel.world, parallel.rank, parallel.units) == ("none", 1, 0, 0)
    assert [name for name, _ in model.named_parameters()] == names


def test_the_model_stays_usable_by_itself(student_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(student_dir)
    expected = model(IDS).logits
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False)
    parallel = Parallel(model)
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    again = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False
    )
    assert torch.equal(again, generated)
    twin = deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert bool((twin(IDS).logits == 0).all())
    assert parallel.run(lambda: torch.tensor(2.0)) == 2


def test_a_model_is_freed_with_its_last_user(student_dir: Path) -> None:
    """Without the garbage collector, which may come late for a device's memory."""
    gc.disable()
    try:
        parallel = Parallel(AutoModelForCausalLM.from_pretrained(student_dir))
        left = weakref.ref(parallel.model)
        del parallel
        assert left() is None
    finally:
        gc.enable()


def test_the_state_is_the_models(model: PreTrainedModel) -> None:
    state = Parallel(model).full_state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_gradients_are_clipped_to_the_norm_over_all(model: PreTrainedModel) -> None:
    parallel = Parallel(model)
    parameters = list(model.parameters())
    for parameter in parameters[1:]:
        parameter.grad = torch.full_like(parameter, 2.0)
    size = sum(parameter.numel() for parameter in parameters[1:])
    assert parallel.clip_gradients(1e9) == pytest.approx(2 * size**0.5)
    assert parallel.clip_gradients(1.0) == pytest.approx(2 * size**0.5)
    assert parallel.clip_gradients(1.0) == pytest.approx(1.0, rel=1e-5)
    assert parameters[0].grad is None


def test_nothing_is_summed_alone(model: PreTrainedModel) -> None:
    assert Parallel(model).sum(torch.tensor(3.0)) == 3


def test_decoder_layers_are_found(model: PreTrainedModel) -> None:
    layers = decoder_layers(model)
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 2
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="a list of 3 decoder layers"):
        decoder_layers(model)


def test_one_process_chooses_for_itself() -> None:
    assert same_on_all_ranks(lambda: {"a": 1}, "cpu") == {"a": 1}
    with pytest.raises(InputError, match="why"):
        same_on_all_ranks(lambda: (_ for _ in ()).throw(InputError("a", "b", "c", "why")), "cpu")
