"""Low-rank adapters (LoRA): put into a student in place of training its weights, and taken out
again to be published.

peft makes the layers; the model stays outermost, and a state below is that of the whole model with
its adapters, by the names of its parameters.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stillroom.cache.errors import ConfigError
from stillroom.train.config import LoraSettings

ADAPTER = "default"
State = dict[str, torch.Tensor]


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Put adapters into the model and freeze all other parameters.

    Raises:
        ConfigError: no layer has such a name, one is not linear, one is an output head that is the
            input embedding too, or one is an output head and there is dropout.
    """
    where = "train.lora.target_modules"
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        target_modules=list(settings.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    _check_targets(model, settings)
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        do = "Name layers of this architecture."
        raise ConfigError(where, "names of linear layers", str(error), do) from error


def _check_targets(model: PreTrainedModel, settings: LoraSettings) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    where, do = "train.lora.target_modules", "Leave it out."
    for full, module in model.named_modules():
        if not any(full == x or full.endswith(f".{x}") for x in settings.target_modules):
            continue
        if not isinstance(module, torch.nn.Linear | Conv1D):
            raise ConfigError(where, "linear layers", f"{full}, {type(module).__name__}", do)
        if module is head and getattr(embedding, "weight", None) is module.weight:
            expected = "no layer whose weight is the input embedding's too"
            raise ConfigError(where, expected, full, do)
        if module is head and settings.dropout > 0:
            do = f"Set it to 0, or leave {full} out of {where}."
            expected = "0 with adapters on the output head, whose loss has no dropout"
            raise ConfigError("train.lora.dropout", expected, repr(settings.dropout), do)


def _adapted(model: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def has_lora(model: torch.nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(True for _ in _adapted(model))


def merged_state(model: torch.nn.Module, state: State) -> State:
    """The state of the model without adapters whose weights have them added, by Hugging Face names.

    Args:
        model: it has the adapters; its own weights are not read.
        state: its whole state, with adapters.

    Returns:
        A new dict; weights that no adapter changes are the given tensors.
    """
    merged = dict(state)
    for name, layer in _adapted(model):
        down, up = (merged.pop(f"{name}.lora_{side}.{ADAPTER}.weight") for side in "AB")
        weight = merged.pop(f"{name}.base_layer.weight")
        delta = up.double() @ down.double() * layer.scaling[ADAPTER]
        delta = delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
        merged[f"{name}.weight"] = (weight.double() + delta).to(weight.dtype)
        if (bias := merged.pop(f"{name}.base_layer.bias", None)) is not None:
            merged[f"{name}.bias"] = bias
    return merged


def save_adapter(model: PreTrainedModel, state: State, folder: Path, base: str) -> None:
    """Write the adapters as peft reads them: `adapter_model.safetensors`, `adapter_config.json`.

    Args:
        model: it has the adapters.
        state: its whole state.
        folder: exists.
        base: folder or name of the model that they were trained from.
    """
    adapters = get_peft_model_state_dict(model, state_dict=state, adapter_name=ADAPTER)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: LoraConfig = vars(model)["peft_config"][ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    config.inference_mode = False
